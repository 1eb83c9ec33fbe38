"""Two-stage learning: train on the prediction error, optimize only at the end."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from experiments.contracts.backend import Parameters
from foldopt.linear_solve import LinearSolver
from foldopt.step import as_tuple


class TwoStageBackend:
    """No layer at all; its decisions are those of the problem's exact solver."""

    trains_on: ClassVar[str] = "prediction"

    def __init__(self, task: Any, linear_solver: LinearSolver) -> None:
        self.problem = task.problem

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task cannot be learned in two stages, None if it can."""
        return None if hasattr(task, "prediction_losses") else "it predicts nothing that could be compared with data"

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the optimal decisions for the predicted parameters (no gradient)."""
        return self.problem.decide(*as_tuple(parameters))

    def take_failures(self) -> int:
        """Return 0: nothing is solved in training."""
        return 0
