"""Bilinear programs (paper section 6): max c'x + x'Qy + d'y over 0 <= x, y <= 1, sum x = p, sum y = q.

The objective is linear in x given y and in y given x, so that x and y are vertices at an optimum. The optimum is a
piecewise constant function of (c, d), and its gradient is zero wherever it exists. The harness therefore folds the
*smoothed* program, whose objective has h(x) + h(y) subtracted (`experiments.bilinear.smoothing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from math import comb
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.bilinear.smoothing import (
    BlockStep,
    Entropy,
    GradientStep,
    Quadratic,
    SmoothedSolution,
    Smoothing,
    maximize,
    objective,
    project,
)
from experiments.contracts.problem import Forward, Problem, Step
from experiments.numerics.checks import require_finite
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError
from foldopt.layers import f_pgd_b
from foldopt.solvers.gurobi import GlobalSolution, GurobiNonconvexQP
from foldopt.updates import ProjectedGradient

MAX_VERTICES = 100_000
CHUNK = 10_000_000  # most numbers that the enumeration holds at a time
SMOOTHINGS: dict[str, Callable[[float], Smoothing]] = {"quadratic": Quadratic, "entropy": Entropy}


class Vertex(NamedTuple):
    """An optimum of the program without smoothing, float64: x and y, (B, n) of zeros and ones; its value, (B,)."""

    x: Tensor
    y: Tensor
    value: Tensor


class BilinearProblem(Problem):
    """The bilinear program of one matrix Q, with and without smoothing.

    States and decisions are z = (x, y), (B, 2n).

    Args:
        Q: (n, n).
        p: Sum of x, a whole number in 1..n-1.
        q: Sum of y, a whole number in 1..n-1.
        kappa: Strength of the smoothing relative to sigma = |C Q C|_2, where C is the projection on sum 0; 0 for no
            smoothing. The smoothed program is convex from kappa = 1 on.
        smoothing: "quadratic": h(x) = kappa sigma / 2 |x|^2; or "entropy": h(x) = kappa sigma / 4 times the sum of
            x log x + (1 - x) log(1 - x).
        stepsize: Stepsize of projected gradient relative to 1 / (sigma max(kappa, 1)), below 2. The gradient of the
            folded layer does not depend on it.
        starts: Number of points from which the smoothed program is maximized.
        time_limit: Seconds for Gurobi, per instance.

    Raises:
        InputError: An argument is out of range.
    """

    forwards: ClassVar[Mapping[str, Forward]] = {"exact": Forward(tol=1e-6), "gurobi": Forward(tol=1e-3)}
    lacking: ClassVar[Mapping[str, str]] = {
        "cvxpy": "x'Qy makes its problem nonconvex, and cvxpy takes convex programs only",
        "qp": "x'Qy makes its quadratic program nonconvex, and qpth's interior point would find any stationary point",
    }

    def __init__(
        self,
        Q: Tensor,
        p: int,
        q: int,
        kappa: float,
        smoothing: str = "quadratic",
        stepsize: float = 1.0,
        starts: int = 8,
        time_limit: float = 120.0,
    ) -> None:
        if Q.dim() != 2 or Q.shape[0] != Q.shape[1] or len(Q) < 2 or not Q.isfinite().all():
            raise InputError(f"Q of shape {tuple(Q.shape)}: expected a finite square (n, n) matrix, n at least 2.")
        self.Q, self.n, self.totals = Q.detach().double().cpu(), len(Q), (p, q)
        for name, total in (("p", p), ("q", q)):
            require_whole(name, total, 1)
            if total >= self.n:
                raise InputError(
                    f"{name}={total} leaves no choice among n={self.n} variables in [0, 1]; choose a smaller {name}."
                )
        if not 0 <= kappa < torch.inf:
            raise InputError(f"kappa={kappa}: the strength of the smoothing must be a number of at least 0.")
        if smoothing not in SMOOTHINGS:
            raise InputError(f"smoothing={smoothing!r} is unknown; choose one of {sorted(SMOOTHINGS)}.")
        require_positive("stepsize", stepsize)
        if stepsize >= 2:
            raise InputError(f"stepsize={stepsize}: projected gradient needs a stepsize below 2.")
        require_whole("starts", starts, 1)
        require_positive("time_limit", time_limit)
        centred = self.Q - self.Q.mean(0)
        self.sigma = float(torch.linalg.matrix_norm(centred - centred.mean(1, keepdim=True), 2))
        if self.sigma <= 1e-12 * float(self.Q.abs().max()):
            raise InputError(
                f"Q of shape {tuple(Q.shape)}: on the feasible set x'Qy is a function of x plus one of y, so that the "
                "program is linear; add these functions to c and d."
            )
        self.kappa, self.kind, self.time_limit = float(kappa), smoothing, float(time_limit)
        self.smoothing = SMOOTHINGS[smoothing](kappa * self.sigma / (4 if smoothing == "entropy" else 1))
        self.stepsize = stepsize / (self.sigma * max(kappa, 1.0))
        self.starts = self.spread(min(starts, self.n))
        self.centre = torch.tensor(self.totals, dtype=torch.float64).repeat_interleave(self.n) / self.n
        self.timeouts = 0
        self._gurobi: tuple[float, GurobiNonconvexQP] | None = None  # the penalty's weight, and the model with it

    @property
    def optimizers(self) -> Mapping[str, Callable[[], Step]]:
        """Update steps that can be folded, by name, the default first.

        "pgd" is projected gradient with the projection in closed form. "pgd_b" projects by a folded ADMM, as the
        paper's f-PGDb does. "block" maximizes over both blocks at once. With entropy only "block" is available, as the
        gradient of entropy is infinite at the bounds.
        """
        block: dict[str, Callable[[], Step]] = {"block": lambda: BlockStep(self.Q, self.totals, self.smoothing)}
        smoothing = self.smoothing
        if not isinstance(smoothing, Quadratic):
            return block
        nested: dict[str, Callable[[], Step]] = {
            "pgd_b": lambda: f_pgd_b(self._loss, self.polyhedron, self._forward, self.stepsize).update
        }
        if not self.kappa:
            return {
                "pgd": lambda: ProjectedGradient(self._loss, lambda z, *_: project(z, self.totals), self.stepsize),
                **nested,
            }
        step: dict[str, Callable[[], Step]] = {
            "pgd": lambda: GradientStep(self.Q, self.totals, smoothing, self.stepsize)
        }
        return {**step, **nested, **block}

    def unrolled(self, optimizer: str) -> tuple[Callable[..., Tensor], Step]:
        """Return the cold start z = (p/n, q/n) and the step to unroll from there."""
        return lambda c, d: self.centre.to(c).expand(len(c), -1), self.optimizers[optimizer]()

    def solve(self, forward: str, c: Tensor, d: Tensor, **options: float) -> Tensor:
        """Return the state at the optimum of the smoothed program that the solver `forward` finds."""
        if forward == "gurobi":
            return self.smoothed_gurobi(c, d)
        return self._forward(c, d)

    def _forward(self, c: Tensor, d: Tensor) -> Tensor:
        found = self.smoothed(c, d) if self.kappa else self.vertex(c, d)
        return torch.cat([found.x, found.y], 1)

    def decide(self, c: Tensor, d: Tensor) -> Tensor:
        """Return optimal decisions (B, 2n) of the program without smoothing."""
        found = self.vertex(c, d)
        return torch.cat([found.x, found.y], 1)

    def value(self, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return c'x + x'Qy + d'y of each sample, (B,)."""
        return objective(self.Q, z, c, d)

    def smoothed_value(self, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return the value minus the penalties h(x) + h(y), (B,)."""
        return self.value(z, c, d) - self.smoothing.penalty(z) if self.kappa else self.value(z, c, d)

    def vertex(self, c: Tensor, d: Tensor) -> Vertex:
        """Solve the program without smoothing by enumeration, batched, in float64.

        The vertices of the block that has fewer of them are enumerated. Given one of them, the best vertex of the other
        block selects its largest coefficients.

        Raises:
            InputError: A shape is wrong, c or d holds NaN or inf (with the batch indices), or there are more than
                100,000 vertices to enumerate.
        """
        c, d = self._checked(c, d)
        Q, (p, q) = self.Q.to(c), self.totals
        if comb(self.n, q) < comb(self.n, p):
            y, x, value = _enumerated(Q.mT, d, c, q, p)
        else:
            x, y, value = _enumerated(Q, c, d, p, q)
        return Vertex(x, y, value)

    def smoothed(self, c: Tensor, d: Tensor, starts: Tensor | None = None) -> SmoothedSolution:
        """Solve the smoothed program from several starts to machine precision; see `maximize`.

        Args:
            c: (B, n).
            d: (B, n).
            starts: Points x to start from, (K, n) or (B, K, n); None takes vertices spread over the coordinates.

        Raises:
            InputError: kappa is 0, a shape is wrong, or c or d holds NaN or inf.
        """
        if not self.kappa:
            raise InputError("kappa=0: there is no smoothed program; call vertex, or take kappa above 0.")
        c, d = self._checked(c, d)
        starts = (self.starts if starts is None else starts).to(c)
        return maximize(self.Q.to(c), c, d, self.totals, self.smoothing, starts.expand(len(c), *starts.shape[-2:]))

    def gurobi(self, c: Tensor, d: Tensor, smoothed: bool = True) -> GlobalSolution:
        """Solve one instance after the other to proven global optimality by Gurobi, within `time_limit` seconds each.

        Args:
            c: (B, n).
            d: (B, n).
            smoothed: Whether to subtract the quadratic penalties.

        Raises:
            InputError: The smoothed program has entropy penalties, which Gurobi does not take.
        """
        if smoothed and self.kind == "entropy":
            raise InputError("smoothing='entropy': Gurobi solves quadratic programs only; choose forward=exact.")
        c, d = self._checked(c, d)
        weight = self.kappa * self.sigma if smoothed else 0.0
        if self._gurobi is None or self._gurobi[0] != weight:
            eye = weight * torch.eye(self.n, dtype=torch.float64)
            H = torch.cat([torch.cat([eye, -self.Q], 1), torch.cat([-self.Q.mT, eye], 1)])
            A = torch.eye(2, dtype=torch.float64).repeat_interleave(self.n, dim=1)
            self._gurobi = weight, GurobiNonconvexQP(H, A, torch.tensor(self.totals).double(), self.time_limit)
        found = self._gurobi[1](-torch.cat([c, d], 1))
        self.timeouts += int(found.timed_out.sum())
        return found

    def smoothed_gurobi(self, c: Tensor, d: Tensor) -> Tensor:
        """Return Gurobi's best point of the smoothed program within the time limit, polished by `smoothed`; (B, 2n)."""
        z = self.gurobi(c, d).x
        if not self.kappa:
            return z.round()
        found = self.smoothed(c, d, starts=z[:, None, : self.n])
        return torch.cat([found.x, found.y], 1)

    def polyhedron(self, c: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the feasible set as (G, h, A, b), without the redundant bounds z <= 1 of a block that sums to 1."""
        eye = torch.eye(2 * self.n, dtype=c.dtype, device=c.device)
        capped = torch.cat([eye[k * self.n : (k + 1) * self.n] for k in (0, 1) if self.totals[k] > 1] or [eye[:0]])
        h = torch.cat([c.new_zeros(2 * self.n), c.new_ones(len(capped))])
        A = torch.eye(2, dtype=c.dtype, device=c.device).repeat_interleave(self.n, dim=1)
        return torch.cat([-eye, capped]), h, A, torch.tensor(self.totals).to(c)

    def spectral_radius(self, z: Tensor) -> Tensor:
        """Return the spectral radius of Phi, (B,), of the default optimizer's step at solutions z (B, 2n)."""
        w = self.smoothing.slopes(z) if self.kind == "entropy" else ((z > 0) & (z < 1)).to(z)
        # With J = R (I - uu') R, R = diag(sqrt w), the eigenvalues of J H are those of (I - uu') R H R (I - uu').
        root = w.sqrt()
        u, v = (r / r.norm(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny) for r in root.chunk(2, 1))
        inner = root[:, : self.n, None] * self.Q.to(z) * root[:, None, self.n :]
        inner = inner - u[:, :, None] * (u[:, None] @ inner)
        inner = inner - (inner @ v[:, :, None]) * v[:, None]
        coupling = torch.linalg.matrix_norm(inner, 2)
        if self.kind == "entropy":
            return coupling
        own = 1 - self.stepsize * self.kappa * self.sigma
        of_x, of_y = ((part.sum(1) - 1).clamp(min=0) for part in w.chunk(2, 1))
        directions = of_x + of_y
        return torch.where(directions > 0, abs(own), 0) + self.stepsize * coupling

    def spread(self, count: int) -> Tensor:
        """Return `count` vertices x, (count, n), evenly spread: p ones in cyclically consecutive places each."""
        first = torch.arange(count) * self.n // count
        where = (first[:, None] + torch.arange(self.totals[0])) % self.n
        return torch.zeros(count, self.n, dtype=torch.float64).scatter(1, where, 1.0)

    def _loss(self, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return -self.smoothed_value(z, c, d)

    def _checked(self, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        for name, value in (("c", c), ("d", d)):
            if value.dim() != 2 or value.shape[1] != self.n or len(value) != len(c):
                raise InputError(
                    f"{name} has shape {tuple(value.shape)}, expected (B, {self.n}) for c and d: one per row of Q."
                )
            require_finite(name, value, "check the predictions")
        return c.detach().double(), d.detach().double()


def _enumerated(Q: Tensor, c: Tensor, d: Tensor, p: int, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best x, y and value over all vertices x with p ones, batched."""
    n, count = len(Q), comb(len(Q), p)
    if count > MAX_VERTICES:
        raise InputError(
            f"p={p} and q={q} of n={n}: {count} vertices are too many to enumerate (at most {MAX_VERTICES}); use "
            "Gurobi instead, problem.gurobi(c, d, smoothed=False)."
        )
    ones = torch.tensor(list(combinations(range(n), p)), device=c.device)
    rows = Q[ones].sum(1)  # (M, n), Q'x of each vertex
    rounds = []
    for c_part, d_part in zip(*(t.split(max(1, CHUNK // (count * n))) for t in (c, d)), strict=True):
        values = c_part[:, ones].sum(2) + (rows + d_part[:, None]).topk(q, dim=2).values.sum(2)
        rounds.append(values.max(1))
    value, best = (torch.cat([r[k] for r in rounds]) for k in (0, 1))
    x = torch.zeros_like(c).scatter(1, ones[best], 1.0)
    y = torch.zeros_like(d).scatter(1, (rows[best] + d).topk(q, dim=1).indices, 1.0)
    return x, y, value
