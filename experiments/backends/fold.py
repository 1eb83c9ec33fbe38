"""Folded optimization of a problem: its forward solver and one update step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from experiments.backends import LayerBackend, lacks, optimizer_of
from foldopt import fold
from foldopt.checks import require_positive
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver

TOLERANCES = {"exact": 1e-6, "gurobi": 1e-3, "fdpg": 1e-5, "cvxpy": 1e-3}


class FoldBackend(LayerBackend):
    """Fixed-point folding (paper sections 5 and 6) of the task's problem, in float64.

    optimizer: the update step, one of the problem's, or "auto", its first. forward: one of the problem's solvers.
    forward_tol: that solver's own tolerance, None for its default. tol, on_failure: as for `foldopt.fold`; tol None
    follows the accuracy of the forward solver.
    """

    def __init__(
        self,
        task: Any,
        linear_solver: LinearSolver,
        optimizer: str,
        forward: str,
        tol: float | None,
        on_failure: str,
        forward_tol: float | None = None,
    ) -> None:
        solve, update = solver_and_step(task.problem, optimizer, forward, forward_tol)
        options = {
            "tol": TOLERANCES[forward] if tol is None else tol,
            "on_failure": on_failure,
            "degenerate": "one_sided",  # training goes on at a kink
            "linear_solver": linear_solver,
        }
        super().__init__(task.problem, fold(solve, update, dtype=torch.float64, **options))

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem cannot be folded, None if it can."""
        return lacks(task, "optimizers", "its problem has no update step (optimizers)")


def solver_and_step(
    problem: Any, optimizer: str, forward: str, forward_tol: float | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the problem's solver called `forward` and its update step called `optimizer`.

    forward_tol: given to the solver as `tol` unless it is None. Raises InputError for names that the problem does not
    have, and for a tolerance of a solver that has none.
    """
    name = optimizer_of(problem, optimizer)
    update = problem.optimizers[name]()
    if forward not in problem.forwards:
        raise InputError(
            f"backend.forward={forward!r} is not there for this task; choose one of {list(problem.forwards)}."
        )
    solve = partial(problem.solve, forward)
    if forward_tol is not None:
        require_positive("backend.forward_tol", forward_tol)
        if forward not in getattr(problem, "tolerant", ()):
            raise InputError(
                f"backend.forward_tol={forward_tol}: backend.forward={forward!r} takes no tolerance for this task; "
                "leave it null."
            )
        solve = partial(solve, tol=forward_tol)
    if not hasattr(problem, "state"):
        return solve, update
    return lambda *params: problem.state(name, solve(*params), *params), update
