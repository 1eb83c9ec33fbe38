"""Backends: from an optimization problem to a layer that a network can be trained through."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import Tensor

from foldopt import FixedPointLayer, FoldInfo
from foldopt.errors import InputError

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


class LayerBackend:
    """A backend around a layer of foldopt, of whose state the problem reads the decisions."""

    trains_on: ClassVar[str] = "decision"

    def __init__(self, problem: Any, layer: FixedPointLayer) -> None:
        self.problem, self.layer = problem, layer
        self.products = 0

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the decisions for the predicted parameters."""
        params = self.problem.params(parameters)
        return self.problem.decisions(self.layer(*params), *params)

    def take_failures(self) -> int:
        """Return how many samples of the last call failed, forward or backward.

        `products` then tells how many products with Phi the adjoint equations of that call took in all.
        """
        last, self.layer.last = self.layer.last, None
        backward = None if last is None else last.backward
        self.products = 0 if backward is None else int(backward.iterations.sum())
        return failures(last)


def failures(last: FoldInfo | None) -> int:
    """Return how many samples failed, forward or backward, by the certificates of a layer's last call."""
    if last is None:
        return 0
    ok = last.solved if last.backward is None else last.solved & last.backward.ok
    return int((~ok).sum())


def optimizer_of(problem: Any, name: str) -> str:
    """Return the problem's optimizer called `name`, or its first for "auto".

    Raises InputError if it has none of that name.
    """
    able = list(problem.optimizers)
    if name != "auto" and name not in able:
        raise InputError(f"backend.optimizer={name!r} is not there for this task; choose auto or one of {able}.")
    return able[0] if name == "auto" else name


def lacks(task: Any, feature: str, why: str) -> str | None:
    """Return why the task's problem has no attribute called `feature`, None if it has.

    That is what the problem says itself in `lacking`, else `why`.
    """
    problem = task.problem
    return None if hasattr(problem, feature) else getattr(problem, "lacking", {}).get(feature, why)
