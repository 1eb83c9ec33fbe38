"""The exact solution in closed form with its exact derivative, for problems that have one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from foldopt.linear_solve import LinearSolver


class ExactBackend(Backend):
    """The problem's `closed_form`, differentiated by autograd."""

    def __init__(self, task: Task, linear_solver: LinearSolver) -> None:
        self.problem = task.problem

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem has no closed form, None if it has."""
        return task.problem.lacks("closed_form")

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions for the task's parameters."""
        return self.problem.closed_form(*self.problem.params(parameters))
