"""Functions that torch.func and autograd may transform to any order although they run on plain tensors only.

Solvers and update steps branch on data and record graphs of their own, which functions under ``torch.func`` may not.
An `opaque` function runs at the bottom of the stack of transforms, where tensors are plain; its derivatives are opaque
functions again, and vmap runs it once per sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from foldopt.errors import InputError, UndeclaredParameterError
from foldopt.step import Recorded, Tensors, pushforward, vjp_of

Function = Callable[..., Tensors]


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(function: Function, *inputs: Tensor) -> Tensors:
        return tuple(out.clone() if any(out is i for i in inputs) else out for out in function(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, *tensors = inputs
        ctx.n_outputs = len(output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        return (None, *pulled_back(ctx.function, ctx.n_outputs, ctx.needs_input_grad[1:], cotangent, inputs))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensors:
        with outer_tangents(ctx.saved_tensors) as inputs:
            return pushed_forward(ctx.function, tangents, inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Function, *inputs: Tensor) -> tuple[Tensors, Any]:
        return _mapped(function, info.batch_size, in_dims[1:], inputs)


def opaque(function: Function, *tensors: Tensor) -> Tensors:
    """Call `function`, which returns a tuple of tensors, on plain tensors; see the module's docstring."""
    return through_autograds_vmap(
        tensors, lambda *t: _Opaque.apply(function, *t), lambda size, dims, t: _mapped(function, size, dims, t)
    )


def _mapped(
    function: Function, size: int, in_dims: Sequence[int | None], inputs: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    return looped(size, in_dims, inputs, lambda *sample: opaque(function, *sample))


def through_autograds_vmap(
    tensors: Tensors,
    apply: Function,
    mapped: Callable[[int, list[int | None], Tensors], tuple[Tensors, tuple[int, ...]]],
) -> Tensors:
    """Return ``apply(*tensors)``, or what `mapped` makes of tensors that autograd's own vmap has batched.

    That vmap is older than torch.func's and knows nothing of an autograd.Function's ``vmap``. It is the one of
    ``torch.autograd.grad(is_grads_batched=True)``, ``functional.jacobian(vectorize=True)`` and gradcheck.
    """
    dims = [0 if torch._C._functorch.is_legacy_batchedtensor(t) else None for t in tensors]
    if 0 not in dims:
        return apply(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = tuple(
        t if d is None else torch._remove_batch_dim(t, level, 1, 0) for t, d in zip(tensors, dims, strict=True)
    )
    outputs, _ = mapped(len(plain[dims.index(0)]), dims, plain)
    return tuple(torch._add_batch_dim(out, 0, level) for out in outputs)


def looped(
    size: int, in_dims: Sequence[int | None], inputs: Tensors, function: Function
) -> tuple[Tensors, tuple[int, ...]]:
    """Apply `function` to each of `size` samples and stack: what vmap does to an opaque function.

    Raises InputError for no samples, whose outputs have no known shape.
    """
    if size == 0:
        raise InputError("vmap over a dimension of size 0: a layer has to be called once to know its state's shape.")
    samples = [
        function(*(t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return outputs, (0,) * len(outputs)


def pulled_back(
    function: Function, n_outputs: int, needed: Sequence[bool], cotangent: Tensors, inputs: Tensors
) -> list[Tensor | None]:
    """Return the vjp of an opaque function, itself opaque; None for inputs that are not `needed`."""
    wanted = tuple(i for i, (need, p) in enumerate(zip(needed, inputs, strict=True)) if need and p.is_floating_point())
    if not wanted:
        return [None] * len(inputs)
    pulled = dict(zip(wanted, opaque(Pullback(function, n_outputs, wanted), *cotangent, *inputs), strict=True))
    return [pulled.get(i) for i in range(len(inputs))]


def pushed_forward(function: Function, tangents: Sequence[Tensor | None], inputs: Tensors) -> Tensors:
    """Return the jvp of an opaque function, itself opaque; a tangent may be None for zero."""
    moved = tuple(i for i, t in enumerate(tangents) if t is not None and inputs[i].is_floating_point())
    return opaque(
        Pushforward(function, moved), *(t for i, t in enumerate(tangents) if i in moved and t is not None), *inputs
    )


@contextlib.contextmanager
def outer_tangents(saved: Tensors) -> Iterator[Tensors]:
    """Inside of a Function's jvp: give back the saved tensors' tangents of the outer levels of torch.func.

    PyTorch disables those of all levels there, and forward mode over forward mode would be wrong in silence. The
    primal parts have lost their tangents of the level that the jvp is about.
    """
    if not transformed():
        yield saved
        return
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(forward_ad.unpack_dual(t).primal if t.is_floating_point() else t for t in saved)


@dataclass(frozen=True)
class Pullback:
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
class Pushforward:
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


def transformed(*tensors: Tensor) -> bool:
    """Return whether a torch.func transform is under way or autograd's own vmap has batched one of the tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def is_wrapped(t: Tensor) -> bool:
    """Return whether a transform of torch.func, or autograd's own vmap, maps or differentiates this tensor."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """Compute what no transform of torch.func is about, such as indices, on plain tensors."""
    with temporarily_clear_interpreter_stack():
        yield


def plain(*tensors: Tensor) -> bool:
    """Return whether neither a transform nor forward-mode differentiation is under way."""
    return forward_ad._current_level < 0 and not transformed(*tensors)


class Undeclared(TorchFunctionMode):
    """While a layer runs on plain tensors, refuse those of a transform: they were closed over, not passed.

    Without it their derivative would be lost, or vmap's samples mixed, in silence.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `function` unless an argument is a transform's."""
        if not transformed():
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t):
                    raise UndeclaredParameterError(
                        "the solver or the update step uses a tensor that torch.func differentiates or maps but that "
                        "was not passed to the layer, so its derivative would be lost. Pass it as one of the layer's "
                        "parameters."
                    )
        return function(*args, **(kwargs or {}))
