"""cvxpylayers: the problem in cone form, solved and differentiated by diffcp (Agrawal et al., 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from foldopt.checks import require_positive
from foldopt.linear_solve import LinearSolver
from foldopt.solvers.cvxpylayers import ConeLayer

TOLERANCES = {"SCS": ("eps",), "CLARABEL": ("tol_gap_abs", "tol_gap_rel", "tol_feas")}


class CvxpyLayersBackend(Backend):
    """A CvxpyLayer of the problem.

    scaling: "paper" or "normalized", as the problem's `cvxpy` method takes it. forward_tol: tolerance of the solver,
    None for its default. solver, solver_args: name of a cone solver, and its options.
    """

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        scaling: str,
        solver: str,
        solver_args: dict[str, Any],
        forward_tol: float | None = None,
    ) -> None:
        arguments = dict(solver_args)
        if forward_tol is not None:
            require_positive("backend.forward_tol", forward_tol)
            arguments |= dict.fromkeys(TOLERANCES.get(solver, ()), forward_tol)
        self._layer = ConeLayer(*task.problem.cvxpy(scaling), solver, arguments)
        self._decisions = task.problem.cvxpy_decisions

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem has no cvxpy form, None if it has."""
        return task.problem.lacks("cvxpy")

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions for the task's parameters, (B, n), in float64."""
        solutions = self._layer(*((parameters,) if isinstance(parameters, Tensor) else parameters))
        return self._decisions(solutions)

    def take_failures(self) -> int:
        """Return how many samples failed since the last call."""
        failures, self._layer.failures = self._layer.failures, 0
        return failures
