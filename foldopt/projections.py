"""Euclidean projections P(x) = argmin_y |y - x|^2 over y in C, batched, with exact derivatives.

Each sample's active set is found without gradients; on it the projection is a closed form that autograd
differentiates, to any order and in every argument that is a tensor. Where x sits on a boundary between active sets the
derivative is a one-sided one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.errors import InfeasibleError, InputError
from foldopt.solvers.qp import solve_qp


def box(x: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Project on {lower <= y <= upper}; the bounds broadcast against x (B, n).

    Raises InputError where lower exceeds upper.
    """
    lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (lower, upper))
    if (lower > upper).any():
        raise InputError("lower exceeds upper in some entries: the box is empty; swap or widen the bounds.")
    y = torch.where(x > lower, x, lower)  # torch.maximum would mix both sides at a tie
    return torch.where(y < upper, y, upper)


def simplex(x: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """Project on {y >= 0, sum y = total} (Held, Wolfe and Crowder, 1974). x: (B, n). total: number or (B,), above 0."""
    return capped_simplex(x, total, torch.inf)


def capped_simplex(x: Tensor, total: Tensor | float, upper: float = 1.0) -> Tensor:
    """Project on {0 <= y <= upper, sum y = total}: y = clamp(x - theta, 0, upper), theta such that it sums.

    x: (B, n). total: number or (B,), in [0, n * upper]. upper: number above 0, inf for none.

    Raises InputError for a total that no y reaches, with the batch indices.
    """
    if x.dim() != 2:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (B, n).")
    n = x.shape[1]
    if not upper > 0:
        raise InputError(f"upper={upper}: expected a number above 0.")
    total = torch.as_tensor(total, dtype=x.dtype, device=x.device).expand(len(x))
    bad = ((total < 0) | (total > n * upper) | ~total.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise InputError(f"total is outside of [0, {n * upper}] for the samples {bad[:10]}: no point sums to it.")
    with torch.no_grad():
        theta = _threshold(x, total, upper)[:, None]
        full = x - theta >= upper
        free = (x - theta > 0) & ~full
        count = free.sum(1).clamp(min=1).to(x.dtype)
    held = upper * full.sum(1).to(x.dtype) if upper != torch.inf else torch.zeros_like(count)
    theta = (torch.where(free, x, 0).sum(1) + held - total) / count
    y = torch.where(free, x - theta[:, None], 0)
    return torch.where(full, upper, y) if upper != torch.inf else y


def _threshold(x: Tensor, total: Tensor, upper: float) -> Tensor:
    """Return theta with sum clamp(x - theta, 0, upper) = total, exact up to rounding.

    The sum is piecewise linear and falls in theta, with kinks at x and x - upper: sort them, add up the slopes.
    """
    kinks = x if upper == torch.inf else torch.cat([x, x - upper], 1)
    slopes = torch.ones_like(x) if upper == torch.inf else torch.cat([torch.ones_like(x), -torch.ones_like(x)], 1)
    kinks, order = kinks.sort(1, descending=True)
    slope = slopes.gather(1, order).cumsum(1)  # of the sum, going down from kink k to kink k + 1
    gains = slope[:, :-1] * (kinks[:, :-1] - kinks[:, 1:])
    values = torch.cat([torch.zeros_like(kinks[:, :1]), gains.cumsum(1)], 1)  # the sum at each kink
    last = (values <= total[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
    here, rate = kinks.gather(1, last)[:, 0], slope.gather(1, last)[:, 0]
    missing = total - values.gather(1, last)[:, 0]
    return here - torch.where(rate > 0, missing / rate.clamp(min=1), 0)


def affine(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Project on {A y = b}: x - A'(AA')^-1 (Ax - b).

    x: (B, n). A: (p, n) or (B, p, n), of full row rank. b: (p,) or (B, p).

    Raises InputError for shapes that do not fit and for a rank-deficient A.
    """
    A = A.expand(len(x), *A.shape[-2:])
    if A.shape[2] != x.shape[1] or b.shape[-1] != A.shape[1]:
        raise InputError(
            f"A has shape {tuple(A.shape[-2:])}, b {tuple(b.shape)}, x {tuple(x.shape)}: expected (p, n), (p,), (B, n)."
        )
    gram = A @ A.mT
    root, info = torch.linalg.cholesky_ex(gram)
    pivots = root.diagonal(dim1=1, dim2=2)
    if (info > 0).any() or (pivots.amin(1) <= 1e-7 * pivots.amax(1)).any():
        raise InputError("A has linearly dependent rows; drop the redundant ones.")
    residual = torch.einsum("bpn,bn->bp", A, x) - b
    return x - torch.einsum("bpn,bp->bn", A, torch.cholesky_solve(residual[:, :, None], root)[:, :, 0])


def half_space(x: Tensor, a: Tensor, b: Tensor | float) -> Tensor:
    """Project on {a'y <= b}: x - max(a'x - b, 0) a / |a|^2. x: (B, n). a: (n,) or (B, n), not 0. b: number or (B,)."""
    a = a.expand_as(x)
    excess = ((a * x).sum(1) - b).clamp(min=0)
    return x - (excess / a.square().sum(1))[:, None] * a


def second_order_cone(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Project (x, t) on {|y| <= s} (Boyd and Vandenberghe, Convex Optimization, 8.1). x: (B, n). t: (B,)."""
    norm = torch.linalg.vector_norm(x, dim=1)
    safe = torch.where(norm > 0, norm, 1.0)
    inside, polar = norm <= t, norm <= -t
    scale = torch.where(inside, 1.0, torch.where(polar, 0.0, (1 + t / safe) / 2))
    height = torch.where(inside, t, torch.where(polar, 0.0, (norm + t) / 2))
    return scale[:, None] * x, height


def polyhedron(x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """Project on {A y = b, G y <= h} by a batched QP. x: (B, n). A: (p, n), b: (p,), G: (m, n), h: (m,), or batched.

    Raises InfeasibleError with the batch indices where the set is empty, InputError for shapes that do not fit.
    """
    B, n = x.shape
    identity = torch.eye(n, dtype=x.dtype, device=x.device).expand(B, n, n)
    A, G = (M.expand(B, *M.shape[-2:]) for M in (A, G))
    b, h = (v.expand(B, v.shape[-1]) for v in (b, h))
    found = solve_qp(identity, -x, A, b, G, h)
    bad = (~found.ok).nonzero()[:, 0].tolist()
    if bad:
        raise InfeasibleError(f"no point satisfies A y = b, G y <= h for the samples {bad[:10]}; relax them.", bad)
    return found.x
