"""Functions that autograd and torch.func can transform to any order although they run on plain tensors only.

Solvers and update steps branch on values and record autograd graphs of their own, which functions under ``torch.func``
may not do. An `Opaque` function runs below all transforms, where tensors are plain. Its derivatives are opaque
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
    """A function from plain tensors to a tuple of plain tensors, with its derivatives; `differentiable` calls it.

    Subclasses define ``__call__``. The derivatives defined here record the autograd graph of ``__call__``; a subclass
    that has a better way to compute them overrides `vjp` and `jvp`.

    Examples:
        >>> class Square(foldopt.transforms.Opaque):
        ...     def __call__(self, x):
        ...         return (x * x,)
        >>> torch.func.grad(lambda x: foldopt.transforms.differentiable(Square(), x)[0])(torch.tensor(3.0))
        tensor(6.)
    """

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the outputs for plain inputs."""
        raise NotImplementedError

    def vjp(
        self, cotangent: Tensors, inputs: Tensors, outputs: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pull the cotangent of the outputs back to the inputs; None for inputs that are not `needed`."""
        return pulled_back(self, cotangent, inputs, needed)

    def jvp(self, tangents: Sequence[Tensor | None], inputs: Tensors, outputs: Tensors) -> tuple[Tensor | None, ...]:
        """Return the tangents of the outputs for those of the inputs; None stands for zero."""
        return pushed_forward(self, tangents, inputs)

    def mapped(self, size: int, in_dims: Sequence[int | None], inputs: Tensors) -> tuple[Tensors, tuple[int, ...]]:
        """Return the outputs for `size` samples, and for each output the dimension along which the samples lie."""
        return looped([self] * size, in_dims, inputs)


def differentiable(function: Opaque, *tensors: Tensor) -> Tensors:
    """Call an opaque function such that autograd and every transform of torch.func can transform the call.

    Args:
        function: the opaque function.
        *tensors: its inputs.

    Returns:
        Its outputs, a tuple of tensors.

    Examples:
        >>> class Exponential(foldopt.transforms.Opaque):
        ...     def __call__(self, x):
        ...         return (x.exp(),)
        >>> foldopt.transforms.differentiable(Exponential(), torch.zeros(1))
        (tensor([1.]),)
    """
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
    """Return the vector-Jacobian product by the function's own graph, as an opaque call.

    The gradient is None for inputs that are not `needed`.
    """
    wanted = tuple(i for i, (need, p) in enumerate(zip(needed, inputs, strict=True)) if need and p.is_floating_point())
    if not wanted:
        return [None] * len(inputs)
    found = differentiable(Pullback(function, len(cotangent), wanted), *cotangent, *inputs)
    pulled = dict(zip(wanted, found, strict=True))
    return [pulled.get(i) for i in range(len(inputs))]


def pushed_forward(function: Opaque, tangents: Sequence[Tensor | None], inputs: Tensors) -> Tensors:
    """Return the Jacobian-vector product by the function's own graph, as an opaque call; a tangent of None is zero."""
    moved = {i: t for i, t in enumerate(tangents) if t is not None and inputs[i].is_floating_point()}
    return differentiable(Pushforward(function, tuple(moved)), *moved.values(), *inputs)


def looped(
    functions: Sequence[Opaque], in_dims: Sequence[int | None], inputs: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    """Apply one function to each sample and stack the outputs: this is how vmap treats an opaque function.

    Raises InputError if there are no samples, because the shapes of the outputs are then unknown.
    """
    if not functions:
        raise InputError(
            "vmap over a dimension of size 0: the shape of the state is known only after a call; map over at least one "
            "sample."
        )
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
    """An opaque function made of a Python function that returns a tuple of tensors."""

    function: Function

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the outputs."""
        return self.function(*inputs)


def opaque(function: Function, *tensors: Tensor) -> Tensors:
    """Call a function on plain tensors, below all transforms, such that autograd and torch.func can transform the call.

    Args:
        function: ``function(*tensors)`` returns a tuple of tensors; PyTorch code that may branch on values.
        *tensors: its inputs.

    Returns:
        Its outputs, a tuple of tensors.

    Examples:
        >>> def halved(x):
        ...     return (x / 2 if x.sum() > 0 else x,)
        >>> torch.func.vmap(lambda x: foldopt.transforms.opaque(halved, x)[0])(torch.tensor([[2.0], [-2.0]]))
        tensor([[ 1.],
                [-2.]])
    """
    return differentiable(Plain(function), *tensors)


@dataclass(frozen=True)
class Pullback(Opaque):
    """``Pullback(f, n, wanted)(*cotangent, *inputs)`` pulls cotangents of f's n outputs back to `wanted` inputs."""

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
    """``Pushforward(f, moved)(*tangents, *inputs)`` returns the tangents of f's outputs if the inputs `moved` move."""

    function: Function
    moved: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the tangents of the outputs, differentiable if gradients are being recorded."""
        tangents, inputs = tensors[: len(self.moved)], tensors[len(self.moved) :]
        recorded, create_graph = recorded_call(self.function, inputs, self.moved)
        return pushforward(recorded, [recorded.params[i] for i in self.moved], create_graph)(tangents)


def recorded_call(function: Function, inputs: Tensors, wanted: Sequence[int]) -> tuple[Recorded, bool]:
    """Call a function on aliases of its inputs and record it; also return whether autograd is recording outside.

    The aliases of the `wanted` inputs require a gradient. If autograd is recording outside, aliases stay connected to
    inputs that require a gradient. So the call can be differentiated partially here, and the result in full later.
    """
    going_on = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = tuple(
            t.view_as(t) if going_on and t.requires_grad else t.detach().requires_grad_(i in wanted)
            for i, t in enumerate(inputs)
        )
        return Recorded(function(*leaves), (), leaves), going_on


class Undeclared(TorchFunctionMode):
    """A context that refuses tensors of an outer torch.func transform while a layer runs on plain tensors.

    The solver or the step closed over such a tensor instead of receiving it as a parameter. Without the error its
    derivative would be lost, or the samples of vmap mixed, without any notice.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; raise UndeclaredParameterError if an argument belongs to a transform."""
        if not transforming() and any(isinstance(t, Tensor) and wrapped_by_func(t) for t in leaves((args, kwargs))):
            raise UndeclaredParameterError(
                "the solver or the update step uses a tensor that torch.func differentiates or maps but that was not "
                "passed to the layer, so its derivative would be lost. Pass it as one of the layer's parameters."
            )
        return function(*args, **(kwargs or {}))
