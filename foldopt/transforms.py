"""Functions that torch.func and autograd may transform to any order although they run on plain tensors only.

Solvers and update steps branch on data and record graphs of their own, which functions under ``torch.func`` may not.
An `Opaque` function runs at the bottom of the stack of transforms, where tensors are plain; its derivatives are opaque
functions again, and vmap runs it once per sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foldopt._compat import (
    leaves,
    outer_tangents,
    plain,
    through_autograds_vmap,
    transforming,
    wrapped_by_func,
)
from foldopt.errors import InputError, UndeclaredParameterError
from foldopt.step import Recorded, Tensors, pushforward, vjp_of

__all__ = ["Opaque", "differentiable", "opaque", "plain", "transforming"]

Function = Callable[..., Tensors]


class Opaque:
    """A function from plain tensors to a tuple of such, with its derivatives; see `differentiable`.

    The derivatives below record the function's own graph. A subclass that knows better defines them itself.
    """

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the outputs of plain inputs."""
        raise NotImplementedError

    def vjp(
        self, cotangent: Tensors, inputs: Tensors, outputs: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pull the outputs' cotangent back to the inputs; None for those that are not `needed`."""
        return pulled_back(self, cotangent, inputs, needed)

    def jvp(self, tangents: Sequence[Tensor | None], inputs: Tensors, outputs: Tensors) -> tuple[Tensor | None, ...]:
        """Return the outputs' tangents for those of the inputs, None for zero."""
        return pushed_forward(self, tangents, inputs)

    def mapped(self, size: int, in_dims: Sequence[int | None], inputs: Tensors) -> tuple[Tensors, tuple[int, ...]]:
        """Return the outputs for `size` samples, and the dimension of each that counts them."""
        return looped([self] * size, in_dims, inputs)


def differentiable(function: Opaque, *tensors: Tensor) -> Tensors:
    """Call an opaque function; autograd and every transform of torch.func can transform the call."""
    if not transforming(*tensors):
        return _Function.apply(function, *tensors)
    return through_autograds_vmap(tensors, lambda *t: _Function.apply(function, *t), function.mapped)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(function: Opaque, *inputs: Tensor) -> Tensors:
        return tuple(out.clone() if any(out is i for i in inputs) else out for out in function(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, *tensors = inputs
        ctx.n_outputs = len(output)
        ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))
        ctx.save_for_backward(*output, *tensors)
        ctx.save_for_forward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        saved, n = ctx.saved_tensors, ctx.n_outputs
        return None, *ctx.function.vjp(cotangent, saved[n:], saved[:n], ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with outer_tangents(ctx.saved_tensors) as saved:
            return ctx.function.jvp(tangents, saved[ctx.n_outputs :], saved[: ctx.n_outputs])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Opaque, *inputs: Tensor) -> tuple[Tensors, Any]:
        return function.mapped(info.batch_size, in_dims[1:], inputs)


_Function.forward.__signature__ = inspect.signature(_Function.forward)  # type: ignore[attr-defined]  # asked for in each call


def pulled_back(
    function: Opaque, cotangent: Tensors, inputs: Tensors, needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Return the vjp of an opaque function by its own graph, itself opaque; None for inputs that are not `needed`."""
    wanted = tuple(i for i, (need, p) in enumerate(zip(needed, inputs, strict=True)) if need and p.is_floating_point())
    if not wanted:
        return [None] * len(inputs)
    found = differentiable(Pullback(function, len(cotangent), wanted), *cotangent, *inputs)
    pulled = dict(zip(wanted, found, strict=True))
    return [pulled.get(i) for i in range(len(inputs))]


def pushed_forward(function: Opaque, tangents: Sequence[Tensor | None], inputs: Tensors) -> Tensors:
    """Return the jvp of an opaque function by its own graph, itself opaque; a tangent may be None for zero."""
    moved = {i: t for i, t in enumerate(tangents) if t is not None and inputs[i].is_floating_point()}
    return differentiable(Pushforward(function, tuple(moved)), *moved.values(), *inputs)


def looped(
    functions: Sequence[Opaque], in_dims: Sequence[int | None], inputs: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    """Apply one function to each sample and stack the outputs: what vmap does to an opaque function.

    Raises InputError for no samples, whose outputs have no known shape.
    """
    if not functions:
        raise InputError("vmap over a dimension of size 0: a layer has to be called once to know its state's shape.")
    samples = [
        differentiable(
            function, *(t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True))
        )
        for i, function in enumerate(functions)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


@dataclass(frozen=True)
class Plain(Opaque):
    """A Python function as an opaque one."""

    function: Function

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the outputs."""
        return self.function(*inputs)


def opaque(function: Function, *tensors: Tensor) -> Tensors:
    """Call `function`, which returns a tuple of tensors, on plain tensors; see the module's docstring."""
    return differentiable(Plain(function), *tensors)


@dataclass(frozen=True)
class Pullback(Opaque):
    """``Pullback(f, n, wanted)(*cotangent, *inputs)``: the n cotangents of f's outputs pulled back to some inputs."""

    function: Function
    n_outputs: int
    wanted: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the gradients of the wanted inputs, differentiable if gradients are being recorded."""
        cotangent, inputs = tensors[: self.n_outputs], tensors[self.n_outputs :]
        recorded, create_graph = recorded_call(self.function, inputs, self.wanted)
        leaves = [recorded.params[i] for i in self.wanted]
        pulled = vjp_of(recorded, leaves, cotangent, create_graph=create_graph)
        return tuple(torch.zeros_like(leaf) if p is None else p for leaf, p in zip(leaves, pulled, strict=True))


@dataclass(frozen=True)
class Pushforward(Opaque):
    """``Pushforward(f, moved)(*tangents, *inputs)``: how f's outputs move with the inputs numbered `moved`."""

    function: Function
    moved: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the tangents of the outputs, differentiable if gradients are being recorded."""
        tangents, inputs = tensors[: len(self.moved)], tensors[len(self.moved) :]
        recorded, create_graph = recorded_call(self.function, inputs, self.moved)
        return pushforward(recorded, [recorded.params[i] for i in self.moved], create_graph)(tangents)


def recorded_call(function: Function, inputs: Tensors, wanted: Sequence[int]) -> tuple[Recorded, bool]:
    """Call `function` on aliases of `inputs`, those `wanted` requiring grad; and whether to go on recording.

    The aliases stay connected to inputs whose graph is being recorded: the call differentiates partially, and what
    it returns can be differentiated in full.
    """
    going_on = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = tuple(
            t.view_as(t) if going_on and t.requires_grad else t.detach().requires_grad_(i in wanted)
            for i, t in enumerate(inputs)
        )
        return Recorded(function(*leaves), (), leaves), going_on


class Undeclared(TorchFunctionMode):
    """While a layer runs on plain tensors, refuse those of a transform: they were closed over, not passed.

    Without it their derivative would be lost, or vmap's samples mixed, in silence.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `function` unless an argument is a transform's."""
        if not transforming() and any(isinstance(t, Tensor) and wrapped_by_func(t) for t in leaves((args, kwargs))):
            raise UndeclaredParameterError(
                "the solver or the update step uses a tensor that torch.func differentiates or maps but that was not "
                "passed to the layer, so its derivative would be lost. Pass it as one of the layer's parameters."
            )
        return function(*args, **(kwargs or {}))
