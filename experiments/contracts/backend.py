"""The contract of a backend, which turns predicted parameters into decisions that can be trained through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from experiments.contracts.base import Contract
from experiments.contracts.problem import Parameters
from experiments.contracts.task import Task

TRAINS_ON = ("decision", "prediction", "surrogate")


class Backend(Contract, ABC):
    """A way to train through the decisions. The class is called with (task, linear_solver) and the keys of its YAML.

    trains_on: "decision" (the loss of the decisions it returns), "prediction" (the prediction error) or "surrogate"
    (a loss of its own, `losses`). products: the number of products with Phi that the adjoint equations of the last
    batch took, summed over its samples, once `take_failures` was called; 0 if the backend counts none.
    """

    ABSENT: ClassVar[Mapping[str, str]] = {
        "losses": "it has no loss of its own (losses)",
        "state_dict": "it keeps nothing from one batch to the next (state_dict)",
    }

    trains_on: Literal["decision", "prediction", "surrogate"] = "decision"
    products: int = 0

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why this backend cannot do the task, as a clause for an error message; None if it can."""
        return None

    @abstractmethod
    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions (B, n) for the task's parameters, differentiable; NaN in samples that failed."""

    def losses(self, parameters: Parameters, truth: Parameters) -> Tensor:
        """Return the backend's own loss of each sample, (B,), for the predicted and the true parameters."""
        self._absent("losses")

    def take_failures(self) -> int:
        """Return how many samples failed, forward or backward, since the last call; by default none."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return what later batches depend on, in tensors and plain values; checkpoints hold it."""
        self._absent("state_dict")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._absent("state_dict")
