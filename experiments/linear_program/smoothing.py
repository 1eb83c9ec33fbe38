"""The smoothed linear program: min c'x + strength R(x) over a polytope, whose solution moves with c.

R(x) is |x|^2 / 2 ("quadratic"), or a sum over all distances t to the bounds x >= 0, x <= upper and G x <= h of
t log t - t ("entropy") or -log t ("barrier"). With the latter two the solution is inside, and the equalities A x = b
are the only constraints that are active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.linear_program.polytope import Polytope
from foldopt import QPLayer
from foldopt.errors import InputError, SolverError
from foldopt.updates.programs import SQPData, SQPState
from foldopt.updates.sqp import SQP

SMOOTHINGS = ("quadratic", "entropy", "barrier")
ARMIJO, SHRINK, BACKTRACKS, MAX_STEPS = 0.1, 0.5, 60, 200
INSIDE = 0.99  # share of the way to the nearest bound that a Newton step may go
DECREMENT = 1e-12  # squared Newton decrement, relative to the objective, from which a few full steps reach rounding
FULL_STEPS = 3


class Scalar(NamedTuple):
    """A convex function of a distance t > 0 with its first two derivatives."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


INTERIOR = {
    "entropy": Scalar(lambda t: t * t.log() - t, lambda t: t.log(), lambda t: 1 / t),
    "barrier": Scalar(lambda t: -t.log(), lambda t: -1 / t, lambda t: 1 / t.square()),
}


class QuadraticProgram:
    """The program smoothed by |x|^2 / 2; the multipliers of G, of x >= 0 and of x <= upper are in this order."""

    def __init__(self, polytope: Polytope, strength: float, sign: float) -> None:
        self.polytope, self.strength, self.sign = polytope, strength, sign
        eye = torch.eye(polytope.n, dtype=torch.float64)
        self.bounded = polytope.upper < torch.inf
        self.rows = torch.cat([polytope.G, -eye, *([eye] if self.bounded else [])])
        upper = [torch.full((polytope.n,), polytope.upper, dtype=torch.float64)] if self.bounded else []
        self.limits = torch.cat([polytope.h, torch.zeros(polytope.n, dtype=torch.float64), *upper])
        self._layer = QPLayer(return_duals=True)

    def update(self) -> SQP:
        """Return the step that is folded."""
        return SQP(self)

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam) for the parameter c, which is the program itself."""
        (c,) = params
        B, p = len(x), self.polytope
        hessian = self.strength * torch.eye(p.n).to(x)
        A, rows = p.A.to(x), self.rows.to(x)
        return SQPData(
            self.sign * c + self.strength * x,
            hessian.expand(B, -1, -1),
            x @ A.mT - p.b.to(x),
            A.expand(B, -1, -1),
            x @ rows.mT - self.limits.to(x),
            rows.expand(B, -1, -1),
        )

    @torch.no_grad()
    def solve(self, c: Tensor) -> SQPState:
        """Return the solution and its multipliers for costs (B, n)."""
        p, c = self.polytope, self.sign * c.double()
        Q = self.strength * torch.eye(p.n).to(c)
        parts = [t.to(c) if t.numel() else None for t in (p.G, p.h, p.A, p.b)]
        x, duals = self._layer(Q, c, *parts, lower=0.0, upper=p.upper if self.bounded else None)
        bounds = [(-duals.bounds).clamp(min=0), *([duals.bounds.clamp(min=0)] if self.bounded else [])]
        return x, duals.A, torch.cat([duals.G, *bounds], 1)


class InteriorProgram:
    """The program smoothed by a function of the distances to its inequalities, with equality constraints alone."""

    def __init__(self, polytope: Polytope, strength: float, sign: float, scalar: Scalar) -> None:
        self.polytope, self.strength, self.sign, self.scalar = polytope, strength, sign, scalar
        eye = torch.eye(polytope.n, dtype=torch.float64)
        bounded = polytope.upper < torch.inf
        self.slopes = torch.cat([eye, *([-eye] if bounded else []), -polytope.G])
        upper = [torch.full((polytope.n,), polytope.upper, dtype=torch.float64)] if bounded else []
        self.offsets = torch.cat([torch.zeros(polytope.n, dtype=torch.float64), *upper, polytope.h])
        self.start = self._inside()

    def update(self) -> NewtonStep:
        """Return the step that is folded."""
        return NewtonStep(self)

    def _inside(self) -> Tensor:
        """Return the point (n,) of the polytope that is farthest from all bounds.

        Raises InputError where the inequalities leave no point inside.
        """
        from scipy.optimize import linprog

        p, (m, n) = self.polytope, self.slopes.shape
        A = torch.cat([p.A, torch.zeros(len(p.A), 1, dtype=torch.float64)], 1).numpy()
        rows = torch.cat([-self.slopes, torch.ones(m, 1, dtype=torch.float64)], 1).numpy()
        cost = [0.0] * n + [-1.0]
        found = linprog(cost, rows, self.offsets.numpy(), A, p.b.numpy(), bounds=[(None, None)] * n + [(None, 1.0)])
        if found.status != 0 or found.x[-1] <= 0:
            raise InputError(
                "The polytope has no point that satisfies all inequalities strictly, so entropy and barrier have no "
                "value; take task.smoothing=quadratic."
            )
        return torch.from_numpy(found.x[:-1])

    def distances(self, x: Tensor) -> Tensor:
        """Return the distances (B, m) of points (B, n) to the inequalities."""
        return x @ self.slopes.to(x).mT + self.offsets.to(x)

    def objective(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the smoothed objective, (B,)."""
        return self.sign * (c * x).sum(1) + self.strength * self.scalar.value(self.distances(x)).sum(1)

    def slope_and_hessian(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient (B, n) and Hessian (B, n, n) of the smoothed objective."""
        t, slopes = self.distances(x), self.slopes.to(x)
        gradient = self.sign * c + self.strength * (self.scalar.first(t) @ slopes)
        return gradient, self.strength * (slopes.mT @ (self.scalar.second(t)[:, :, None] * slopes))

    def newton(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradient (B, n), Newton step (B, n) and the multipliers (B, k) of A x = b at a point inside.

        The system is solved in the variables x / sqrt(t), t the distance to the nearer bound: an entropy has points at
        which x is 1e-20 and the second derivative 1e20.
        """
        B, (k, n) = len(x), self.polytope.A.shape
        gradient, hessian = self.slope_and_hessian(x, c)
        scale = torch.diagonal(hessian, dim1=1, dim2=2).detach().rsqrt()
        A = self.polytope.A.to(x) * scale[:, None, :]
        top = torch.cat([hessian * scale[:, :, None] * scale[:, None, :], A.mT], 2)
        bottom = torch.cat([A, A.new_zeros(B, k, k)], 2)
        missing = self.polytope.b.to(x) - x @ self.polytope.A.to(x).mT
        found = torch.linalg.solve(torch.cat([top, bottom], 1), torch.cat([-gradient * scale, missing], 1))
        return gradient, found[:, :n] * scale, found[:, n:]

    @torch.no_grad()
    def solve(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the solution and its multipliers for costs (B, n), by Newton's method from a point inside.

        Boyd and Vandenberghe, Convex Optimization (2004), section 10.2: every iterate satisfies A x = b.
        Raises SolverError if a sample does not get there.
        """
        c = c.double()
        x = self.start.to(c).expand(len(c), -1).clone()
        for _ in range(MAX_STEPS):
            gradient, step, nu = self.newton(x, c)
            decrease, value = -(gradient * step).sum(1), self.objective(x, c)
            if bool((decrease <= DECREMENT * (1 + value.abs())).all()):
                for _ in range(FULL_STEPS):
                    x, (_, step, nu) = x + step, self.newton(x + step, c)
                return x, nu
            if not bool(value.isfinite().all() and step.isfinite().all()):
                break
            x = self._searched(x, c, step, decrease, value)
        raise SolverError(
            f"Newton's method did not solve the smoothed program of a sample in {MAX_STEPS} steps, or its solution is "
            f"nearer to a bound than numbers can tell; raise task.strength, as {self.strength:.3g} is small for costs "
            f"of up to {float(c.abs().max()):.3g}."
        )

    def _searched(self, x: Tensor, c: Tensor, step: Tensor, decrease: Tensor, value: Tensor) -> Tensor:
        """Return x after the longest step of a halving sequence that stays inside and decreases the objective."""
        t, change = self.distances(x), step @ self.slopes.to(x).mT
        length = torch.where(change < 0, -INSIDE * t / change, 1.0).amin(1).clamp(max=1.0)
        noise = 1e-14 * (1 + value.abs())
        for _ in range(BACKTRACKS):
            short = self.objective(x + length[:, None] * step, c) > value - ARMIJO * length * decrease + noise
            if not bool(short.any()):
                break
            length = torch.where(short, SHRINK * length, length)
        return x + length[:, None] * step


class NewtonStep(nn.Module):
    """One Newton step on an interior program: (x, nu) and the costs to the next (x, nu).

    At the solution Phi = 0, so that folding it is one solve of the step's own linear system.
    """

    def __init__(self, program: InteriorProgram) -> None:
        super().__init__()
        self.program = program

    def forward(self, state: tuple[Tensor, Tensor], c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after one step."""
        _, step, nu = self.program.newton(state[0], c)
        return state[0] + step, nu

    def inverse(self, g: Tensor, transposed: bool, *_: object) -> Tensor:
        """Return the solution of v = Phi^T v + g, which is g."""
        return g


def smoothed(polytope: Polytope, smoothing: str, strength: float, sign: float) -> QuadraticProgram | InteriorProgram:
    """Return the smoothed program; sign: 1 for costs, -1 for values. Raises InputError for an unknown smoothing."""
    if smoothing not in SMOOTHINGS:
        raise InputError(f"task.smoothing={smoothing!r} is unknown; choose one of {SMOOTHINGS}.")
    if smoothing == "quadratic":
        return QuadraticProgram(polytope, strength, sign)
    return InteriorProgram(polytope, strength, sign, INTERIOR[smoothing])
