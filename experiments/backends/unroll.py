"""Unrolling (paper section 2): every iteration of the optimizer on the graph."""

from __future__ import annotations

from typing import Any

import torch

from experiments.backends.layer import LayerBackend, lacks, optimizer_of
from foldopt import unroll
from foldopt.linear_solve import LinearSolver


class UnrollBackend(LayerBackend):
    """`iterations` steps of the problem's optimizer from its cold start.

    optimizer: as for `FoldBackend`. tol, on_failure: as for `foldopt.unroll`.
    """

    def __init__(
        self,
        task: Any,
        linear_solver: LinearSolver,
        optimizer: str,
        iterations: int,
        tol: float | None,
        on_failure: str,
    ) -> None:
        problem = task.problem
        start, update = problem.unrolled(optimizer_of(problem, optimizer))
        options = {"iterations": iterations, "tol": tol, "on_failure": on_failure}
        super().__init__(problem, unroll(start, update, dtype=torch.float64, **options))

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem cannot be unrolled, None if it can."""
        return lacks(task, "unrolled", "its problem has no optimizer with a start (unrolled)")
