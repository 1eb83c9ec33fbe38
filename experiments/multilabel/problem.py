"""Smooth top-k selection (paper eq. 19): max c'x - sum x log x subject to 0 <= x <= 1, sum x = k.

Eq. (19) prints the entropy with the wrong sign; this is the concave problem that its authors solve. The optimum is
log x = min(0, c - theta) with a threshold theta: k times a softmax, in which entries above 1 are reduced to 1 and the
excess is distributed to the others. Small entries underflow as floats, so that solutions, decisions and derivatives
are in terms of log x wherever a method allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from experiments.contracts.problem import CvxpyForm, Forward, Problem, Step
from experiments.numerics.checks import require_finite
from experiments.numerics.cone import cvxpy_for
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError
from foldopt.layers import f_pgd_a, f_pgd_b
from foldopt.projections import capped_simplex
from foldopt.solvers.cvxpylayers import ConeLayer
from foldopt.updates import SQPData

TopKState = Tensor | tuple[Tensor, Tensor, Tensor]
SMALLEST = 1e-300  # lower limit of x inside a logarithm
AT_BOUND = 1e-4  # distance from 1 within which an x found by an iterative solver counts as 1
MAX_PIVOTS = 50


class TopKSolution(NamedTuple):
    """An exact solution: log x, (B, n), and which entries are below their bound, `free`, (B, n) bool."""

    log_x: Tensor
    free: Tensor


class TopKProblem(Problem):
    """Smooth selection of k of n classes.

    Args:
        n: Number of classes.
        k: Number of classes that are selected, 1 <= k < n.
        stepsize: alpha of projected gradient (eq. 4). The gradient of the folded layer does not depend on it.
        solver: cvxpy's solver for the forward pass "cvxpy", see `ConeLayer`.

    Raises:
        InputError: An argument is out of range.
    """

    forwards: ClassVar[Mapping[str, Forward]] = {"exact": Forward(tol=1e-6), "cvxpy": Forward(tol=1e-3)}
    lacking: ClassVar[Mapping[str, str]] = {
        "qp": "its objective has an entropy, so it is no quadratic program; qpth can do the projection of a step: "
        "backend=fold backend.optimizer=pgd_a"
    }

    def __init__(self, n: int, k: int, stepsize: float = 0.025, solver: str = "CLARABEL") -> None:
        require_whole("n", n, 2)
        require_whole("k", k, 1)
        if k >= n:
            raise InputError(f"k={k} leaves no choice among n={n} classes; choose a smaller k.")
        require_positive("stepsize", stepsize)
        self.n, self.k, self.stepsize, self.solver = n, k, float(stepsize), solver
        self._cone: ConeLayer | None = None

    @property
    def optimizers(self) -> Mapping[str, Callable[[], Step]]:
        """Update steps that can be folded, by name, the default first.

        "pgd" is projected gradient with the projection in closed form. "pgd_a" projects by qpth and "pgd_b" by a folded
        ADMM, as the paper's f-PGDa and f-PGDb do. "sqp" is sequential quadratic programming.
        """
        return {
            "pgd": lambda: TopKStep(self.k, self.stepsize),
            "pgd_a": lambda: f_pgd_a(loss, self.polyhedron, self._indicators, self.stepsize).update,
            "pgd_b": lambda: f_pgd_b(loss, self.polyhedron, self._indicators, self.stepsize).update,
            "sqp": lambda: TopKSQP(self.k),
        }

    def solve(self, forward: str, c: Tensor, **options: float) -> Tensor:
        """Return the solution x (B, n) of the solver `forward`."""
        c = self._checked(c)
        if forward == "exact":
            return self._indicators(c)
        if self._cone is None:
            self._cone = ConeLayer(*self.cvxpy("normalized"), self.solver)
        return self._cone(c)

    def state(self, optimizer: str, solution: Tensor, c: Tensor) -> TopKState:
        """Return the state of an update step at a solution x (B, n); for "sqp" it includes the multipliers."""
        return multipliers(solution, c) if optimizer == "sqp" else solution

    def decisions(self, state: Any, *_: Tensor) -> Tensor:
        """Return log x, (B, n), of a state."""
        return self.cvxpy_decisions(state if isinstance(state, Tensor) else state[0])

    def cvxpy_decisions(self, solutions: Tensor) -> Tensor:
        """Return log x, (B, n); entries that a solver left below 1e-300 count as 1e-300."""
        return solutions.clamp(min=SMALLEST).log()

    def exact(self, c: Tensor) -> TopKSolution:
        """Solve in closed form, see `solve_topk`. Raises InputError for a wrong shape, and for NaN or inf in c."""
        return solve_topk(self._checked(c), self.k)

    def closed_form(self, c: Tensor, *_: Tensor) -> Tensor:
        """Return log x (B, n) of the exact solution, differentiable."""
        return self.exact(c).log_x

    def _indicators(self, c: Tensor) -> Tensor:
        return solve_topk(c, self.k).log_x.exp()

    def polyhedron(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the feasible set as (G, h, A, b)."""
        eye = torch.eye(self.n, dtype=c.dtype, device=c.device)
        h = torch.cat([c.new_zeros(self.n), c.new_ones(self.n)])
        return torch.cat([-eye, eye]), h, c.new_ones(1, self.n), c.new_full((1,), self.k)

    def cvxpy(self, scaling: str) -> CvxpyForm:
        """Return the cvxpy problem with its parameter c and variable x; both scalings give the same problem."""
        cp = cvxpy_for(scaling)
        x, c = cp.Variable(self.n), cp.Parameter(self.n)
        constraints = [cp.sum(x) == self.k, x <= 1]  # the entropy's domain is x >= 0
        return cp.Problem(cp.Maximize(c @ x + cp.sum(cp.entr(x))), constraints), [c], [x]

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, c: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam) for `foldopt.SQP`, with the inequalities x <= 1."""
        B, n = x.shape
        eye = torch.eye(n, dtype=x.dtype, device=x.device).expand(B, n, n)
        equality = x.sum(1, keepdim=True) - self.k
        return SQPData(x.log() + 1 - c, torch.diag_embed(1 / x), equality, torch.ones_like(x)[:, None], x - 1, eye)

    def _checked(self, c: Tensor) -> Tensor:
        if c.dim() != 2 or c.shape[1] != self.n:
            raise InputError(f"c has shape {tuple(c.shape)}, expected (B, {self.n}): one logit per class.")
        require_finite("c", c, "check the network")
        return c


def solve_topk(c: Tensor, k: int) -> TopKSolution:
    """Solve max c'x - sum x log x over 0 <= x <= 1, sum x = k, in closed form for log x.

    If the m largest entries are at their bound, theta_m = logsumexp of the others - log(k - m). The solution has the
    smallest m for which the largest of the others is at most theta_m. m is found without gradients; given m, log x is
    differentiable to any order. Where an entry of c equals theta, its derivative is one-sided.

    Args:
        c: Logits, (B, n), of any floating dtype; the result has the same dtype.
        k: Sum of x, below n.
    """
    with torch.no_grad():
        top, where = c.topk(k, dim=1)
        rest = c.scatter(1, where, -torch.inf).logsumexp(1, keepdim=True)
        tails = torch.cat([rest, top.flip(1)], 1).logcumsumexp(1)[:, 1:].flip(1)
        counts = torch.arange(k, 0, -1, device=c.device, dtype=c.dtype)
        m = (top <= tails - counts.log()).to(torch.uint8).argmax(1, keepdim=True)
        free = torch.ones_like(c, dtype=torch.bool).scatter(1, where, torch.arange(k, device=c.device) >= m)
    others = tails.gather(1, m)
    if torch.is_grad_enabled():  # recompute the same value with a graph
        others = torch.where(free, c, -torch.inf).logsumexp(1, keepdim=True)
    theta = others - (k - m.to(c.dtype)).log()
    return TopKSolution(torch.where(free, (c - theta).clamp(max=0), 0), free)


def loss(x: Tensor, c: Tensor) -> Tensor:
    """Return the negative objective sum x log x - c'x of each sample, (B,)."""
    return (x * (x.clamp(min=SMALLEST).log() - c)).sum(1)


def multipliers(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, nu, lam), where nu and lam are the multipliers of sum x = k and x <= 1 at a solution x (B, n) for c.

    nu is the mean of c - log x - 1 over the entries below their bound, weighted by x: the logarithms of large entries
    are the most accurate.
    """
    x = x.clamp(min=SMALLEST)
    slope = c - x.log() - 1
    bound = x > 1 - AT_BOUND
    weight = torch.where(bound, 0, x)
    nu = (weight * slope).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=SMALLEST)
    return x, nu, torch.where(bound, (slope - nu).clamp(min=0), 0)


class TopKStep(nn.Module):
    """One projected gradient step (eq. 4), with the projection and the inverse of I - Phi in closed form.

    It is called as ``TopKStep(k, stepsize)(x, c)``, both (B, n).

    Args:
        k: Sum of x.
        stepsize: alpha of eq. (4).
        floor: log x is constant below this value, as its gradient is unbounded at 0. Iterations that start far from the
            solution need a floor that is not tiny.
    """

    def __init__(self, k: int, stepsize: float, floor: float = SMALLEST) -> None:
        require_positive("floor", floor)
        super().__init__()
        self.k, self.stepsize, self.floor = k, stepsize, floor

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the state after one step."""
        return capped_simplex(x + self.stepsize * (c - x.clamp(min=self.floor).log() - 1), self.k, near=x)

    def inverse(self, g: Tensor, transposed: bool, stepped: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """Return the solution of v = Phi^T v + g, or of v = Phi v + g if `transposed`, (B, n).

        On the set F of entries that the projection leaves between the bounds, Phi is (I - 11'/|F|)(I - a diag(1/x))
        with the stepsize a. The other rows of Phi are zero.
        """
        weight = torch.where((stepped > 0) & (stepped < 1), x, 0)
        free, total = weight > 0, weight.sum(1, keepdim=True).clamp(min=SMALLEST)
        shift = (weight * g).sum(1, keepdim=True)
        if transposed:
            shift = shift - self.stepsize * torch.where(free, g, 0).sum(1, keepdim=True)
            return torch.where(free, weight * (g - shift / total) / self.stepsize, g)
        mean = shift / total
        return torch.where(free, mean + weight * (g - mean) / self.stepsize, g)


class TopKSQP(nn.Module):
    """One full SQP step (eqs. 31-32), in closed form; it equals a step of ``foldopt.SQP(problem)``.

    The state is (x, nu, lam): x (B, n) above 0, and the multipliers nu (B, 1) of sum x = k and lam (B, n) of x <= 1.
    The Hessian of the quadratic model is diag(1/x). Outside a given active set the solution of the model is
    d = x (c - log x - mu) - x with one unknown number mu.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, state: tuple[Tensor, Tensor, Tensor], c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state after one step."""
        x, _, lam = state
        force = c - x.log()
        with torch.no_grad():
            active = self._active(x, force, lam > 1 - x)
        return self._model(x, force, active)

    def inverse(self, g: Tensor, transposed: bool, *_: object) -> Tensor:
        """Return v = g, (B, N): at a solution SQP is Newton's method, so that Phi = 0."""
        return g

    def _model(self, x: Tensor, force: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x + d, mu and the multipliers of the quadratic model's solution d for an active set (B, n) bool.

        force is c - log x; outside the active set x + d = x (force - mu).
        """
        weight = torch.where(active, 0, x)
        missing = self.k - active.sum(1, keepdim=True)
        mu = ((weight * force).sum(1, keepdim=True) - missing) / weight.sum(1, keepdim=True)
        rest = force - mu
        return torch.where(active, 1, x * rest), mu, torch.where(active, rest - 1 / x, 0)

    def _active(self, x: Tensor, force: Tensor, active: Tensor) -> Tensor:
        """Return the active set of the quadratic model's solution, found by pivoting from the guess `active`."""
        for _ in range(MAX_PIVOTS):
            moved, _, lam = self._model(x, force, active)
            following = torch.where(active, lam >= 0, moved > 1)
            if torch.equal(following, active):
                break
            active = following
        return active
