"""The exact solution in closed form with its exact derivative, for problems that have one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from experiments.backends.layer import lacks
from experiments.contracts.backend import Parameters
from foldopt.linear_solve import LinearSolver


class ExactBackend:
    """The problem's `closed_form`, differentiated by autograd."""

    trains_on: ClassVar[str] = "decision"

    def __init__(self, task: Any, linear_solver: LinearSolver) -> None:
        self.problem = task.problem

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem has no closed form, None if it has."""
        return lacks(task, "closed_form", "its problem has no differentiable closed form (closed_form)")

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the decisions for the task's parameters."""
        return self.problem.closed_form(*self.problem.params(parameters))

    def take_failures(self) -> int:
        """Return 0: a closed form does not fail."""
        return 0
