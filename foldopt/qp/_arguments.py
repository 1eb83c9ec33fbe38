"""Checks the arguments of a `QPLayer`, and converts them to the tensors that it computes with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.checks import nonfinite_allowed
from foldopt.errors import InputError
from foldopt.qp._engine import CURVATURE
from foldopt.qp._structure import is_sparse_argument, sparse_argument
from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.step import Tensors

MATRICES = ("Q", "G", "A")
NAMES = ("Q", "p", "G", "h", "A", "b", "lower", "upper")
BOUNDS = ("h", "lower", "upper")  # these may be infinite


class Given(NamedTuple):
    """The converted arguments of a layer.

    params: (Q, p, G, h, A, b, lower, upper) as float64 tensors; in place of sparse Q, G and A their values. dtype: the
    dtype of the result. curvature: the negative curvature of Q that is attributed to rounding. patterns: the sparsity
    patterns of Q, G and A and whether there are bounds; None if all three are dense.
    """

    params: Tensors
    dtype: torch.dtype
    curvature: float
    patterns: tuple[Pattern, Pattern, Pattern, bool] | None


def arguments(*values: Any) -> Given:
    """Check and convert Q, p, G, h, A, b, lower and upper.

    A missing pair G, h or A, b becomes tensors of shape (0, n) and (0,), a missing bound one of shape (0,). If one of
    Q, G and A is sparse, all three are treated as sparse. Raises InputError, which names the argument, its shape or
    value, and the remedy.
    """
    given = dict(zip(NAMES, values, strict=True))
    sparse = any(is_sparse_argument(given[name]) for name in MATRICES)
    like = next((v for v in values if isinstance(v, Tensor)), None)
    found: dict[str, Any] = {
        name: value if is_sparse_argument(value) and name in MATRICES else _tensor(name, value, like)
        for name, value in given.items()
    }
    Q, p = found["Q"], found["p"]
    if Q is None or p is None:
        raise InputError(f"{'Q' if Q is None else 'p'} is None; a quadratic program needs Q and p (zeros are fine).")
    if not p.dim() or not p.shape[-1]:
        raise InputError(f"p has shape {tuple(p.shape)}, expected (n,) or (B, n) with n of at least 1.")
    n = p.shape[-1]
    for rows, right in (("G", "h"), ("A", "b")):
        M, v = found[rows], found[right]
        M = None if M is None or (len(M.shape) < 2 and not M.numel()) or (len(M.shape) > 1 and not M.shape[-2]) else M
        v = None if v is None or not v.dim() or not v.shape[-1] else v
        if (M is None) != (v is None):
            raise InputError(
                f"{rows} is {_shape(found[rows])} but {right} is {_shape(found[right])}; pass both, or neither."
            )
        found[rows] = p.new_zeros(0, n) if M is None else M
        found[right] = p.new_zeros(0) if v is None else v
    for name in ("lower", "upper"):
        bound = found[name]
        found[name] = p.new_zeros(0) if bound is None else bound.expand(n) if not bound.dim() else bound
    _fit({name: tuple(value.shape) for name, value in found.items()})
    patterns = None
    if sparse:
        matrices = {name: sparse_argument(name, found[name], p.device) for name in MATRICES}
        bounded = bool(found["lower"].shape[-1] or found["upper"].shape[-1])
        patterns = (matrices["Q"].pattern, matrices["G"].pattern, matrices["A"].pattern, bounded)
        found |= {name: one.values for name, one in matrices.items()}
    if not nonfinite_allowed():
        _require_numbers(found)
    numbers = [found[name] for name in NAMES if isinstance(given[name], Tensor | SparseMatrix)]
    dtypes = [t.dtype for t in numbers if t.is_floating_point()]
    answer = dtypes[0] if dtypes else torch.get_default_dtype()
    Q = found["Q"]
    rounding = torch.finfo(Q.dtype).eps if Q.is_floating_point() else 0.0
    params = tuple(found[name].to(torch.float64) for name in NAMES)
    return Given(params, answer, max(CURVATURE, 8 * rounding), patterns)


def _tensor(name: str, value: Any, like: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, device=None if like is None else like.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{name} is a {type(value).__name__}, expected a tensor or an array of numbers."
            ) from error
    if value.layout != torch.strided:
        raise InputError(f"{name} is sparse ({value.layout}); only Q, G and A may be, pass {name}.to_dense().")
    if value.is_complex() or value.dtype == torch.bool:
        raise InputError(f"{name} is of dtype {value.dtype}, expected real numbers.")
    if like is not None and value.device != like.device:
        raise InputError(f"{name} is on {value.device}, other arguments are on {like.device}; move them to one device.")
    return value


def _shape(value: Any) -> str:
    return "None" if value is None else f"of shape {tuple(value.shape)}"


def _fit(shapes: dict[str, tuple[int, ...]]) -> None:
    n, m, k = (shapes[name][-1] if shapes[name] else -1 for name in ("p", "h", "b"))
    ends = {
        "Q": (n, n),
        "p": (n,),
        "G": (m, n),
        "h": (m,),
        "A": (k, n),
        "b": (k,),
        "lower": (n,) if 0 not in shapes["lower"] else (0,),
        "upper": (n,) if 0 not in shapes["upper"] else (0,),
    }
    B = max((shape[0] for name, shape in shapes.items() if len(shape) == len(ends[name]) + 1), default=1)
    for name, end in ends.items():
        if shapes[name] not in (end, (B, *end)):
            raise InputError(
                f"{name} has shape {shapes[name]}, expected {end} or {(B, *end)} to go with p of shape {shapes['p']}, "
                f"h of shape {shapes['h']} and b of shape {shapes['b']}."
            )


def _require_numbers(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.detach().sum().isfinite():
            bad = value.isnan() if name in BOUNDS else ~value.isfinite()
            if bad.any():
                where = bad.nonzero()[:10].tolist()
                raise InputError(
                    f"{name} of shape {tuple(value.shape)} holds NaN{'' if name in BOUNDS else ' or inf'}, first at "
                    f"{where}; check the network or the data that made it."
                )
