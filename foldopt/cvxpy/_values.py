"""Checks the tensors of a layer's parameters, and extracts the entries that the canonical form needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foldopt.checks import nonfinite_allowed
from foldopt.cvxpy._canonical import Input
from foldopt.errors import InputError
from foldopt.step import Tensors

_SYMMETRY = 1e-9  # accepted difference of X and X', and negative eigenvalue, relative to the largest entry


def lowered(inputs: Sequence[Input], indices: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensors, bool]:
    """Return the entries of the parameters that the canonical form needs, and whether any tensor has a batch.

    The entries are (B, k) or (k,) for each parameter, in float64, on the CPU and differentiable in `tensors`. A tensor
    of its parameter's shape is shared by the batch. Raises InputError if the number of tensors, a shape or a dtype is
    wrong, or a value is not what the parameter was declared to be.
    """
    if len(tensors) != len(inputs):
        names = ", ".join(one.name for one in inputs)
        raise InputError(f"the layer was called with {len(tensors)} tensors, expected {len(inputs)}: {names}.")
    sizes: dict[str, int] = {}
    out = []
    for one, index, value in zip(inputs, indices, tensors, strict=True):
        if not isinstance(value, Tensor):
            raise InputError(
                f"parameter {one.name} is a {type(value).__name__}, expected a tensor; convert it by torch.as_tensor."
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"parameter {one.name} is of dtype {value.dtype}, expected real numbers.")
        batched = value.dim() == len(one.shape) + 1
        if tuple(value.shape)[batched:] != one.shape:
            raise InputError(
                f"parameter {one.name} has shape {tuple(value.shape)}, expected {one.shape} or {('B', *one.shape)}."
            )
        if batched:
            sizes[one.name] = len(value)
        value = value.to("cpu", torch.float64)
        if not nonfinite_allowed():
            require_attributes(one, value.detach())
        if one.symmetric:
            value = (value + value.mT) / 2
        value = value.reshape(*value.shape[:batched], -1)[..., index]
        out.append(value.log() if one.logged else value)
    if len(set(sizes.values())) > 1:
        raise InputError(f"parameters have different batch sizes: {sizes}; use one size, or leave out the dimension.")
    return tuple(out), bool(sizes)


def require_attributes(one: Input, value: Tensor) -> None:
    """Raise InputError unless a parameter's values are finite and have the properties that it was declared to have.

    CVXPY has shown the problem to be convex for such values only.
    """
    rules = {"finite": _RULES["finite"]} | {name: _RULES[name] for name in one.attributes if name in _RULES}
    rules |= {"pos": _RULES["pos"]} if one.logged else {}
    for name, (holds, remedy) in rules.items():
        good = holds(value)
        if not bool(good.all()):
            bad = (~good).nonzero()[:, 0].tolist() if good.dim() else []
            where = f" in samples {bad[:10]}" if bad and value.dim() > len(one.shape) else ""
            raise InputError(
                f"parameter {one.name} of shape {tuple(value.shape)} is not {name}{where}"
                f"{'' if name == 'finite' else f', as it was declared ({name}=True)'}; {remedy}."
            )


def _each(value: Tensor, holds: Tensor) -> Tensor:
    return holds.flatten(1).all(1) if holds.dim() > 1 else holds


def _symmetric(value: Tensor) -> Tensor:
    size = value.abs().amax((-2, -1), keepdim=True)
    return ((value - value.mT).abs() <= _SYMMETRY * size).all(-1).all(-1)


def _semidefinite(value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        return value.isfinite().all(-1).all(-1)
    least = torch.linalg.eigvalsh((value + value.mT) / 2)[..., 0]
    return (least >= -_SYMMETRY * value.abs().amax((-2, -1))) & _symmetric(value)


def _diagonal(value: Tensor) -> Tensor:
    return (value == torch.diag_embed(value.diagonal(dim1=-2, dim2=-1))).all(-1).all(-1)


_SIGN = "clamp it, or apply softplus or exp to the output of the network"
_RULES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "finite": (lambda v: _each(v, v.isfinite()), "check the network or the data from which it comes"),
    "nonneg": (lambda v: _each(v, v >= 0), _SIGN),
    "pos": (lambda v: _each(v, v > 0), _SIGN),
    "nonpos": (lambda v: _each(v, v <= 0), _SIGN),
    "neg": (lambda v: _each(v, v < 0), _SIGN),
    "symmetric": (_symmetric, "pass (X + X.mT) / 2"),
    "PSD": (_semidefinite, "pass X @ X.mT, which always is"),
    "NSD": (lambda v: _semidefinite(-v), "pass -X @ X.mT, which always is"),
    "diag": (_diagonal, "pass torch.diag_embed of its diagonal"),
}
