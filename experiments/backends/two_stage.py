"""Two-stage learning: train on the prediction error, optimize only at the end."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from foldopt.linear_solve import LinearSolver
from foldopt.step import as_tuple


class TwoStageBackend(Backend):
    """Trains without a layer; its decisions are those of the problem's exact solver."""

    trains_on: Literal["decision", "prediction", "surrogate"] = "prediction"

    def __init__(self, task: Task, linear_solver: LinearSolver) -> None:
        self.problem = task.problem

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task cannot be learned in two stages, None if it can."""
        return task.lacks("prediction_losses")

    def __call__(self, parameters: Any) -> Tensor:
        """Return the optimal decisions for the predicted parameters (no gradient)."""
        return self.problem.decide(*as_tuple(parameters))
