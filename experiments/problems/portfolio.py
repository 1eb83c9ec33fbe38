"""Portfolio optimization under a risk limit (paper eq. 20): max c'x subject to x'Vx <= gamma, sum x = 1, x >= 0.

In the form of eq. (1): f = -c'x, h = sum x - 1, g = (x'Vx / gamma - 1, -x). The risk constraint is divided by gamma:
V is of the order of 1e-6 in the study, and as written the constraint's scale ruins first-order solvers. Multipliers
are those of the Lagrangian -c'x + nu (sum x - 1) + lam_0 (x'Vx / gamma - 1) - lam_1..n' x, with lam >= 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.problems.blocks import Chosen, times
from experiments.problems.cone import cvxpy_for
from experiments.problems.portfolio_sqp import PortfolioSQP
from foldopt.batched import matvec
from foldopt.errors import InfeasibleError, InputError
from foldopt.solvers.gurobi import GurobiQCQP
from foldopt.solvers.interior_point import solve_qcqp
from foldopt.updates.sqp import SQP, SQPData, SQPState

if TYPE_CHECKING:
    import cvxpy

MAX_PIVOTS = 30
FEW = 64  # samples that are not worth singling out those of them that have settled
TOLERANCE = 1e-11


class PortfolioSolution(NamedTuple):
    """What a solver of the portfolio problem found, float64 on the device of c.

    x: (B, n). nu: (B, 1). lam: (B, n + 1), the risk limit's multiplier first. iterations: (B,) int, pivots or Newton
    steps. residual: (B,), the KKT residual relative to the size of c (primal residuals as they are).
    ok: (B,) bool, residual small; the others hold NaN. Those are samples whose multipliers no float can hold, as where
    max |c| is denormal, and some where the risk limit is within 1e-4 of the smallest variance.
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


class PortfolioProblem:
    """The portfolio problem of one risk model.

    Args:
        V: (n, n) symmetric positive semidefinite covariance of the asset returns.
        gamma: risk limit on the variance x'Vx, above the smallest variance that a portfolio can have.

    Raises InputError for a V that is no covariance and a gamma that is no positive number, InfeasibleError where no
    portfolio satisfies the risk limit.
    """

    forwards: ClassVar[tuple[str, ...]] = ("exact", "gurobi")

    def __init__(self, V: Tensor, gamma: float) -> None:
        if V.dim() != 2 or V.shape[0] != V.shape[1]:
            raise InputError(f"V has shape {tuple(V.shape)}, expected a square (n, n) covariance.")
        self.V = V.detach().double().cpu()
        self.n = len(V)
        _check_covariance(self.V)
        self.gamma = float(gamma)
        if not 0 < self.gamma < torch.inf:
            raise InputError(f"gamma={gamma}: the risk limit is a positive variance.")
        least = float(smallest_variance(self.V[None])[0])
        if self.gamma <= least * (1 + 1e-9):
            raise InfeasibleError(
                f"gamma={self.gamma:.6g}: no portfolio has so little risk, the smallest variance is {least:.6g}; raise "
                "gamma above it."
            )
        self._gurobi: GurobiQCQP | None = None

    @property
    def optimizers(self) -> dict[str, Callable[[], SQP]]:
        """Update steps that can be folded, by name."""
        return {"sqp": lambda: PortfolioSQP(self)}

    def unrolled(self, optimizer: str) -> tuple[Callable[..., SQPState], SQP]:
        """Return a cold start and the step to unroll from there."""
        return lambda c, *_: self.sqp_start(c), self.optimizers[optimizer]()

    def solve(self, forward: str, c: Tensor, *_: Tensor) -> SQPState:
        """Return the state at the solution that the solver `forward` finds."""
        return getattr(self, forward)(c).state

    def decisions(self, state: SQPState, *_: Tensor) -> Tensor:
        """Return the portfolios (B, n) of a state."""
        return state[0]

    def params(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters (c, V, gamma) of every layer of this problem, on the device of c and in float64."""
        return c, self.V.to(c.device), torch.tensor(self.gamma, dtype=torch.float64, device=c.device)

    def decide(self, c: Tensor) -> Tensor:
        """Return optimal portfolios (B, n)."""
        return self.exact(c).x

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the expected return c'x of each sample, (B,)."""
        return (x * c).sum(1)

    def regret(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the exact optimal value for c less the value of x, (B,); at least 0 for feasible x up to rounding."""
        return self.value(self.exact(c).x, c.double()) - self.value(x.double(), c.double())

    def violation(self, x: Tensor) -> dict[str, Tensor]:
        """Return how far each x (B, n) is from feasible, (B,) each: relative risk excess, budget error, negativity."""
        x = x.double()
        risk = torch.einsum("bi,ij,bj->b", x, self.V.to(x.device), x) / self.gamma - 1
        return {
            "risk": risk.clamp(min=0),
            "budget": (x.sum(1) - 1).abs(),
            "negativity": (-x).amax(1).clamp(min=0),
        }

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam) in closed form; V (n, n) or (B, n, n), gamma () or (B,)."""
        B, n = x.shape
        V, limit = V.expand(B, n, n), gamma.expand(B)[:, None]
        Vx = matvec(V, x) / limit
        g = torch.cat([(x * Vx).sum(1, keepdim=True) - 1, -x], 1)
        identity = torch.eye(n, dtype=x.dtype, device=x.device).expand(B, n, n)
        jacobian_g = torch.cat([2 * Vx[:, None, :], -identity], 1)
        hessian = (2 * lam[:, :1] / limit)[:, :, None] * V
        return SQPData(-c, hessian, x.sum(1, keepdim=True) - 1, torch.ones_like(x)[:, None, :], g, jacobian_g)

    def sqp_start(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a cold start (x, nu, lam) of SQP: equal weights, and the multipliers' sizes from the spread of c."""
        c = self._checked(c)
        mean = c.mean(1, keepdim=True)
        lam = torch.zeros(len(c), self.n + 1, dtype=c.dtype, device=c.device)
        lam[:, 0] = (c.amax(1) - mean[:, 0]).clamp(min=torch.finfo(c.dtype).eps)
        return torch.full_like(c, 1 / self.n), mean, lam

    def exact(
        self, c: Tensor, V: Tensor | None = None, gamma: Tensor | None = None, *, warm: Tensor | None = None
    ) -> PortfolioSolution:
        """Solve to machine precision, batched, in float64.

        The support is found by block pivoting: on a fixed support the solution is a closed form (Merton, "An analytic
        derivation of the efficient portfolio frontier", 1972), and assets leave it where x < 0 and enter it where
        their reduced cost is negative. What has not settled after a number of pivots goes to the interior point, and
        the support found there to the closed form again.

        Args:
            c: (B, n), expected returns. V: (n, n) or (B, n, n). gamma: () or (B,). Both default to the problem's own.
            warm: (B, n), solutions of similar instances; their supports are where the pivoting starts.

        Raises InputError for wrong shapes and for NaN or inf in c (with the batch indices), InfeasibleError with the
        indices of the samples whose own V and gamma admit no portfolio.
        """
        own = self.params(c)
        c = self._checked(c)
        B, n = c.shape
        V = own[1] if V is None else V.detach().to(c)
        gamma = own[2] if gamma is None else torch.as_tensor(gamma).detach().to(c)
        for name, value, shape in (("V", V, (n, n)), ("gamma", gamma, ())):
            if tuple(value.shape) not in (shape, (B, *shape)):
                raise InputError(f"{name} has shape {tuple(value.shape)}, expected {shape} or {(B, *shape)}.")
        if warm is not None and warm.shape != c.shape:
            raise InputError(f"warm has shape {tuple(warm.shape)}, expected that of c, {tuple(c.shape)}.")
        gamma = gamma.expand(B)
        solution = _pivot(c, V, gamma, None if warm is None else warm.to(c) > 0)
        if not solution.ok.all():
            hard = (~solution.ok).nonzero()[:, 0]
            solved = _interior(c[hard], V.expand(B, n, n)[hard], gamma[hard], hard)
            solution = PortfolioSolution(*(a.index_copy(0, hard, b) for a, b in zip(solution, solved, strict=True)))
        return solution

    def gurobi(self, c: Tensor) -> PortfolioSolution:
        """Solve one by one with Gurobi (cached model, objective updated), to a residual of about 1e-5; see `exact`."""
        c = self._checked(c)
        if self._gurobi is None:
            n, ones = self.n, torch.ones(1, self.n, dtype=torch.float64)
            nonnegative = (-torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))
            risk = (2 * self.V[None] / self.gamma, torch.zeros_like(ones), ones[:, 0])
            self._gurobi = GurobiQCQP(n, ones, ones[:, 0], *nonnegative, quadratic=risk)
        found = self._gurobi(-c)
        state = found.x, found.equality_dual, found.inequality_dual
        residual = _kkt_residual(*state, *self.params(c))
        return PortfolioSolution(*state, found.iterations, residual, found.ok)

    def cvxpy(self, scaling: str) -> tuple[cvxpy.Problem, list[cvxpy.Parameter], list[cvxpy.Variable]]:
        """Return the problem in cvxpy's form with its parameter c and variable x.

        scaling: "paper" takes the risk limit as it is written, x'Vx <= gamma; "normalized" divides it by gamma.
        """
        cp = cvxpy_for(scaling)
        eigenvalues, vectors = torch.linalg.eigh(self.V)
        root = (vectors * eigenvalues.clamp(min=0).sqrt()).mT
        limit = self.gamma if scaling == "paper" else 1.0
        root = root if scaling == "paper" else root / self.gamma**0.5
        x, c = cp.Variable(self.n), cp.Parameter(self.n)
        constraints = [cp.sum_squares(root.numpy() @ x) <= limit, cp.sum(x) == 1, x >= 0]
        return cp.Problem(cp.Maximize(c @ x), constraints), [c], [x]

    def _checked(self, c: Tensor) -> Tensor:
        if c.dim() != 2 or c.shape[1] != self.n:
            raise InputError(f"c has shape {tuple(c.shape)}, expected (B, {self.n}): one return per asset of V.")
        finite = c.isfinite()
        if not finite.all():
            bad = (~finite.all(1)).nonzero()[:, 0].tolist()
            raise InputError(
                f"c holds NaN or inf in {len(bad)} of {len(c)} samples, first {bad[:10]}; check the predictions."
            )
        return c.detach().double()


def _check_covariance(V: Tensor) -> None:
    if not V.isfinite().all():
        raise InputError(f"V of shape {tuple(V.shape)} holds NaN or inf.")
    asymmetry, size = float((V - V.mT).abs().max()), float(V.abs().max())
    if asymmetry > 1e-10 * size:
        raise InputError(f"V is not symmetric, max |V - V'| = {asymmetry:.3g}; pass (V + V') / 2 if that is meant.")
    smallest = float(torch.linalg.eigvalsh(V)[0])
    if smallest < -1e-10 * size:
        raise InputError(
            f"V is not positive semidefinite, its smallest eigenvalue is {smallest:.3g}; a covariance has none below 0."
        )


def smallest_variance(V: Tensor) -> Tensor:
    """Return min x'Vx over sum x = 1, x >= 0 for every V (B, n, n), as (B,)."""
    B, n, _ = V.shape
    scale = V.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(V.dtype).tiny)
    ones, eye = V.new_ones(1, n), torch.eye(n, dtype=V.dtype, device=V.device)
    found = solve_qcqp(V / scale[:, None, None], V.new_zeros(B, n), ones, ones[0, :1], -eye, V.new_zeros(n))
    return torch.einsum("bi,bij,bj->b", found.x, V, found.x)


class _Instances(NamedTuple):
    """Samples in the units that pivoting needs: c less its largest entry, V and gamma over the largest variance.

    c (B, n); V (n, n) or (B, n, n); gamma (B, 1). size: (B, 1), max |c| as it was. top: (B, 1), what c is less.
    """

    c: Tensor
    V: Tensor
    gamma: Tensor
    size: Tensor
    top: Tensor

    @classmethod
    def of(cls, c: Tensor, V: Tensor, gamma: Tensor) -> _Instances:
        """Return the samples of c (B, n), V (n, n) or (B, n, n) and gamma (B,)."""
        unit = V.diagonal(dim1=-2, dim2=-1).amax(-1)
        top = c.amax(1, keepdim=True)
        return cls(c - top, V / unit[..., None, None], (gamma / unit)[:, None], c.abs().amax(1, keepdim=True), top)

    def rows(self, index: Tensor) -> _Instances:
        """Return some of the samples."""
        return _Instances(*(part if part is self.V and part.dim() == 2 else part[index] for part in self))


class _Point(NamedTuple):
    """The closed form on a support: x (B, n), nu (B, 1), the risk limit's multiplier (B, 1), reduced costs (B, n)."""

    x: Tensor
    nu: Tensor
    limit: Tensor
    reduced: Tensor

    def state(self, support: Tensor) -> SQPState:
        """Return (x, nu, lam)."""
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
    if safe.any():  # there the best asset is all of the solution
        alone = torch.zeros_like(c).scatter(1, best, 1.0), given.top, torch.cat([torch.zeros_like(nu), -given.c], 1)
        x, nu, lam = (torch.where(safe, a, b) for a, b in zip(alone, (x, nu, lam), strict=True))
    return _certified(x, nu, lam, c, V, gamma)._replace(iterations=iterations)


def _start(c: Tensor, variances: Tensor, gamma: Tensor) -> Tensor:
    """Return a guess of the supports, (B, n): two pivots with the diagonal of V alone, which need no factorization."""
    support = c > c.mean(1, keepdim=True) + 0.5 * c.std(1, keepdim=True, correction=0)
    for _ in range(2):
        P1 = support / variances
        a = P1.sum(1, keepdim=True)
        centred = c - (P1 * c).sum(1, keepdim=True) / a
        spread = (P1 * centred.square()).sum(1, keepdim=True)
        support = centred > -(spread / (gamma - 1 / a)).sqrt() / a
    return support


def _pivoted(given: _Instances, support: Tensor, settled: Tensor, most: int) -> tuple[_Point, Tensor, Tensor]:
    """Return the points, their supports and the pivots taken, (B,). settled: (B, 1), samples that need none."""
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
    """Return the closed form on each support (B, n) with the risk limit active.

    Also the supports to try next, and whether that is not necessary, up to rounding, (B, 1).

    There V x = t (c - nu) with 1/t = 2 lam_0 / gamma, so x = w + t d with w the portfolio of smallest variance 1/a and
    d = P (c - (b/a) 1), P the inverse of V on the support, a = 1'P1, b = 1'Pc; t makes the variance gamma.
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
    """Return x, (B, n), if all in it is in the assets of largest c and within the risk limit, whose multiplier is 0."""
    nu = c.amax(1, keepdim=True)
    return _certified(x, nu, torch.cat([torch.zeros_like(nu), nu - c], 1), c, V, gamma)


def _interior(c: Tensor, V: Tensor, gamma: Tensor, indices: Tensor) -> PortfolioSolution:
    """Solve by interior point; keep its answer where neither closed form that it suggests is the solution (ties)."""
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
    residual = _kkt_residual(*state, c, V, gamma)
    ok = residual <= tol
    if not ok.all():
        x, nu, lam = (torch.where(ok[:, None], part, torch.nan) for part in state)
    return PortfolioSolution(x, nu, lam, torch.zeros_like(ok, dtype=torch.long), residual, ok)


def _kkt_residual(x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> Tensor:
    """Return the largest violation of the KKT conditions, (B,), dual ones relative to max |c|; inf for NaN."""
    Vx = times(V, x) / gamma.expand(len(x))[:, None]
    risk = (x * Vx).sum(1, keepdim=True) - 1
    size = torch.maximum(c.abs().amax(1), lam.abs().amax(1))
    stationarity = torch.addcmul(nu - c - lam[:, 1:], lam[:, :1], Vx, value=2)
    complementarity = lam * torch.cat([risk, x], 1)
    dual = torch.cat([stationarity.abs(), complementarity.abs(), -lam], 1).amax(1) / torch.where(size > 0, size, 1.0)
    primal = torch.cat([risk, -x, (x.sum(1, keepdim=True) - 1).abs()], 1).amax(1)
    return torch.maximum(dual, primal).nan_to_num(nan=torch.inf)
