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

from experiments.problems.cone import cvxpy_for
from foldopt.errors import InfeasibleError, InputError
from foldopt.solvers.gurobi import GurobiQCQP
from foldopt.solvers.interior_point import solve_qcqp
from foldopt.updates.sqp import SQP, SQPData, SQPState

if TYPE_CHECKING:
    import cvxpy

MAX_PIVOTS = 30
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
        return {"sqp": lambda: SQP(self)}

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
        Vx = torch.einsum("bij,bj->bi", V, x) / limit
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
        V, gamma = V.expand(B, n, n), gamma.expand(B)
        support = (
            c > c.mean(1, keepdim=True) + 0.5 * c.std(1, keepdim=True, correction=0) if warm is None else warm.to(c) > 0
        )
        solution = _pivot(c, V, gamma, support | ~support.any(1, keepdim=True))
        hard = (~solution.ok).nonzero()[:, 0]
        if len(hard):
            solved = _interior(c[hard], V[hard], gamma[hard], hard)
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
        bad = (~c.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
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


def _pivot(c: Tensor, V: Tensor, gamma: Tensor, support: Tensor) -> PortfolioSolution:
    best = c.argmax(1, keepdim=True)
    nu = c.gather(1, best)
    x = torch.zeros_like(c).scatter(1, best, 1.0)
    state = x, nu, torch.cat([torch.zeros_like(nu), nu - c], 1)  # the solution where it is within the risk limit
    iterations = torch.zeros(len(c), dtype=torch.long, device=c.device)
    todo = (V.diagonal(dim1=1, dim2=2).gather(1, best)[:, 0] > gamma * (1 + TOLERANCE)).nonzero()[:, 0]
    scaled = (c, *_scaled(V, gamma), support)
    for _ in range(MAX_PIVOTS):
        if not len(todo):
            break
        iterations[todo] += 1
        point, following, settled = _on_support(*(t if len(todo) == len(c) else t[todo] for t in scaled))
        for whole, part in zip((*state, support), (*point, following), strict=True):
            whole[todo] = part
        todo = todo[~settled]
    return _certified(*state, c, V, gamma)._replace(iterations=iterations)


def _best_assets(x: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> PortfolioSolution:
    """Return x, (B, n), if all in it is in the assets of largest c and within the risk limit, whose multiplier is 0."""
    nu = c.amax(1, keepdim=True)
    return _certified(x, nu, torch.cat([torch.zeros_like(nu), nu - c], 1), c, V, gamma)


def _scaled(V: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and gamma in the unit of the largest variance, (B, n, n) and (B,), as `_on_support` needs them."""
    unit = V.diagonal(dim1=1, dim2=2).amax(1)
    return V / unit[:, None, None], gamma / unit


def _on_support(c: Tensor, V: Tensor, gamma: Tensor, support: Tensor) -> tuple[SQPState, Tensor, Tensor]:
    """Return the closed form on each support (B, n) with the risk limit active: (x, nu, lam).

    Also the supports to try next, and whether that is not necessary, up to rounding, (B,). V, gamma: see `_scaled`.

    There V x = t (c - nu) with 1/t = 2 lam_0 / gamma, so x = w + t d with w the portfolio of smallest variance 1/a and
    d = P (c - (b/a) 1), P the inverse of V on the support, a = 1'P1, b = 1'Pc; t makes the variance gamma.
    """
    on = support.to(c)
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    root, _ = torch.linalg.cholesky_ex(torch.where(support[:, :, None] & support[:, None, :], V, eye))
    mean = (c * on).sum(1, keepdim=True) / on.sum(1, keepdim=True)
    centred = (c - mean) * on  # first by the mean, so that P of it is as exact as P of what it is then centred by
    P1, Pc = torch.cholesky_solve(torch.stack([on, centred], 2), root).unbind(2)
    a = P1.sum(1, keepdim=True)
    shift = Pc.sum(1, keepdim=True) / a
    d = Pc - shift * P1
    t = ((gamma[:, None] - 1 / a) / ((centred - shift) * d).sum(1, keepdim=True)).sqrt()
    x = P1 / a + t * d
    nu = mean + shift - 1 / (t * a)
    reduced = nu + torch.bmm(V, x[:, :, None])[:, :, 0] / t - c
    lam = torch.cat([gamma[:, None] / (2 * t), torch.where(support, 0.0, reduced)], 1)
    following = torch.where(support, x > 0, reduced < 0)
    lost = ~x.isfinite().all(1) | ~following.any(1)
    close = TOLERANCE * torch.maximum(c.abs().amax(1), lam[:, 0])[:, None]
    settled = torch.where(support, x >= -TOLERANCE, reduced >= -close).all(1)
    return (x, nu, lam), following | lost[:, None], settled


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
    point, *_ = _on_support(c, *_scaled(V, gamma), found.x > found.inequality_dual[:, 1:])
    exact = _certified(*point, c, V, gamma)
    tied = torch.where(c >= c.amax(1, keepdim=True) - 1e-12 * size, found.x, 0)
    for better in (exact, _best_assets(tied / tied.sum(1, keepdim=True), c, V, gamma)):
        parts = zip(better, chosen, strict=True)
        chosen = PortfolioSolution(*(torch.where(better.ok.view(-1, *[1] * (e.dim() - 1)), e, r) for e, r in parts))
    return chosen._replace(iterations=found.iterations)


def _certified(
    x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor, tol: float = TOLERANCE
) -> PortfolioSolution:
    residual = _kkt_residual(x, nu, lam, c, V, gamma)
    ok = residual <= tol
    state = (torch.where(ok[:, None], part, torch.nan) for part in (x, nu, lam))
    return PortfolioSolution(*state, torch.zeros_like(ok, dtype=torch.long), residual, ok)


def _kkt_residual(x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> Tensor:
    """Return the largest violation of the KKT conditions, (B,), dual ones relative to max |c|; inf for NaN."""
    B, n = x.shape
    V, limit = V.expand(B, n, n), gamma.expand(B)[:, None]
    Vx = torch.einsum("bij,bj->bi", V, x) / limit
    risk = (x * Vx).sum(1, keepdim=True) - 1
    size = torch.maximum(c.abs().amax(1, keepdim=True), lam.abs().amax(1, keepdim=True))
    size = torch.where(size > 0, size, 1.0)
    dual = torch.cat([-c + nu + 2 * lam[:, :1] * Vx - lam[:, 1:], -lam, lam * torch.cat([risk, x], 1)], 1) / size
    dual = torch.cat([dual[:, :n].abs(), dual[:, n : 2 * n + 1].clamp(min=0), dual[:, 2 * n + 1 :].abs()], 1)
    primal = torch.cat([risk, -x, (x.sum(1, keepdim=True) - 1).abs()], 1).clamp(min=0)
    return torch.cat([dual, primal], 1).amax(1).nan_to_num(nan=torch.inf)
