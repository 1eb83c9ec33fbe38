"""The homogeneous embedding of a quadratic cone program, and Mehrotra's steps towards its solution.

It has x, z, s of the program min x'Px/2 + q'x, Ax + s = b, s in K, and two numbers: x / tau solves the program if
tau > 0 in the limit; otherwise x or z proves that there is no solution (Goulart and Chen, Clarabel, 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.cones._scaling import TINY, Blocks, Scaling

REGULARIZATION = 1e-10  # of the linear systems; refined against the systems without it
REFINEMENTS = 1
FRACTION = 0.99  # of the way to the boundary


class Program(NamedTuple):
    """P (B, n, n), q (B, n), A (B, m, n), b (B, m).

    Of the rows the first `zeros` are equalities, `lines` inequalities follow, then second-order cones; `blocks` are
    all but the equalities.
    """

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    blocks: Blocks
    zeros: int
    lines: int

    def at(self, index: Tensor) -> Program:
        """Return some samples."""
        return self._replace(P=self.P[index], q=self.q[index], A=self.A[index], b=self.b[index])


class Embedding:
    """The iterates x (B, n), z and s (B, m), tau and kappa (B,), strictly inside of the cones, of a batch."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.e = program.blocks.unit(program.q)
        self._start()

    def _start(self) -> None:
        """Least squares, then shifted into the cone."""
        P, q, _, b, blocks, zeros, _ = self.program
        e = self.e.expand(len(q), -1)
        self._factor(Scaling(blocks, e, e))
        x, minus_s = self._solve(torch.zeros_like(q), b)
        dx, z = self._solve(-q, torch.zeros_like(b))
        quadratic = (P != 0).flatten(1).any(1)[:, None]
        self.x = torch.where(quadratic, x + dx, x)
        z = torch.where(quadratic, z + minus_s, z)
        s = torch.where(quadratic, -z, -minus_s)
        self.z = torch.cat([z[:, :zeros], self._moved_inside(z[:, zeros:])], 1)
        self.s = torch.cat([torch.zeros_like(s[:, :zeros]), self._moved_inside(s[:, zeros:])], 1)
        self.tau, self.kappa = torch.ones_like(q[:, 0]), torch.ones_like(q[:, 0])

    def _moved_inside(self, v: Tensor) -> Tensor:
        least = self.program.blocks.least(v)
        return v + torch.where(least < 1e-3, 1 - least, 0.0)[:, None] * self.e

    def keep(self, going: Tensor) -> None:
        """Go on with some samples only."""
        self.program = self.program.at(going)
        for name in ("x", "z", "s", "tau", "kappa", "Px", "rx", "rz", "rt", "mu"):
            setattr(self, name, getattr(self, name)[going])

    def alive(self) -> Tensor:
        """Return whether the iterates are finite and strictly inside, (B,) bool."""
        zeros, blocks = self.program.zeros, self.program.blocks
        inside = torch.minimum(blocks.least(self.s[:, zeros:]), blocks.least(self.z[:, zeros:])) > 0
        return inside & (self.mu > TINY) & self.mu.isfinite() & self.x.isfinite().all(1)

    def measure(self) -> Tensor:
        """Return the residuals of a solution, and of proofs that there is no point and that there is a ray, (3, B).

        Of a solution: the largest of the relative residuals and the relative gap. Of the proofs: the largest entry of
        A'z where b'z = -1, and of Px and Ax + s where q'x = -1.
        """
        P, q, A, b, blocks, _, _ = self.program
        x, z, s, tau = self.x, self.z, self.s, self.tau[:, None]
        self.Px, Ax, Az = matvec(P, x), matvec(A, x), matvec(A.mT, z)
        xPx, qx, bz = (x * self.Px).sum(1), (q * x).sum(1), (b * z).sum(1)
        self.rx, self.rz = -(self.Px + Az + q * tau), -(s + Ax - b * tau)
        self.rt = -(qx + bz + xPx / self.tau + self.kappa)
        self.mu = ((s * z).sum(1) + self.tau * self.kappa) / (blocks.degree + 1)
        size_x = torch.stack([largest(self.Px), largest(Az), largest(q) * self.tau, self.tau]).amax(0)
        size_z = torch.stack([largest(s), largest(Ax), largest(b) * self.tau, self.tau]).amax(0)
        primal, dual = 0.5 * xPx / self.tau + qx, -0.5 * xPx / self.tau - bz
        objective = torch.maximum(torch.minimum(primal.abs(), dual.abs()), self.tau)
        errors = [largest(self.rx) / size_x, largest(self.rz) / size_z, (primal - dual).abs() / objective]
        no_point, ray = largest(Az) / -bz, torch.maximum(largest(self.Px), largest(Ax + s)) / -qx
        proofs = [torch.where(bz < 0, no_point, torch.inf), torch.where(qx < 0, ray, torch.inf)]
        return torch.stack([torch.stack(errors).amax(0), *proofs]).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def _factor(self, scaling: Scaling) -> None:
        """Factor [[P + L'L + delta, E', S'], [E, -delta, 0], [S, 0, -I]].

        E: the equalities. L, S: W^-1 times the inequalities, which are eliminated, and times the second-order cones,
        which are not: W^-2 would square their condition number.
        """
        P, q, A, _, _, zeros, lines = self.program
        n = q.shape[1]
        self.scaling, self.G = scaling, scaling.divided_columns(A[:, zeros:])
        L, rest = self.G[:, :lines], torch.cat([A[:, :zeros], self.G[:, lines:]], 1)
        K = A.new_zeros(len(q), n + rest.shape[1], n + rest.shape[1])
        K[:, :n, :n] = P + L.mT @ L
        K[:, n:, :n], K[:, :n, n:] = rest, rest.mT
        diagonal = K.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += REGULARIZATION
        diagonal[:, n : n + zeros] = -REGULARIZATION
        diagonal[:, n + zeros :] = -1
        self.lu = lu_factor(K)[:2]

    def _solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Solve Px + E'u + G'w = r, Ex = t (equalities), Gx - w = t (other rows) for x and (u, w), with refinement."""
        P, _, A, _, _, zeros, lines = self.program
        n, E, G = r.shape[1], A[:, :zeros], self.G
        x, w = torch.zeros_like(r), torch.zeros_like(t)
        left_r, left_t = r, t
        for step in range(REFINEMENTS + 1):
            if step:
                left_r = r - matvec(P, x) - matvec(E.mT, w[:, :zeros]) - matvec(G.mT, w[:, zeros:])
                left_t = t - torch.cat([matvec(E, x), matvec(G, x) - w[:, zeros:]], 1)
            equal, line, cone = left_t[:, :zeros], left_t[:, zeros : zeros + lines], left_t[:, zeros + lines :]
            rhs = torch.cat([left_r + matvec(G[:, :lines].mT, line), equal, cone], 1)
            found = torch.linalg.lu_solve(*self.lu, rhs[:, :, None])[:, :, 0]
            dx, du, dw = found.split([n, zeros, cone.shape[1]], 1)
            x, w = x + dx, w + torch.cat([du, matvec(G[:, :lines], dx) - line, dw], 1)
        return x, w

    def advance(self) -> None:
        """Take one step, of the residuals that `measure` left."""
        P, q, _, b, blocks, zeros, _ = self.program
        self._factor(Scaling(blocks, self.s[:, zeros:], self.z[:, zeros:]))
        level, rz = self._scaled(b), self._scaled(self.rz)
        fixed = self._solve(-q, level)
        away = fixed[0] - self.x / self.tau[:, None]
        pivot = -(away * matvec(P, away)).sum(1) - fixed[1][:, zeros:].square().sum(1) - self.kappa / self.tau
        slope, point = q + 2 * self.Px / self.tau[:, None], self.scaling.point

        def direction(share: Tensor, square: Tensor, product: Tensor) -> tuple[Tensor, ...]:
            """Return the step of x, scaled z and s, tau and kappa.

            It takes `share` off the residuals, and `square` and `product` off the products of s and z and of kappa and
            tau.
            """
            lost = blocks.quotient(point, square)
            t = share[:, None] * rz
            t[:, zeros:] += lost
            x, w = self._solve(share[:, None] * self.rx, t)
            dtau = (share * self.rt + product / self.tau - (slope * x).sum(1) - (level * w).sum(1)) / pivot
            dx, dw = x + dtau[:, None] * fixed[0], w + dtau[:, None] * fixed[1]
            return dx, dw, -lost - dw[:, zeros:], dtau, -(product + self.kappa * dtau) / self.tau

        square, product = blocks.product(point, point), self.kappa * self.tau
        _, dw, ds, dtau, dkappa = direction(torch.ones_like(product), square, product)
        share = self._length(dw[:, zeros:], ds, dtau, dkappa).clamp(max=1)
        target = (1 - share) ** 3 * self.mu
        square = square + blocks.product(ds, dw[:, zeros:]) - target[:, None] * self.e
        share = 1 - (1 - share) ** 3
        dx, dw, ds, dtau, dkappa = direction(share, square, product + dtau * dkappa - target)
        a = (FRACTION * self._length(dw[:, zeros:], ds, dtau, dkappa)).clamp(max=1)
        self.tau, self.kappa = self.tau + a * dtau, self.kappa + a * dkappa
        a = a[:, None]
        dz = torch.cat([dw[:, :zeros], self.scaling.divided(dw[:, zeros:])], 1)
        ds = share[:, None] * self.rz - matvec(self.program.A, dx) + b * dtau[:, None]
        ds[:, :zeros] = 0
        self.x, self.z, self.s = self.x + a * dx, self.z + a * dz, self.s + a * ds

    def _scaled(self, v: Tensor) -> Tensor:
        """Return W^-1 v, and v in equalities."""
        zeros = self.program.zeros
        return torch.cat([v[:, :zeros], self.scaling.divided(v[:, zeros:])], 1)

    def _length(self, dz: Tensor, ds: Tensor, dtau: Tensor, dkappa: Tensor) -> Tensor:
        """Return the longest step that stays inside, (B,)."""
        blocks, point = self.program.blocks, self.scaling.point
        lengths = [blocks.longest(point, ds), blocks.longest(point, dz)]
        lengths += [torch.where(d < 0, -v / d, torch.inf) for v, d in ((self.tau, dtau), (self.kappa, dkappa))]
        return torch.stack(lengths).amin(0)


def largest(a: Tensor) -> Tensor:
    """Return the largest absolute entry of each row of a (B, n), 0 where n = 0."""
    return a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))
