"""A batched primal-dual interior point for convex quadratic programs with linear and quadratic constraints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.errors import InputError

__all__ = ["QuadraticConstraints", "Solution", "largest", "solve_qcqp", "unit"]

QuadraticConstraints = tuple[Tensor, Tensor, Tensor]


class Solution(NamedTuple):
    """What the solver found, per sample.

    x: (B, n). equality_dual: (B, p). inequality_dual: (B, k + m) >= 0, the quadratic constraints first.
    iterations: (B,) int. ok: (B,) bool, the scaled KKT residual is under tolerance. residual: (B,), that residual.
    """

    x: Tensor
    equality_dual: Tensor
    inequality_dual: Tensor
    iterations: Tensor
    ok: Tensor
    residual: Tensor


def solve_qcqp(
    H: Tensor,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    quadratic: QuadraticConstraints | None = None,
    *,
    tol: float = 1e-10,
    max_iter: int = 60,
) -> Solution:
    """Minimize 0.5 x'Hx + q'x subject to Ax = b, Gx <= h and 0.5 x'Q_j x + r_j'x <= s_j, for every sample.

    Args:
        H: (B, n, n), positive semidefinite. q: (B, n). A: (B, p, n). b: (B, p). G: (B, m, n). h: (B, m).
        quadratic: Q (B, k, n, n) positive semidefinite, r (B, k, n), s (B, k).
            Every argument but q may lack the batch dimension, or be None where optional.
        tol: largest KKT residual, relative to the data and the iterate, that counts as solved.
        max_iter: cap of Newton steps.

    Returns float64 results. Infeasible, unbounded or numerically failing samples come back with ok=False and leave the
    others alone. Mehrotra's predictor-corrector with one step length per sample (Nocedal and Wright, ch. 16 and 19),
    the corrector weighted by the predictor's step, without which it cycles on badly centred iterates (Colombo and
    Gondzio, 2008).

    Raises InputError for shapes that do not fit.
    """
    H, q, A, b, G, h, (Q, r, s) = _prepare(H, q, A, b, G, h, quadratic)
    B, n = q.shape
    p, k, m = b.shape[1], s.shape[1], h.shape[1]
    u = q.new_ones(B, 1) if k else unit(H, q, b, h)
    q, b, h = q / u, b / u, h / u
    x, nu = q.new_zeros(B, n), q.new_zeros(B, p)
    lam, slack = q.new_ones(B, k + m), q.new_ones(B, k + m)
    limits = torch.cat([s, h], 1)
    if k + m:
        slack = torch.maximum(limits, slack)
    cost, curvature = largest(q), H.flatten(1).abs().amax(1)
    cost = torch.where(cost > 0, cost, torch.where(curvature > 0, curvature, 1.0))
    lam = lam * cost[:, None]
    primal_scale = 1 + torch.maximum(largest(b), largest(limits))
    iterations = torch.zeros(B, dtype=torch.long, device=q.device)
    active = torch.ones(B, dtype=torch.bool, device=q.device)
    residual = q.new_full((B,), torch.inf)
    best = (x, nu, lam)
    for step in range(max_iter + 1):
        Qx = torch.einsum("bkij,bj->bki", Q, x)
        J = torch.cat([Qx + r, G], 1)
        values = torch.cat([matvec(0.5 * Qx + r, x), matvec(G, x)], 1)
        Hx = matvec(H, x)
        rd = Hx + q + matvec(A.mT, nu) + matvec(J.mT, lam)
        rp = matvec(A, x) - b
        ri = values + slack - limits
        gap = (lam * slack).sum(1)
        dual_scale = cost + largest(Hx) + largest(lam)
        size = primal_scale + largest(x)
        now = torch.stack(
            [largest(rd) / dual_scale, largest(rp) / size, largest(ri) / size, gap / (dual_scale * size)]
        ).amax(0)
        now = now.nan_to_num(nan=torch.inf)
        better = active & (now < residual)
        keep = better[:, None]
        best = torch.where(keep, x, best[0]), torch.where(keep, nu, best[1]), torch.where(keep, lam, best[2])
        residual = torch.where(better, now, residual)
        active = active & (now > tol) & now.isfinite()
        if step == max_iter or not active.any():
            break
        iterations = iterations + active
        hessian = H + torch.einsum("bk,bkij->bij", lam[:, :k], Q)
        newton = _Newton(hessian, A, J, lam, slack)
        dx, dnu, dlam, ds = newton.direction(rd, rp, ri, lam * slack)
        if k + m:
            mu = gap / (k + m)
            a = torch.minimum(_longest(lam, dlam), _longest(slack, ds))
            mu_affine = ((lam + a[:, None] * dlam) * (slack + a[:, None] * ds)).sum(1) / (k + m)
            floor = 0.01 * tol * dual_scale * size / (k + m)  # complementarity must not run ahead of feasibility
            centre = ((mu_affine / mu) ** 3 * mu).maximum(floor)[:, None]
            dx, dnu, dlam, ds = newton.direction(rd, rp, ri, lam * slack + a[:, None] * dlam * ds - centre)
        fraction = 0.995 if k + m else 1.0
        a = fraction * torch.minimum(_longest(lam, dlam), _longest(slack, ds))[:, None]
        x, nu, lam, slack = (
            torch.where(active[:, None], value + a * change, value)
            for value, change in ((x, dx), (nu, dnu), (lam, dlam), (slack, ds))
        )
    return Solution(u * best[0], u * best[1], u * best[2], iterations, residual <= tol, residual)


class _Newton:
    """The Newton system of one iterate, reduced to (x, nu) and factored once for predictor and corrector."""

    def __init__(self, H: Tensor, A: Tensor, J: Tensor, lam: Tensor, slack: Tensor) -> None:
        self.J, self.lam, self.slack, self.n = J, lam, slack, H.shape[1]
        self.ratio = lam / slack
        reduced = H + torch.einsum("bmi,bm,bmj->bij", J, self.ratio, J)
        if A.shape[1]:
            corner = A.new_zeros(len(A), A.shape[1], A.shape[1])
            reduced = torch.cat([torch.cat([reduced, A.mT], 2), torch.cat([A, corner], 2)], 1)
        self.lu, self.pivots, _ = lu_factor(reduced)

    def direction(self, rd: Tensor, rp: Tensor, ri: Tensor, rc: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the step (dx, dnu, dlam, dslack) for the residuals and complementarity lam * slack - target."""
        weighted = self.ratio * ri - rc / self.slack
        rhs = -torch.cat([rd + matvec(self.J.mT, weighted), rp], 1)
        step = torch.linalg.lu_solve(self.lu, self.pivots, rhs[:, :, None])[:, :, 0]
        dx, dnu = step[:, : self.n], step[:, self.n :]
        ds = -ri - matvec(self.J, dx)
        return dx, dnu, -(rc + self.lam * ds) / self.slack, ds


def _longest(value: Tensor, change: Tensor) -> Tensor:
    """Return the largest step in [0, 1] that keeps value + step * change >= 0."""
    if not value.shape[1]:
        return value.new_ones(len(value))
    ratio = torch.where(change < 0, -value / change, torch.inf)
    return ratio.amin(1).clamp(max=1)


def largest(a: Tensor) -> Tensor:
    """Return the largest absolute entry of each row of a (B, n), 0 where n = 0."""
    return a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))


def unit(H: Tensor, q: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Return the size of x in which each program is solved, (B, 1): a power of 2 where its data are small, else 1.

    Residuals are relative to 1 + |x|, so that without it programs in small units would seem solved where they are not.
    """
    with torch.no_grad():
        curvature = H.flatten(1).abs().amax(1)
        free = torch.where(curvature > 0, largest(q) / curvature, 0)
        size = torch.stack([free, largest(b), largest(h)]).amax(0)
        power = torch.exp2(size.log2().round())
        return torch.where((size < 1e-3) & (size > 1e-30), power, 1.0).to(q)[:, None]


def _prepare(
    H: Tensor,
    q: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    quadratic: QuadraticConstraints | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, QuadraticConstraints]:
    """Cast to float64, fill absent constraints with empty ones, expand over the batch, check shapes."""
    if q.dim() != 2:
        raise InputError(f"q has shape {tuple(q.shape)}, expected (B, n).")
    q = q.double()
    B, n = q.shape
    if (A is None) != (b is None) or (G is None) != (h is None):
        raise InputError("pass A together with b, and G together with h.")
    A, b = (q.new_zeros(0, n), q.new_zeros(0)) if A is None or b is None else (A.double(), b.double())
    G, h = (q.new_zeros(0, n), q.new_zeros(0)) if G is None or h is None else (G.double(), h.double())
    Q, r, s = (
        (q.new_zeros(0, n, n), q.new_zeros(0, n), q.new_zeros(0))
        if quadratic is None
        else tuple(t.double() for t in quadratic)
    )
    p, m, k = b.shape[-1], h.shape[-1], s.shape[-1]
    expanded = []
    for name, value, shape in (
        ("H", H.double(), (n, n)),
        ("A", A, (p, n)),
        ("b", b, (p,)),
        ("G", G, (m, n)),
        ("h", h, (m,)),
        ("Q", Q, (k, n, n)),
        ("r", r, (k, n)),
        ("s", s, (k,)),
    ):
        if tuple(value.shape) not in (shape, (B, *shape)):
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected {shape} or {(B, *shape)} to go with q.")
        expanded.append(value.expand(B, *shape))
    H, A, b, G, h, Q, r, s = expanded
    return H, q, A, b, G, h, (Q, r, s)
