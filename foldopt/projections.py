"""Euclidean projections P(x) = argmin_y |y - x|^2 over y in C, for batches, with exact derivatives.

The active set of each sample is found without gradients. On that set the projection is a closed form, which autograd
differentiates to any order and in every tensor argument. Where x lies on the boundary between two active sets, the
derivative is the one-sided one of the active set that was taken.

NaN and inf in the arguments raise `InputError`, except inside a layer's step: there the sample comes out as NaN, the
others are unharmed, and the layer reports it. Results are exact up to rounding relative to the largest entry of the
arguments; sums and bounds hold up to rounding whatever their scale. Every transform of torch.func works, in every
tensor argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldopt._compat import plain, transforming
from foldopt.batched import matvec
from foldopt.checks import nonfinite_allowed, require_finite
from foldopt.errors import InfeasibleError, InputError
from foldopt.solvers.qp import solve_qp
from foldopt.transforms import opaque

__all__ = ["affine", "box", "capped_simplex", "half_space", "polyhedron", "second_order_cone", "simplex"]


def __dir__() -> list[str]:
    return __all__


class _OnValues(torch.autograd.Function):
    """Run ``_require`` under torch.func, on plain values; the outermost mapped dimension comes first."""

    @staticmethod
    def forward(fine: Tensor, message: str) -> Tensor:
        _require(fine, message)
        return fine.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], fine: Tensor, message: str) -> tuple[Tensor, int]:
        return _OnValues.apply(fine.movedim(in_dims[0], 0), message), 0


def _require(fine: Tensor, message: str) -> None:
    """Raise InputError unless `fine` is true everywhere; ``{bad}`` in the message becomes where it is false."""
    if transforming():  # torch.func hides the values
        _OnValues.apply(fine, message)
    elif not fine.all():
        bad = [at[0] if len(at) == 1 else tuple(at) for at in (~fine).nonzero()[:10].tolist()]
        raise InputError(message.format(bad=bad))


def _tensor(value: Any, x: Tensor) -> Tensor:
    """Return `value` as a tensor of the dtype and device of x; tensors in a list keep their gradients."""
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        value = torch.stack([_tensor(part, x) for part in value])
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def box(x: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Project on the box {lower <= y <= upper}.

    Args:
        x: points (B, n).
        lower: lower bounds: a number, or a tensor that broadcasts against x; -inf for none.
        upper: upper bounds, as lower; inf for none.

    Returns:
        Tensor (B, n). At a bound the derivative is that of the bound.

    Raises:
        InputError: lower exceeds upper, a bound is NaN, or x holds NaN or inf.

    Examples:
        >>> foldopt.projections.box(torch.tensor([[-1.0, 0.5, 3.0]]), 0.0, 1.0)
        tensor([[0.0000, 0.5000, 1.0000]])
    """
    require_finite(x=x)
    lower, upper = _tensor(lower, x), _tensor(upper, x)
    _require(
        (lower <= upper) & (lower < torch.inf) & (upper > -torch.inf),
        "lower exceeds upper, or is NaN, in some entries: the box is empty; swap or widen the bounds.",
    )
    y = torch.where(x <= lower, lower, x)  # torch.maximum would mix both sides at a tie
    return torch.where(y >= upper, upper, y)


def simplex(x: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """Project on the simplex {y >= 0, sum y = total}.

    Args:
        x: points (B, n).
        total: the sum, at least 0: a number or a tensor (B,); default 1.

    Returns:
        Tensor (B, n).

    Raises:
        InputError: total is negative or not finite, or x is not (B, n) or holds NaN or inf.

    Source: Held, Wolfe and Crowder, Validation of subgradient optimization (1974).

    Examples:
        >>> foldopt.projections.simplex(torch.tensor([[0.8, 0.6, -1.0]]))
        tensor([[0.6000, 0.4000, 0.0000]])
    """
    return capped_simplex(x, total, torch.inf)


def capped_simplex(x: Tensor, total: Tensor | float, upper: float = 1.0, *, near: Tensor | None = None) -> Tensor:
    """Project on {0 <= y <= upper, sum y = total}.

    The projection is y = clamp(x - theta, 0, upper), where the number theta makes the entries sum to the total.

    Args:
        x: points (B, n).
        total: the sum, from 0 to n * upper: a number or a tensor (B,).
        upper: upper bound, a number above 0 for all samples; inf for none; default 1.
        near: guess of the result (B, n), such as the point from which a step moved. If its entries at the bounds are
            those of the result, most of the work is saved. It never changes the result.

    Returns:
        Tensor (B, n).

    Raises:
        InputError: no point sums to total (the samples are listed), upper is not a number above 0, or x is not (B, n)
            or holds NaN or inf.

    Examples:
        >>> foldopt.projections.capped_simplex(torch.tensor([[2.0, 0.5, 0.0]]), 2.0)
        tensor([[1.0000, 0.7500, 0.2500]])
    """
    if x.dim() != 2:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (B, n).")
    require_finite(x=x)
    n = x.shape[1]
    if isinstance(upper, Tensor):
        if upper.dim() > 0 or upper.requires_grad or not plain(upper):
            raise InputError(
                "upper is a tensor; expected a number, which all samples share and which has no derivative."
            )
        upper = float(upper)
    if not upper > 0:
        raise InputError(f"upper={upper}: expected a number above 0.")
    if isinstance(total, int | float):  # as_tensor would copy it to a GPU and wait
        total = torch.full((), total, dtype=x.dtype, device=x.device)
    total = _tensor(total, x).expand(len(x))
    if near is not None and not transforming():  # torch.func hides the values that judge a guess
        y = _guessed(x, total, upper, near)
        if y is not None:  # a point with this sum exists, so the check below is not needed
            return y
    _require(
        (total >= 0) & (total <= n * upper) & (total < torch.inf),
        f"total is outside of [0, {n * upper}] for the samples {{bad}}: no point sums to it.",
    )
    with torch.no_grad():
        kink, below = _threshold(x, total, upper)
    z = x - kink[:, None]  # after this shift theta is as small as the total, however large x is
    with torch.no_grad():
        for _ in range(2):
            free, full = _free_and_full(z + below[:, None], upper)
            excess = _excess(z + below[:, None], free, _missing(total, full, upper))
            below = torch.where(free.any(1), below - excess, below)
    z = z + below[:, None]
    with torch.no_grad():
        free, full = _free_and_full(z, upper)
        finite = x.isfinite().all(1)[:, None]
        bound = torch.where(finite, _at_bounds(x, full, upper), torch.nan)
    excess = _excess(z, free, _missing(total, full, upper))
    return torch.where(free & finite, (z - excess[:, None]).clamp(min=0), bound)


def _free_and_full(y: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """Return which entries are strictly between the bounds, and which at or above the upper one, (B, n) bool."""
    full = y >= upper
    return (y > 0) & ~full, full


def _missing(total: Tensor, full: Tensor, upper: float) -> Tensor:
    """Return the sum that the free entries must have, (B,)."""
    return total - upper * full.sum(1, dtype=total.dtype) if upper != torch.inf else total


def _at_bounds(x: Tensor, full: Tensor, upper: float) -> Tensor:
    """Return the upper bound where full, else 0, in the dtype of x, (B, n)."""
    return full.to(x.dtype) * upper if upper != torch.inf else torch.zeros_like(x)


def _excess(z: Tensor, free: Tensor, missing: Tensor) -> Tensor:
    """Return the amount by which each free entry of z must fall so that they sum to `missing`, (B,)."""
    return (torch.where(free, z, 0).sum(1) - missing) / free.sum(1).clamp(min=1)


def _guessed(x: Tensor, total: Tensor, upper: float, near: Tensor) -> Tensor | None:
    """Return y if its free and full entries are those of `near` in every row, else None."""
    with torch.no_grad():
        free, full = _free_and_full(near, upper)
        some = free.any(1)
        kink = torch.where(torch.where(some[:, None], free, full), x, torch.inf).amin(1, keepdim=True)
    missing = _missing(total, full, upper)
    vertex = ~some & (missing == 0)
    missing = torch.where(vertex, upper, missing)  # at a vertex the smallest full entry is exactly at its bound
    z = x - kink
    moved = z - _excess(z, free, missing)[:, None]
    y = torch.where(free, moved, _at_bounds(x, full, upper))
    with torch.no_grad():
        right = torch.where(free, (y > 0) & (y < upper), moved.clamp(0, upper) == y) & (some | vertex)[:, None]
        if not right.all():
            return None
    return y


def _threshold(x: Tensor, total: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """Return an entry of x and a number whose difference theta solves sum clamp(x - theta, 0, upper) = total.

    The sum is piecewise linear and falls with theta, with kinks at x and at x - upper: the kinks are sorted and the
    slopes added up. Each kink is stored as its entry of x and the distance below it, because an upper that is small
    beside x would be lost to rounding in x - upper.
    """
    capped = upper != torch.inf
    base = torch.cat([x, x], 1) if capped else x
    depth = torch.cat([torch.zeros_like(x), torch.full_like(x, upper)], 1) if capped else torch.zeros_like(x)
    slopes = torch.cat([torch.ones_like(x), -torch.ones_like(x)], 1) if capped else torch.ones_like(x)
    order = (base - depth).sort(dim=1, descending=True, stable=True)[1]
    base, depth, slope = base.gather(1, order), depth.gather(1, order), slopes.gather(1, order).cumsum(1)
    gains = slope[:, :-1] * ((base[:, :-1] - base[:, 1:]) + (depth[:, 1:] - depth[:, :-1]))
    values = torch.cat([torch.zeros_like(base[:, :1]), gains.cumsum(1)], 1)  # the sum of the entries at each kink
    last = (values <= total[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
    kink, rate = base.gather(1, last)[:, 0], slope.gather(1, last)[:, 0]  # rate: slope from this kink down to the next
    missing = total - values.gather(1, last)[:, 0]
    return kink, depth.gather(1, last)[:, 0] + torch.where(rate > 0, missing / rate.clamp(min=1), 0)


def affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Project on the affine set {A y = b}: x - A'(AA')^-1 (Ax - b).

    Args:
        x: points (B, n).
        A: matrix (p, n) or (B, p, n), of full row rank.
        b: right-hand side (p,) or (B, p).

    Returns:
        Tensor (B, n).

    Raises:
        InputError: shapes do not fit, the rows of A are linearly dependent, or an argument holds NaN or inf.

    Examples:
        >>> foldopt.projections.affine(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.ones(1))
        tensor([[0., 1.]])
    """
    A = A.expand(len(x), *A.shape[-2:])
    if A.shape[2] != x.shape[1] or b.shape[-1] != A.shape[1]:
        raise InputError(
            f"A has shape {tuple(A.shape[-2:])}, b {tuple(b.shape)}, x {tuple(x.shape)}: expected (p, n), (p,), (B, n)."
        )
    require_finite(x=x, A=A, b=b)
    size = A.detach().abs().amax(2)
    A, b = A / size[:, :, None], b / size  # rows of equal length, by which the rank is judged
    gram = A @ A.mT
    root, info = torch.linalg.cholesky_ex(gram)
    pivots = root.diagonal(dim1=1, dim2=2)
    _require(
        (info == 0) & (pivots.amin(1) > 1e-7 * pivots.amax(1)),
        "A has linearly dependent rows; drop the redundant ones.",
    )
    residual = matvec(A, x) - b
    return x - matvec(A.mT, torch.cholesky_solve(residual[:, :, None], root)[:, :, 0])


def half_space(x: Tensor, a: Tensor, b: Tensor | float) -> Tensor:
    """Project on the half-space {a'y <= b}: x - max(a'x - b, 0) a / |a|^2.

    Args:
        x: points (B, n).
        a: normal vectors (n,) or (B, n), not 0.
        b: limits, a number or a tensor (B,).

    Returns:
        Tensor (B, n).

    Raises:
        InputError: a is 0 in some sample, or an argument holds NaN or inf.

    Examples:
        >>> foldopt.projections.half_space(torch.tensor([[2.0, 2.0]]), torch.tensor([1.0, 1.0]), 2.0)
        tensor([[1., 1.]])
    """
    require_finite(x=x, a=a, b=b)
    b = b if isinstance(b, int | float) else _tensor(b, x)
    size = a.detach().abs().amax(-1, keepdim=True)
    _require(size > 0, "a is 0 in some samples, which bounds nothing; drop them or give it a direction.")
    a, b = (a / size).expand_as(x), b / size[..., 0]
    excess = ((a * x).sum(1) - b).clamp(min=0)
    return x - (excess / a.square().sum(1))[:, None] * a


def second_order_cone(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Project (x, t) on the second-order cone {(y, s): |y| <= s}.

    Args:
        x: vector parts (B, n).
        t: scalar parts (B,).

    Returns:
        The projected parts: y (B, n) and s (B,).

    Raises:
        InputError: an argument holds NaN or inf.

    Source: Boyd and Vandenberghe, Convex Optimization (2004), section 8.1.

    Examples:
        >>> foldopt.projections.second_order_cone(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0]))
        (tensor([[1.8000, 2.4000]]), tensor([3.]))
    """
    require_finite(x=x, t=t)
    norm = torch.linalg.vector_norm(x, dim=1)
    safe = torch.where(norm > 0, norm, 1.0)
    inside, polar = norm <= t, norm <= -t
    scale = torch.where(inside, 1.0, torch.where(polar, 0.0, (1 + t / safe) / 2))
    height = torch.where(inside, t, torch.where(polar, 0.0, (norm + t) / 2))
    return scale[:, None] * x, height


def polyhedron(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """Project on the polyhedron {A y = b, G y <= h} by a batched quadratic program.

    Args:
        x: points (B, n).
        A: matrix (p, n) or (B, p, n); (0, n) for no equalities.
        b: right-hand side (p,) or (B, p).
        G: matrix (m, n) or (B, m, n); (0, n) for no inequalities.
        h: limits (m,) or (B, m).

    Returns:
        Tensor (B, n). torch.func.vmap runs the program once per sample.

    Raises:
        InfeasibleError: the set is empty for the samples that are listed.
        InputError: shapes do not fit, or an argument holds NaN or inf.

    Examples:
        >>> G, h = torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
        >>> foldopt.projections.polyhedron(torch.tensor([[2.0, 2.0]]), torch.zeros(0, 2), torch.zeros(0), G, h)
        tensor([[1., 1.]])
    """
    data = x, A, b, G, h
    return _on_polyhedron(*data)[0] if plain(*data) else opaque(_on_polyhedron, *data)[0]


def _on_polyhedron(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor]:
    """Return the projection as a tuple of one tensor, as an opaque function must; see `foldopt.transforms`."""
    require_finite(x=x, A=A, b=b, G=G, h=h)
    B, n = x.shape
    identity = torch.eye(n, dtype=x.dtype, device=x.device).expand(B, n, n)
    A, G = (M.expand(B, *M.shape[-2:]) for M in (A, G))
    b, h = (v.expand(B, v.shape[-1]) for v in (b, h))
    found = solve_qp(identity, -x, A, b, G, h)
    bad = (~found.ok).nonzero()[:, 0].tolist()
    if bad and not nonfinite_allowed():
        raise InfeasibleError(f"no point satisfies A y = b, G y <= h for the samples {bad[:10]}; relax them.", bad)
    return (found.x,)
