"""CvxpyLayer: the problem in cvxpy's form, solved by a solver of cvxpy's and folded by foldopt."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from experiments.backends.layer import failures, lacks
from experiments.contracts.backend import Parameters
from foldopt import CvxpyLayer
from foldopt.linear_solve import LinearSolver


class CvxpyBackend:
    """A `foldopt.CvxpyLayer` of the problem.

    scaling: "paper" or "normalized", as the problem's `cvxpy` method takes it. solver, on_failure: as for the layer;
    training goes on at a kink, with the derivative of one side. solver_args: the solver's options.
    """

    trains_on: ClassVar[str] = "decision"

    def __init__(
        self,
        task: Any,
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
        self._decisions = getattr(task.problem, "cvxpy_decisions", None)

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem has no cvxpy form, None if it has."""
        return lacks(task, "cvxpy", "its problem has no convex form that cvxpy could take")

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the decisions for the task's parameters, (B, n), in their dtype; NaN in samples that failed."""
        (solutions,) = self.layer(*((parameters,) if isinstance(parameters, Tensor) else parameters))
        return solutions if self._decisions is None else self._decisions(solutions)

    def take_failures(self) -> int:
        """Return how many samples of the last call failed, forward or backward."""
        last, self.layer.engine.last = self.layer.last, None
        return failures(last)
