"""Fixed-point unfolding (paper section 4): iterations of the optimizer on the graph, from the solution."""

from __future__ import annotations

from experiments.backends.layer import SolutionBackend
from experiments.contracts.task import Task
from foldopt import unfold
from foldopt.linear_solve import LinearSolver


class UnfoldBackend(SolutionBackend):
    """`iterations` steps of the problem's optimizer, on the graph, from the forward solver's solution.

    The other arguments are those of `SolutionBackend`. By Theorem 1 the backward pass is LFPI with as many iterations.
    """

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        optimizer: str,
        forward: str,
        iterations: int,
        tol: float | None,
        on_failure: str,
        forward_tol: float | None = None,
    ) -> None:
        options = {"iterations": iterations}
        super().__init__(task.problem, unfold, optimizer, forward, forward_tol, tol, on_failure, **options)
