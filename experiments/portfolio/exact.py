"""The exact batched solver of the portfolio problem: block pivoting, with an interior point method as fallback."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.numerics.blocks import Chosen, times
from foldopt.errors import InfeasibleError
from foldopt.solvers.interior_point import solve_qcqp
from foldopt.updates.programs import SQPState

MAX_PIVOTS = 30
FEW = 64  # up to this batch size, samples that have settled stay in the batch: selecting the others costs more
TOLERANCE = 1e-11


class PortfolioSolution(NamedTuple):
    """Solutions of a batch of portfolio problems, in float64 on the device of c.

    Attributes:
        x: Portfolios, (B, n).
        nu: Multiplier of the budget, (B, 1).
        lam: Multipliers of the inequalities, (B, n + 1), that of the risk limit first.
        iterations: Number of pivots or Newton steps, (B,) int.
        residual: KKT residual, (B,); see `kkt_residual`.
        ok: Whether the residual is below the tolerance, (B,) bool. Samples that are not ok hold NaN: those whose
            multipliers underflow because max |c| is denormal, and some whose risk limit is within 1e-4 of the smallest
            variance.
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    iterations: Tensor
    residual: Tensor
    ok: Tensor

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x, nu, lam), the state of the SQP update."""
        return self[:3]


def solve(c: Tensor, V: Tensor, gamma: Tensor, support: Tensor | None) -> PortfolioSolution:
    """Solve a batch of portfolio problems to machine precision.

    Args:
        c: Expected returns, (B, n).
        V: Covariance, (n, n) or (B, n, n).
        gamma: Risk limits, (B,).
        support: Assets that are held where the pivoting starts, (B, n) bool; None guesses them from c and V.

    Raises:
        InfeasibleError: No portfolio satisfies the risk limit in some samples; the error has their indices.
    """
    solution = _pivot(c, V, gamma, support)
    if not solution.ok.all():
        hard = (~solution.ok).nonzero()[:, 0]
        solved = _interior(c[hard], V.expand(len(c), *V.shape[-2:])[hard], gamma[hard], hard)
        solution = PortfolioSolution(*(a.index_copy(0, hard, b) for a, b in zip(solution, solved, strict=True)))
    return solution


def smallest_variance(V: Tensor) -> Tensor:
    """Return min x'Vx over sum x = 1, x >= 0, for each V of (B, n, n); shape (B,)."""
    B, n, _ = V.shape
    scale = V.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(V.dtype).tiny)
    ones, eye = V.new_ones(1, n), torch.eye(n, dtype=V.dtype, device=V.device)
    found = solve_qcqp(V / scale[:, None, None], V.new_zeros(B, n), ones, ones[0, :1], -eye, V.new_zeros(n))
    return torch.einsum("bi,bij,bj->b", found.x, V, found.x)


class _Instances(NamedTuple):
    """Scaled samples for pivoting: c minus its largest entry, V and gamma divided by the largest variance.

    Attributes:
        c: (B, n), minus `top`.
        V: (n, n) or (B, n, n).
        gamma: (B, 1).
        size: max |c| before the subtraction, (B, 1).
        top: max c before the subtraction, (B, 1).
    """

    c: Tensor
    V: Tensor
    gamma: Tensor
    size: Tensor
    top: Tensor

    @classmethod
    def of(cls, c: Tensor, V: Tensor, gamma: Tensor) -> _Instances:
        """Scale c (B, n), V (n, n) or (B, n, n) and gamma (B,)."""
        unit = V.diagonal(dim1=-2, dim2=-1).amax(-1)
        top = c.amax(1, keepdim=True)
        return cls(c - top, V / unit[..., None, None], (gamma / unit)[:, None], c.abs().amax(1, keepdim=True), top)

    def rows(self, index: Tensor) -> _Instances:
        """Return the samples of an index tensor."""
        return _Instances(*(part if part is self.V and part.dim() == 2 else part[index] for part in self))


class _Point(NamedTuple):
    """The closed form on a support: x (B, n), nu (B, 1), multiplier of the risk limit (B, 1), reduced costs (B, n)."""

    x: Tensor
    nu: Tensor
    limit: Tensor
    reduced: Tensor

    def state(self, support: Tensor) -> SQPState:
        """Return (x, nu, lam), with zero multipliers on the support."""
        return self.x, self.nu, torch.cat([self.limit, torch.where(support, 0.0, self.reduced)], 1)


def _pivot(c: Tensor, V: Tensor, gamma: Tensor, support: Tensor | None) -> PortfolioSolution:
    given = _Instances.of(c, V, gamma)
    best = c.argmax(1, keepdim=True)
    variances = given.V.diagonal(dim1=-2, dim2=-1).expand_as(c)
    safe = variances.gather(1, best) <= given.gamma * (1 + TOLERANCE)
    if support is None:
        support = _start(given.c, variances, given.gamma)
    point, support, iterations = _pivoted(given, support | ~support.any(1, keepdim=True), safe, MAX_PIVOTS)
    x, nu, lam = point.state(support)
    if safe.any():  # the best asset alone satisfies the risk limit there, so it is the whole portfolio
        alone = torch.zeros_like(c).scatter(1, best, 1.0), given.top, torch.cat([torch.zeros_like(nu), -given.c], 1)
        x, nu, lam = (torch.where(safe, a, b) for a, b in zip(alone, (x, nu, lam), strict=True))
    return _certified(x, nu, lam, c, V, gamma)._replace(iterations=iterations)


def _start(c: Tensor, variances: Tensor, gamma: Tensor) -> Tensor:
    """Guess the supports, (B, n) bool, by two pivots with the diagonal of V only, which need no factorization."""
    support = c > c.mean(1, keepdim=True) + 0.5 * c.std(1, keepdim=True, correction=0)
    for _ in range(2):
        P1 = support / variances
        a = P1.sum(1, keepdim=True)
        centred = c - (P1 * c).sum(1, keepdim=True) / a
        spread = (P1 * centred.square()).sum(1, keepdim=True)
        support = centred > -(spread / (gamma - 1 / a)).sqrt() / a
    return support


def _pivoted(given: _Instances, support: Tensor, settled: Tensor, most: int) -> tuple[_Point, Tensor, Tensor]:
    """Pivot from `support` until all samples have settled or `most` pivots are made.

    Args:
        given: The scaled samples.
        support: Assets held at the start, (B, n) bool.
        settled: Samples that need no pivot, (B, 1) bool.
        most: Limit on the number of pivots.

    Returns:
        The points, their supports (B, n), and the number of pivots of each sample (B,).
    """
    iterations = torch.zeros(len(support), dtype=torch.long, device=support.device)
    for taken in range(1, most + 1):
        iterations += ~settled[:, 0]
        point, following, fits = _on_support(given, support)
        settled = settled | fits
        if settled.all():
            break
        left = len(support) - int(settled.sum())
        support = torch.where(settled, support, following)
        if 2 * left <= len(support) and len(support) > FEW:
            rows = (~settled[:, 0]).nonzero()[:, 0]
            rest, support[rows], more = _pivoted(given.rows(rows), support[rows], settled[rows], most - taken)
            point = _Point(*(whole.index_copy(0, rows, new) for whole, new in zip(point, rest, strict=True)))
            iterations[rows] += more
            break
    return point, support, iterations


def _on_support(given: _Instances, support: Tensor) -> tuple[_Point, Tensor, Tensor]:
    """Solve on each support (B, n) with the risk limit active, in closed form.

    On the support V x = t (c - nu) with 1/t = 2 lam_0 / gamma. Hence x = w + t d, where w is the portfolio of smallest
    variance 1/a, d = P (c - (b/a) 1), P is the inverse of V on the support, a = 1'P1 and b = 1'Pc. The scalar t is
    chosen such that the variance equals gamma.

    Returns:
        The point, the support to try next (B, n), and whether the point is optimal up to rounding (B, 1).
    """
    c, V, gamma, size, top = given
    on = Chosen(support)
    ones, held = on.used.to(c), on.take(c)
    root, _ = torch.linalg.cholesky_ex(on.block(V))
    P1, Pc = torch.cholesky_solve(torch.stack([ones, held], 2), root).unbind(2)
    a = P1.sum(1, keepdim=True)
    shift = Pc.sum(1, keepdim=True) / a
    d = torch.addcmul(Pc, shift, P1, value=-1)
    t = ((gamma - 1 / a) / ((held - shift) * d).sum(1, keepdim=True)).sqrt()
    x = on.put(torch.addcmul(P1 / a, t, d))
    nu = shift - 1 / (t * a)
    reduced = torch.addcdiv(nu - c, times(V, x), t)
    limit = gamma / (2 * t)
    following = torch.where(support, x > 0, reduced < 0)
    settled = torch.where(support, x >= -TOLERANCE, reduced >= -TOLERANCE * torch.maximum(size, limit))
    point = _Point(x, nu + top, limit, reduced)
    return point, following | ~following.any(1, keepdim=True), settled.all(1, keepdim=True)


def _best_assets(x: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> PortfolioSolution:
    """Return x (B, n) as a solution whose risk limit has multiplier 0: it holds only assets of largest c."""
    nu = c.amax(1, keepdim=True)
    return _certified(x, nu, torch.cat([torch.zeros_like(nu), nu - c], 1), c, V, gamma)


def _interior(c: Tensor, V: Tensor, gamma: Tensor, indices: Tensor) -> PortfolioSolution:
    """Solve by an interior point method, then try two closed forms that its answer suggests.

    The interior point's own answer is kept where neither closed form is optimal, as happens with ties in c.
    """
    infeasible = indices[gamma <= smallest_variance(V) * (1 + 1e-9)].tolist()
    if infeasible:
        raise InfeasibleError(
            f"gamma is below the smallest variance that any portfolio has for {len(infeasible)} samples, first "
            f"{infeasible[:10]}; raise gamma or check V there.",
            infeasible,
        )
    n = c.shape[1]
    size = c.abs().amax(1, keepdim=True)
    ones, eye = c.new_ones(1, n), torch.eye(n, dtype=c.dtype, device=c.device)
    risk = (2 * (V / gamma[:, None, None])[:, None], c.new_zeros(1, n), c.new_ones(1))
    cost = -c / torch.where(size > 0, size, 1.0)
    found = solve_qcqp(c.new_zeros(n, n), cost, ones, ones[0, :1], -eye, c.new_zeros(n), risk, tol=1e-12)
    lam = found.inequality_dual * size
    chosen = _certified(found.x, found.equality_dual * size, lam, c, V, gamma, tol=1e-7)
    support = found.x > found.inequality_dual[:, 1:]
    exact = _certified(*_on_support(_Instances.of(c, V, gamma), support)[0].state(support), c, V, gamma)
    tied = torch.where(c >= c.amax(1, keepdim=True) - 1e-12 * size, found.x, 0)
    for better in (exact, _best_assets(tied / tied.sum(1, keepdim=True), c, V, gamma)):
        parts = zip(better, chosen, strict=True)
        chosen = PortfolioSolution(*(torch.where(better.ok.view(-1, *[1] * (e.dim() - 1)), e, r) for e, r in parts))
    return chosen._replace(iterations=found.iterations)


def _certified(
    x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor, tol: float = TOLERANCE
) -> PortfolioSolution:
    state = x, nu, lam
    residual = kkt_residual(*state, c, V, gamma)
    ok = residual <= tol
    if not ok.all():
        x, nu, lam = (torch.where(ok[:, None], part, torch.nan) for part in state)
    return PortfolioSolution(x, nu, lam, torch.zeros_like(ok, dtype=torch.long), residual, ok)


def kkt_residual(x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> Tensor:
    """Return the largest violation of the KKT conditions, (B,); inf where it is NaN.

    Violations of stationarity, complementarity and dual feasibility are relative to max(max |c|, max |lam|); primal
    violations are absolute, the risk limit divided by gamma.
    """
    Vx = times(V, x) / gamma.expand(len(x))[:, None]
    risk = (x * Vx).sum(1, keepdim=True) - 1
    size = torch.maximum(c.abs().amax(1), lam.abs().amax(1))
    stationarity = torch.addcmul(nu - c - lam[:, 1:], lam[:, :1], Vx, value=2)
    complementarity = lam * torch.cat([risk, x], 1)
    dual = torch.cat([stationarity.abs(), complementarity.abs(), -lam], 1).amax(1) / torch.where(size > 0, size, 1.0)
    primal = torch.cat([risk, -x, (x.sum(1, keepdim=True) - 1).abs()], 1).amax(1)
    return torch.maximum(dual, primal).nan_to_num(nan=torch.inf)
