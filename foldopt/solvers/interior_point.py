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
    """The result of a solver of quadratic programs, per sample.

    Attributes:
        x: solution, (B, n).
        equality_dual: multipliers of the equalities, (B, p).
        inequality_dual: multipliers of the inequalities, (B, k + m), at least 0, the quadratic constraints first.
        iterations: (B,) int.
        ok: (B,) bool, whether the scaled KKT residual is within tolerance.
        residual: that residual, (B,).

    Examples:
        >>> solution = foldopt.solvers.interior_point.solve_qcqp(torch.eye(1), torch.tensor([[-2.0]]))
        >>> solution.ok
        tensor([True])
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

    A primal-dual interior point: Mehrotra's predictor-corrector with one step length per sample. The corrector is
    weighted by the predictor's step; without this weight it cycles on badly centred iterates. Infeasible, unbounded and
    numerically failing samples come back with ok = False and leave the others alone. Every argument but q may lack its
    batch dimension, and is then shared.

    Args:
        H: (B, n, n), symmetric and positive semidefinite.
        q: (B, n).
        A: (B, p, n); None, the default, for no equalities.
        b: (B, p); given together with A.
        G: (B, m, n); None, the default, for no linear inequalities.
        h: (B, m); given together with G.
        quadratic: the tuple (Q, r, s) of the quadratic constraints: Q (B, k, n, n) positive semidefinite, r (B, k, n),
            s (B, k); None, the default, for none.
        tol: largest KKT residual of a solved sample, relative to the data and the iterate; default 1e-10.
        max_iter: largest number of Newton steps; default 60.

    Returns:
        The solution, in float64.

    Raises:
        InputError: shapes do not fit, or only one of A and b, or of G and h, is given.

    Source: Nocedal and Wright, Numerical Optimization (2006), chapters 16 and 19; Colombo and Gondzio, Further
    development of multiple centrality correctors (2008).

    Examples:
        >>> G, h = torch.tensor([[1.0]]), torch.tensor([1.0])
        >>> solution = foldopt.solvers.interior_point.solve_qcqp(torch.eye(1), torch.tensor([[-2.0]]), G=G, h=h)
        >>> round(solution.x.item(), 6), round(solution.inequality_dual.item(), 6)
        (1.0, 1.0)
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
            floor = 0.01 * tol * dual_scale * size / (k + m)  # keeps complementarity from converging before feasibility
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
    """The Newton system of one iterate, reduced to (x, nu), and factored once for predictor and corrector."""

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
    """Return the largest absolute entry of each row.

    Args:
        a: (B, n); n may be 0.

    Returns:
        (B,), 0 if n is 0.

    Examples:
        >>> foldopt.solvers.interior_point.largest(torch.tensor([[1.0, -3.0]]))
        tensor([3.])
    """
    return a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))


def unit(H: Tensor, q: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Return the unit of x in which each program should be solved: a power of 2 if its data are small, otherwise 1.

    Residuals are relative to 1 + |x|, so programs in small units would otherwise seem solved before they are.

    Args:
        H: (B, n, n).
        q: (B, n).
        b: (B, p).
        h: (B, m).

    Returns:
        (B, 1).

    Examples:
        >>> q, none = torch.tensor([[2.0**-20]]), torch.zeros(1, 0)
        >>> foldopt.solvers.interior_point.unit(torch.eye(1)[None], q, none, none) == 2.0**-20
        tensor([[True]])
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
    """Cast to float64, replace absent constraints by empty ones, expand over the batch, and check shapes."""
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
