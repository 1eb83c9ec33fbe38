"""All private names of PyTorch that foldopt uses, one function for each: a new torch can break only this file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

__all__ = [
    "Mapped",
    "Tensors",
    "batched_by_autograd",
    "leaves",
    "outer_tangents",
    "parameters_replaced",
    "plain",
    "through_autograds_vmap",
    "transforming",
    "untransformed",
    "version",
    "wrapped_by_func",
]

Tensors = tuple[Tensor, ...]
Mapped = Callable[[int, list[int | None], Tensors], tuple[Tensors, tuple[int, ...]]]


def transforming(*tensors: Tensor) -> bool:
    """Return whether a transform of torch.func is running, or autograd's own vmap has batched one of the tensors.

    Args:
        *tensors: tensors to look at; default none, which looks for a running transform only.

    Returns:
        True or False.

    Examples:
        >>> foldopt.transforms.transforming(torch.zeros(1))
        False
    """
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or any(map(functorch.is_legacy_batchedtensor, tensors))


def plain(*tensors: Tensor) -> bool:
    """Return whether neither a transform of torch.func nor forward-mode differentiation is running.

    Args:
        *tensors: tensors to look at; default none.

    Returns:
        True or False.

    Examples:
        >>> foldopt.transforms.plain(torch.zeros(1))
        True
    """
    functorch = torch._C._functorch
    return (
        forward_ad._current_level < 0
        and functorch.peek_interpreter_stack() is None
        and not any(map(functorch.is_legacy_batchedtensor, tensors))
    )


def wrapped_by_func(t: Tensor) -> bool:
    """Return whether a transform of torch.func maps or differentiates this tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def batched_by_autograd(t: Tensor) -> bool:
    """Return whether autograd's own vmap has batched this tensor; see `through_autograds_vmap`."""
    return torch._C._functorch.is_legacy_batchedtensor(t)


def through_autograds_vmap(tensors: Tensors, apply: Callable[..., Tensors], mapped: Mapped) -> Tensors:
    """Return ``apply(*tensors)``, or the outputs of `mapped` if autograd's own vmap has batched some of the tensors.

    That vmap is older than torch.func's and ignores the ``vmap`` of an autograd.Function. These public functions use
    it: ``torch.autograd.grad(is_grads_batched=True)``, ``torch.autograd.functional.jacobian(vectorize=True)`` and
    ``hessian(vectorize=True)``, ``torch.autograd.gradcheck(check_batched_grad=True)``.
    """
    dims = [0 if batched_by_autograd(t) else None for t in tensors]
    if 0 not in dims:
        return apply(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = tuple(
        t if d is None else torch._remove_batch_dim(t, level, 1, 0) for t, d in zip(tensors, dims, strict=True)
    )
    outputs, _ = mapped(len(plain[dims.index(0)]), dims, plain)
    return tuple(torch._add_batch_dim(out, 0, level) for out in outputs)


@contextlib.contextmanager
def outer_tangents(saved: Tensors) -> Iterator[Tensors]:
    """Inside the jvp of an autograd Function: give the saved tensors back their tangents of outer torch.func levels.

    PyTorch disables the tangents of all levels there, and forward mode over forward mode would then be wrong without
    any notice. The primal parts have lost only their tangents of the level that this jvp belongs to.
    """
    if not transforming():
        yield saved
        return
    with forward_ad._set_fwd_grad_enabled(True):
        yield tuple(forward_ad.unpack_dual(t).primal if t.is_floating_point() else t for t in saved)


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """Return a context for computing, on plain tensors, values that no transform differentiates, such as indices."""
    with temporarily_clear_interpreter_stack():
        yield


def leaves(tree: Any) -> list[Any]:
    """Return the objects inside nested tuples, lists and dictionaries."""
    return tree_leaves(tree)


@contextlib.contextmanager
def parameters_replaced(modules: nn.Module, names: Sequence[str], values: Sequence[Tensor]) -> Iterator[None]:
    """Return a context in which the named parameters of `modules` are replaced by `values`.

    torch.func.functional_call would leave its tensors behind in a module that it reaches by two names.
    """
    current = dict(modules.named_parameters())
    new = {id(current[name]): value for name, value in zip(names, values, strict=True)}
    slots: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, p)
        for module in modules.modules()
        for name, p in module._parameters.items()
        if id(p) in new
    ]
    try:
        for slot, name, p in slots:
            slot[name] = new[id(p)]
        yield
    finally:
        for slot, name, p in slots:
            slot[name] = p


def version(t: Tensor) -> int:
    """Return how often the memory of a tensor has been written to; inference tensors have no such count."""
    return t._version
