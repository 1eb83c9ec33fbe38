"""A layer's solution with one step recorded there, whatever its policies: the starting point of all diagnostics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from foldopt._fold import Implicit
from foldopt._layer import FixedPointLayer, LayerCall
from foldopt.errors import InputError
from foldopt.step import Recorded, StepFunction, Tensors, record

__all__ = ["Examined", "distance", "examined", "folded_in", "joined", "lenient", "random_like"]


def folded_in(layer: nn.Module, params: Sequence[Any]) -> FixedPointLayer:
    """Return the folded layer that a call of `layer` with these parameters uses; InputError if there is none."""
    core: Any = layer
    if not isinstance(layer, FixedPointLayer):
        folded: Any = getattr(layer, "folded", None)
        core = getattr(layer, "fold", None) if folded is None else folded(*params)
    if not isinstance(core, FixedPointLayer) or not isinstance(core.derivative, Implicit):
        raise InputError(
            f"layer={type(layer).__name__} is not a folded layer and has none as its attribute `fold`; pass a layer of "
            "foldopt.fold, or one of the ready layers."
        )
    return core


@contextmanager
def lenient(core: FixedPointLayer) -> Iterator[None]:
    """Return a context in which a layer answers whatever its residuals and verdicts are."""
    before = core.on_failure, core.derivative, core.last
    linear_solver = cast(Implicit, core.derivative).linear_solver
    core.on_failure, core.derivative = "warn", Implicit(linear_solver, "one_sided")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        core.on_failure, core.derivative, core.last = before


class Examined(NamedTuple):
    """A layer's solution and one step recorded there; all floating parameters are differentiated."""

    solution: Tensors
    recorded: Recorded
    step: StepFunction
    tensors: Tensors
    residual: Tensor


def examined(layer: nn.Module, core: FixedPointLayer, params: Sequence[Any]) -> Examined:
    """Call the layer without gradients, and record a step with the parameters that its folded layer received."""
    got: list[tuple[Tensor, ...]] = []
    hook = core.register_forward_pre_hook(lambda _, args: got.append(args))
    try:
        with torch.no_grad():
            layer(*params)
    finally:
        hook.remove()
    call = LayerCall(core, tuple(p.detach().requires_grad_(p.is_floating_point()) for p in got[-1]))
    solution = call.solve(call.tensors)
    recorded = record(call.step, solution, call.tensors)
    info = core.certify(solution, tuple(part.detach() for part in recorded.outputs))
    return Examined(solution, recorded, call.step, call.tensors, info.residual)


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a standard normal tensor like the given one."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return tensors as one vector, without those that are None."""
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def distance(a: Tensor, b: Tensor, norm: float = 2) -> Tensor:
    """Return the norm of a - b, relative to that of b if it is not 0."""
    size = torch.linalg.vector_norm(b, norm)
    return torch.linalg.vector_norm(a - b, norm) / torch.where(size > 0, size, 1)
