"""Portfolio optimization under a risk limit (paper eq. 20): max c'x subject to x'Vx <= gamma, sum x = 1, x >= 0.

In the form of eq. (1): f = -c'x, h = sum x - 1, g = (x'Vx / gamma - 1, -x). The risk constraint is divided by gamma
because V is about 1e-6 in the study, a scale at which first-order solvers fail on the constraint as the paper writes
it. Multipliers are those of the Lagrangian -c'x + nu (sum x - 1) + lam_0 (x'Vx / gamma - 1) - lam_1..n' x, lam >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.contracts.problem import CvxpyForm, Forward, Problem
from experiments.numerics.checks import require_finite
from experiments.numerics.cone import cvxpy_for
from experiments.portfolio.exact import PortfolioSolution, kkt_residual, smallest_variance, solve
from experiments.portfolio.sqp import PortfolioSQP
from foldopt.batched import matvec
from foldopt.errors import InfeasibleError, InputError
from foldopt.solvers.gurobi import GurobiQCQP
from foldopt.updates.programs import SQPData, SQPState
from foldopt.updates.sqp import SQP


class PortfolioProblem(Problem):
    """The portfolio problem of one risk model.

    Args:
        V: Symmetric positive semidefinite covariance of the asset returns, (n, n).
        gamma: Limit on the variance x'Vx, above the smallest variance of any portfolio.

    Raises:
        InputError: V is not a covariance, or gamma is not a positive number.
        InfeasibleError: No portfolio satisfies the risk limit.
    """

    forwards: ClassVar[Mapping[str, Forward]] = {"exact": Forward(tol=1e-6), "gurobi": Forward(tol=1e-3)}

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
                f"gamma={self.gamma:.6g}: no portfolio has a variance this small, the smallest is {least:.6g}; raise "
                "gamma above it."
            )
        self._gurobi: GurobiQCQP | None = None

    @property
    def optimizers(self) -> Mapping[str, Callable[[], SQP]]:
        """Update steps that can be folded, by name."""
        return {"sqp": lambda: PortfolioSQP(self)}

    def unrolled(self, optimizer: str) -> tuple[Callable[..., SQPState], SQP]:
        """Return a cold start and the step to unroll from there."""
        return lambda c, *_: self.sqp_start(c), self.optimizers[optimizer]()

    def solve(self, forward: str, c: Tensor, *_: Tensor, **options: float) -> SQPState:
        """Return the state (x, nu, lam) at the solution of the solver `forward`."""
        return (self.gurobi(c) if forward == "gurobi" else self.exact(c)).state

    def decisions(self, state: Any, *_: Tensor) -> Tensor:
        """Return the portfolios (B, n) of a state."""
        return state[0]

    def params(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (c, V, gamma), with V and gamma in float64 on the device of c."""
        c = parameters
        return c, self.V.to(c.device), torch.tensor(self.gamma, dtype=torch.float64, device=c.device)

    def decide(self, c: Tensor, *_: Tensor) -> Tensor:
        """Return optimal portfolios (B, n)."""
        return self.exact(c).x

    def value(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the expected return c'x of each sample, (B,)."""
        return (x * c).sum(1)

    def regret(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the optimal value minus the value of x, (B,); nonnegative up to rounding if x is feasible."""
        return self.value(self.exact(c).x, c.double()) - self.value(x.double(), c.double())

    def violation(self, x: Tensor) -> dict[str, Tensor]:
        """Return by how much each x (B, n) violates the risk limit (relative), the budget and x >= 0, (B,) each."""
        x = x.double()
        risk = torch.einsum("bi,ij,bj->b", x, self.V.to(x.device), x) / self.gamma - 1
        return {
            "risk": risk.clamp(min=0),
            "budget": (x.sum(1) - 1).abs(),
            "negativity": (-x).amax(1).clamp(min=0),
        }

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam) in closed form; V is (n, n) or (B, n, n), gamma () or (B,)."""
        c, V, gamma = params
        B, n = x.shape
        V, limit = V.expand(B, n, n), gamma.expand(B)[:, None]
        Vx = matvec(V, x) / limit
        g = torch.cat([(x * Vx).sum(1, keepdim=True) - 1, -x], 1)
        identity = torch.eye(n, dtype=x.dtype, device=x.device).expand(B, n, n)
        jacobian_g = torch.cat([2 * Vx[:, None, :], -identity], 1)
        hessian = (2 * lam[:, :1] / limit)[:, :, None] * V
        return SQPData(-c, hessian, x.sum(1, keepdim=True) - 1, torch.ones_like(x)[:, None, :], g, jacobian_g)

    def sqp_start(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a cold start (x, nu, lam) of SQP: equal weights, with multipliers scaled by the spread of c."""
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
        derivation of the efficient portfolio frontier", 1972). Assets leave the support where x < 0 and enter it where
        their reduced cost is negative. Samples that have not settled after 30 pivots are solved by an interior point
        method, and the closed form is evaluated once more on the support that it finds.

        Args:
            c: Expected returns, (B, n).
            V: Covariance, (n, n) or (B, n, n); None takes the problem's own.
            gamma: Risk limit, () or (B,); None takes the problem's own.
            warm: Solutions of similar instances, (B, n); the pivoting starts from their supports.

        Raises:
            InputError: A shape is wrong, or c holds NaN or inf; the message has the batch indices.
            InfeasibleError: No portfolio satisfies the risk limit in some samples; the error has their indices.
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
        return solve(c, V, gamma.expand(B), None if warm is None else warm.to(c) > 0)

    def gurobi(self, c: Tensor) -> PortfolioSolution:
        """Solve one sample after the other with Gurobi, whose model is kept; the KKT residual is about 1e-5."""
        c = self._checked(c)
        if self._gurobi is None:
            n, ones = self.n, torch.ones(1, self.n, dtype=torch.float64)
            nonnegative = (-torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))
            risk = (2 * self.V[None] / self.gamma, torch.zeros_like(ones), ones[:, 0])
            self._gurobi = GurobiQCQP(n, ones, ones[:, 0], *nonnegative, quadratic=risk)
        found = self._gurobi(-c)
        state = found.x, found.equality_dual, found.inequality_dual
        residual = kkt_residual(*state, *self.params(c))
        return PortfolioSolution(*state, found.iterations, residual, found.ok)

    def cvxpy(self, scaling: str) -> CvxpyForm:
        """Return the cvxpy problem with its parameter c and variable x.

        Args:
            scaling: "paper" states the risk limit as x'Vx <= gamma; "normalized" divides it by gamma.
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
        require_finite("c", c, "check the predictions")
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
