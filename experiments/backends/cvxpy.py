"""CvxpyLayer: the problem in cvxpy's form, solved by a solver of cvxpy's and folded by foldopt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.backends.layer import failures
from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from foldopt import CvxpyLayer
from foldopt.linear_solve import LinearSolver


class CvxpyBackend(Backend):
    """A `foldopt.CvxpyLayer` of the problem.

    scaling: "paper" or "normalized", as the problem's `cvxpy` method takes it. solver, on_failure: as for the layer;
    training goes on at a kink, with the derivative of one side. solver_args: the solver's options.
    """

    def __init__(
        self,
        task: Task,
        linear_solver: LinearSolver,
        scaling: str,
        solver: str | None,
        on_failure: str,
        solver_args: dict[str, Any],
    ) -> None:
        self.layer = CvxpyLayer(
            *task.problem.cvxpy(scaling),
            solver=solver,
            degenerate="one_sided",
            on_failure=on_failure,
            options=dict(solver_args),
        )
        self._decisions = task.problem.cvxpy_decisions

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem has no cvxpy form, None if it has."""
        return task.problem.lacks("cvxpy")

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions for the task's parameters, (B, n), in their dtype; NaN in samples that failed."""
        (solutions,) = self.layer(*((parameters,) if isinstance(parameters, Tensor) else parameters))
        return self._decisions(solutions)

    def take_failures(self) -> int:
        """Return how many samples of the last call failed, forward or backward."""
        last, self.layer.engine.last = self.layer.last, None
        return failures(last)
