"""Folded optimization of a problem: its forward solver and one update step."""

from __future__ import annotations

from typing import Any

from experiments.backends import LayerBackend, lacks
from foldopt import f_sqp
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver

TOLERANCES = {"exact": 1e-6, "gurobi": 1e-3}


class FoldBackend(LayerBackend):
    """f-SQP (paper section 6) on the task's problem.

    optimizer: the update step, "sqp". forward: "exact", the problem's own solver, or "gurobi".
    tol, on_failure: as for `foldopt.fold`; tol None follows the accuracy of the forward solver.
    """

    def __init__(
        self, task: Any, linear_solver: LinearSolver, optimizer: str, forward: str, tol: float | None, on_failure: str
    ) -> None:
        problem = task.problem
        if optimizer != "sqp":
            raise InputError(f"backend.optimizer={optimizer!r} is not there for this task; choose sqp.")
        if forward not in TOLERANCES or not hasattr(problem, forward):
            able = [name for name in TOLERANCES if hasattr(problem, name)]
            raise InputError(f"backend.forward={forward!r} is not there for this task; choose one of {able}.")

        def solve(parameters: Any, *_: Any) -> Any:
            return getattr(problem, forward)(parameters).state

        options = {"tol": tol or TOLERANCES[forward], "on_failure": on_failure, "linear_solver": linear_solver}
        super().__init__(problem, f_sqp(problem, solve, **options))

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem cannot be folded, None if it can."""
        return lacks(task, "sqp_data", "its problem has no update step (sqp_data)")
