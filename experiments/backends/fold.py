"""Folded optimization of a problem: its forward solver and one update step."""

from __future__ import annotations

from experiments.backends.layer import SolutionBackend
from experiments.contracts.task import Task
from foldopt import fold
from foldopt.linear_solve import LinearSolver


class FoldBackend(SolutionBackend):
    """Fixed-point folding (paper sections 5 and 6) of the task's problem; `SolutionBackend` explains its arguments."""

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        optimizer: str,
        forward: str,
        tol: float | None,
        on_failure: str,
        forward_tol: float | None = None,
    ) -> None:
        options = {"degenerate": "one_sided", "linear_solver": linear_solver}  # training goes on at a kink
        super().__init__(task.problem, fold, optimizer, forward, forward_tol, tol, on_failure, **options)
