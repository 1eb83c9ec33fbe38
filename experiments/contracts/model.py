"""The contract of a model: a torch module whose sizes the task gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Model(Protocol):
    """A `torch.nn.Module`, made with (n_inputs, n_outputs) and the keys of its YAML.

    Any module satisfies this; what it computes is the contract of `__call__`. Buffers and parameters are checkpointed.
    """

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs (B, n_outputs) for the task's inputs (B, ...), or what a `shared` task learns."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move parameters and buffers to the device."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Prepare for training."""
        ...

    def eval(self) -> Self:
        """Prepare for evaluation."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what is learned."""
        ...

    def modules(self) -> Iterable[nn.Module]:
        """Return the module and all modules inside it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Take the state of a checkpoint."""
        ...
