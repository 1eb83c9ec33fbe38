"""What the trainer asks of a backend: from an optimization problem to decisions that can be trained through."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

Parameters = Tensor | tuple[Tensor, ...]


class Backend(Protocol):
    """What the trainer asks of a backend. Its class is made with (task, linear_solver) and the keys of its YAML.

    trains_on: "decision" (the loss of the decisions it returns), "prediction" (the prediction error) or "surrogate"
    (a loss of its own, `losses(parameters, truth)`, of the predicted and the true parameters).
    """

    trains_on: ClassVar[str]

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why this backend cannot do the task, None if it can."""
        ...

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the decisions for the task's parameters, differentiable; NaN in samples that failed."""
        ...

    def take_failures(self) -> int:
        """Return how many samples failed, forward or backward, since the last call."""
        ...
