"""Unrolling (paper section 2): every iteration of the optimizer on the graph."""

from __future__ import annotations

import torch

from experiments.backends.layer import LayerBackend, optimizer_of
from experiments.contracts.task import Task
from foldopt import unroll
from foldopt.linear_solve import LinearSolver


class UnrollBackend(LayerBackend):
    """`iterations` steps of the problem's optimizer from its cold start.

    optimizer: the update step, one of the problem's, or "auto", its first. tol: largest accepted relative
    change of a sample in the last step; None takes 1e-6. on_failure: what happens to samples above it, a policy of
    `foldopt.unroll`.
    """

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        optimizer: str,
        iterations: int,
        tol: float | None,
        on_failure: str,
    ) -> None:
        problem = task.problem
        start, update = problem.unrolled(optimizer_of(problem, optimizer))
        layer = unroll(start, update, iterations=iterations, dtype=torch.float64, tol=tol, on_failure=on_failure)
        super().__init__(problem, layer)

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem cannot be unrolled, None if it can."""
        return task.problem.lacks("unrolled", "optimizers")
