"""A batched interior point for quadratic programs with two-sided rows, the engine's own first solver."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.qp._operations import dense, numbers
from foldopt.qp._program import TINY, Program

REGULARIZATION = 1e-9  # added to the linear systems; residuals are computed without it
FRACTION = 0.995  # of the longest step that stays inside
PATIENCE = 15  # iterations without progress before a sample gives up


class Iterate(NamedTuple):
    """The points x (B, n), multipliers y (B, r) of l <= Cx <= u (positive at u), and relative residuals (B,)."""

    x: Tensor
    y: Tensor
    residual: Tensor


def interior_point(program: Program, *, tol: float = 1e-10, max_iter: int = 200) -> Iterate:
    """Solve equilibrated programs that have the same equality rows by Mehrotra's predictor-corrector method.

    Every sample has its own step lengths, and leaves the batch when its residual is below `tol` or stops falling. The
    linear systems are reduced to x and the equalities, regularized, and refined once, so that equalities may depend on
    each other.

    Source: Nocedal and Wright, Numerical Optimization (2006), section 16.6; Colombo and Gondzio (2008) for the weighted
    corrector; PIQP (Schwan et al., 2023) for the proximal regularization.
    """
    B = len(program.q)
    out = Iterate(
        torch.zeros_like(program.q), torch.zeros_like(program.lower), torch.full_like(program.q[:, 0], torch.inf)
    )
    run = _Run(program)
    left = torch.arange(B, device=program.q.device)
    idle = torch.zeros(B, dtype=torch.long, device=program.q.device)
    done = torch.zeros(
        B, dtype=torch.bool, device=program.q.device
    )  # finished samples stay in `run` until half of them are
    for _ in range(max_iter + 1):
        now = run.measure()
        better = (now < out.residual[left]) & ~done[left]
        progress = now < 0.8 * out.residual[left]
        rows = left[better]
        out.x[rows], out.y[rows] = run.x[better], run.multipliers()[better]
        out.residual[rows] = now[better]
        idle[left] = torch.where(progress, 0, idle[left] + 1)
        going = (out.residual[left] > tol) & (idle[left] < PATIENCE) & now.isfinite() & ~done[left]
        done[left] = ~going
        if not going.any():
            break
        if 2 * int(going.sum()) <= len(left):
            run.keep(going)
            left = left[going]
        run.advance()
    return out


class _Run:
    """The iterates of the samples that are not finished."""

    x: Tensor
    nu: Tensor
    s: Tensor
    z: Tensor

    def __init__(self, program: Program) -> None:
        self.program = program
        is_equality = program.equality[0] if len(program.lower) else program.equality.any(0)
        self.e, self.i = is_equality.nonzero()[:, 0], (~is_equality).nonzero()[:, 0]
        self._split()
        lower = program.lower[:, self.i].isfinite()
        self.two_sided = bool(lower.any())
        self._limits()
        self._start()

    def _split(self) -> None:
        p, C = self.program, dense(self.program.C)
        self.A, self.b = C[:, self.e], p.upper[:, self.e]
        self.G = C[:, self.i]
        self.quadratic = numbers(p.H).any(1)
        self.forced = self.quadratic | (p.q != 0).any(1)

    def _limits(self) -> None:
        upper, lower = self.program.upper[:, self.i], self.program.lower[:, self.i]
        limits = torch.cat([upper, -lower], 1) if self.two_sided else upper
        self.there = limits.isfinite()
        self.limits = torch.where(self.there, limits, 0.0)
        self.count = self.there.sum(1).clamp(min=1).to(limits)

    def keep(self, going: Tensor) -> None:
        """Drop all samples but those in the mask `going` (B,)."""
        self.program = self.program.at(going)
        self._split()
        self._limits()
        self.x, self.nu, self.s, self.z = (part[going] for part in (self.x, self.nu, self.s, self.z))
        self._residuals()

    def sides(self, v: Tensor) -> Tensor:
        """Return (v, -v), for the upper and the lower limits; v alone if there are no lower limits."""
        return torch.cat([v, -v], 1) if self.two_sided else v

    def joined(self, w: Tensor) -> Tensor:
        """Apply the transpose of `sides`."""
        if not self.two_sided:
            return w
        upper, lower = w.chunk(2, 1)
        return upper - lower

    def multipliers(self) -> Tensor:
        """Return the multipliers y of all rows, (B, r)."""
        y = self.x.new_zeros(len(self.x), self.program.C.shape[1])
        y[:, self.e], y[:, self.i] = self.nu, self.joined(self.z)
        return y

    def _residuals(self) -> None:
        p = self.program
        self.Hx, self.Gx = matvec(p.H, self.x), matvec(self.G, self.x)
        self.pulled = matvec(self.A.mT, self.nu) + matvec(self.G.mT, self.joined(self.z))
        self.rd = self.Hx + p.q + self.pulled
        self.re = matvec(self.A, self.x) - self.b
        self.ri = torch.where(self.there, self.sides(self.Gx) + self.s - self.limits, 0.0)
        self.gap = (self.s * self.z).sum(1)

    def measure(self) -> Tensor:
        """Return the largest of the relative residuals and the relative gap, (B,)."""
        self._residuals()
        p = self.program
        dual = torch.stack([_most(self.Hx), _most(p.q), _most(self.pulled)]).amax(0)
        dual = torch.where(self.forced, dual, 1.0)
        size = _most(self.x)
        primal = torch.stack([size, _most(self.Gx), _most(self.b)]).amax(0).clamp(min=TINY)
        objective = 0.5 * (self.x * self.Hx).sum(1) + (p.q * self.x).sum(1)
        cost = torch.maximum(objective.abs(), 1e-3 * dual * primal)
        worst = torch.stack(
            [_most(self.rd) / dual, _most(self.re) / primal, _most(self.ri) / primal, self.gap / cost.clamp(min=TINY)]
        )
        return worst.amax(0).nan_to_num(nan=torch.inf)

    def _factor(self, weights: Tensor) -> None:
        """Factor [[H + G'diag(weights)G + rho, A'], [A, -rho]]."""
        n, k = self.x.shape[1], self.A.shape[1]
        self.weights = weights
        M = dense(self.program.H) + self.G.mT @ (weights[:, :, None] * self.G)
        M.diagonal(dim1=1, dim2=2).add_(REGULARIZATION)
        if k:
            K = M.new_zeros(len(M), n + k, n + k)
            K[:, :n, :n], K[:, n:, :n], K[:, :n, n:] = M, self.A, self.A.mT
            K.diagonal(dim1=1, dim2=2)[:, n:] = -REGULARIZATION
            M = K
        self.lu, self.pivots, _ = lu_factor(M)

    def _solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        n = self.x.shape[1]
        dx, dnu = torch.zeros_like(r1), torch.zeros_like(r2)
        a, b = r1, r2
        for step in range(2):
            if step:
                a = r1 - matvec(self.program.H, dx) - matvec(self.A.mT, dnu)
                a = a - matvec(self.G.mT, self.weights * matvec(self.G, dx))
                b = r2 - matvec(self.A, dx)
            found = torch.linalg.lu_solve(self.lu, self.pivots, torch.cat([a, b], 1)[:, :, None])[:, :, 0]
            dx, dnu = dx + found[:, :n], dnu + found[:, n:]
        return dx, dnu

    def _start(self) -> None:
        """Set Mehrotra's starting point: a least-squares solution, moved into the interior."""
        p = self.program
        B, m = len(p.q), self.G.shape[1]
        self.x = torch.zeros_like(p.q)
        self._factor(p.q.new_ones(B, m))
        target = torch.zeros_like(p.lower[:, self.i]).clamp(p.lower[:, self.i], p.upper[:, self.i])
        self.x, self.nu = self._solve(matvec(self.G.mT, target) - p.q, self.b)
        s = self.limits - self.sides(matvec(self.G, self.x))
        z = -s

        def least(v: Tensor) -> Tensor:
            return _least(torch.where(self.there, v, torch.inf))

        s = s + (-1.5 * least(s)).clamp(min=0)[:, None]
        z = z + (-1.5 * least(z)).clamp(min=0)[:, None]
        floor = 1e-3 * _most(self.x).clamp(min=1)[:, None]
        s, z = torch.where(self.there, s, 1.0), torch.where(self.there, z, 0.0)
        product = (s * z).sum(1, keepdim=True)
        s_sum, z_sum = (torch.where(self.there, v, 0.0).sum(1, keepdim=True).clamp(min=TINY) for v in (s, z))
        s = s + (0.5 * product / z_sum).maximum(floor)
        z = z + (0.5 * product / s_sum).maximum(floor)
        self.s, self.z = torch.where(self.there, s, 1.0), torch.where(self.there, z, 0.0)

    def advance(self) -> None:
        """Take one predictor-corrector step; `measure` has computed the residuals."""
        ratio = self.ratio = self.z / (self.s + REGULARIZATION * self.z)
        half = ratio.shape[1] // 2
        self._factor(ratio[:, :half] + ratio[:, half:] if self.two_sided else ratio)
        mu = self.gap / self.count
        rc = self.s * self.z
        dx, dnu, ds, dz = self._direction(rc)
        a_p, a_d = self._lengths(ds, dz)
        reach = ((self.s + a_p * ds) * (self.z + a_d * dz)).sum(1) / self.count
        sigma = (reach / mu.clamp(min=TINY)).clamp(0, 1) ** 3
        a = torch.minimum(a_p, a_d)
        rc = torch.where(self.there, rc + a * dz * ds - (sigma * mu)[:, None], 0.0)
        dx, dnu, ds, dz = self._direction(rc)
        a_p, a_d = self._lengths(ds, dz)
        fraction = torch.maximum(1 - mu, torch.full_like(mu, FRACTION)).clamp(max=1 - 1e-6)[:, None]
        free = (~self.there).all(1, keepdim=True)
        a_p, a_d = (torch.where(free, 1.0, torch.where(a < 1, fraction * a, 1.0)) for a in (a_p, a_d))
        self.x, self.s = self.x + a_p * dx, self.s + a_p * ds
        self.nu, self.z = self.nu + a_d * dnu, self.z + a_d * dz

    def _direction(self, rc: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ratio, shifted = self.ratio, self.s + REGULARIZATION * self.z
        weighted = torch.where(self.there, ratio * self.ri - rc / shifted, 0)
        dx, dnu = self._solve(-self.rd - matvec(self.G.mT, self.joined(weighted)), -self.re)
        moved = self.sides(matvec(self.G, dx))
        dz = torch.where(self.there, ratio * moved + weighted, 0)
        return dx, dnu, torch.where(self.there, REGULARIZATION * dz - self.ri - moved, 0), dz

    def _lengths(self, ds: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Return the longest primal and dual steps in [0, 1] that keep s and z positive, equal if H is not zero."""
        primal, dual = _longest(self.s, ds)[:, None], _longest(self.z, dz)[:, None]
        both = torch.minimum(primal, dual)
        quadratic = self.quadratic[:, None]
        return torch.where(quadratic, both, primal), torch.where(quadratic, both, dual)


def _most(a: Tensor) -> Tensor:
    return a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))


def _least(a: Tensor) -> Tensor:
    return a.amin(1) if a.shape[1] else a.new_zeros(len(a))


def _longest(value: Tensor, change: Tensor) -> Tensor:
    if not value.shape[1]:
        return value.new_ones(len(value))
    return torch.where(change < 0, -value / change, torch.inf).amin(1).clamp(max=1)
