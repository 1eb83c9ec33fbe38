"""The homogeneous embedding of a quadratic cone program, and Mehrotra's steps towards its solution.

Its variables are x, z and s of the program min x'Px/2 + q'x, Ax + s = b, s in K, and two numbers tau and kappa. If
tau > 0 in the limit, x / tau solves the program; otherwise x or z proves that there is no solution (Goulart and Chen,
Clarabel, 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.cones._scaling import TINY, Blocks, Scaling

REGULARIZATION = 1e-10  # added to the diagonal of the linear systems; refinement removes its effect
REFINEMENTS = 1
FRACTION = 0.99  # of the longest step that stays inside the cones


class Program(NamedTuple):
    """A batch of programs with P (B, n, n), q (B, n), A (B, m, n) and b (B, m).

    The first `zeros` rows are equalities, then `lines` inequalities and then second-order cones follow. `blocks` has
    the cones of all rows but the equalities.
    """

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    blocks: Blocks
    zeros: int
    lines: int

    def at(self, index: Tensor) -> Program:
        """Return the programs of the samples in `index`."""
        return self._replace(P=self.P[index], q=self.q[index], A=self.A[index], b=self.b[index])


class Embedding:
    """The iterates of a batch: x (B, n), z and s (B, m), tau and kappa (B,), strictly inside the cones."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.e = program.blocks.unit(program.q)
        self._start()

    def _start(self) -> None:
        """Set the first iterate: a least-squares solution, moved into the cone."""
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
        """Drop all samples but those in the mask `going` (B,)."""
        self.program = self.program.at(going)
        for name in ("x", "z", "s", "tau", "kappa", "Px", "rx", "rz", "rt", "mu"):
            setattr(self, name, getattr(self, name)[going])

    def alive(self) -> Tensor:
        """Return which iterates are finite and strictly inside the cones, (B,) bool."""
        zeros, blocks = self.program.zeros, self.program.blocks
        inside = torch.minimum(blocks.least(self.s[:, zeros:]), blocks.least(self.z[:, zeros:])) > 0
        return inside & (self.mu > TINY) & self.mu.isfinite() & self.x.isfinite().all(1)

    def measure(self) -> Tensor:
        """Return the residuals of the iterates as solutions, as proofs of infeasibility and of unboundedness, (3, B).

        For a solution it is the largest of the relative residuals and the relative gap. For a proof of infeasibility it
        is the largest entry of A'z after scaling to b'z = -1; for one of unboundedness the largest entry of Px and
        Ax + s after scaling to q'x = -1.
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

        E are the equalities, L and S are W^-1 times the inequalities and times the rows of second-order cones. The
        inequalities are eliminated; the second-order cones are not, because W^-2 would square their condition number.
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
        """Take one predictor-corrector step; `measure` has computed the residuals."""
        P, q, _, b, blocks, zeros, _ = self.program
        self._factor(Scaling(blocks, self.s[:, zeros:], self.z[:, zeros:]))
        level, rz = self._scaled(b), self._scaled(self.rz)
        fixed = self._solve(-q, level)
        away = fixed[0] - self.x / self.tau[:, None]
        pivot = -(away * matvec(P, away)).sum(1) - fixed[1][:, zeros:].square().sum(1) - self.kappa / self.tau
        slope, point = q + 2 * self.Px / self.tau[:, None], self.scaling.point

        def direction(share: Tensor, square: Tensor, product: Tensor) -> tuple[Tensor, ...]:
            """Return the steps of x, of scaled z and s, of tau and of kappa.

            They reduce the residuals by the factor 1 - `share`, the product of s and z by `square`, and that of kappa
            and tau by `product`.
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
        """Return W^-1 v in the rows of cones and v in the equalities."""
        zeros = self.program.zeros
        return torch.cat([v[:, :zeros], self.scaling.divided(v[:, zeros:])], 1)

    def _length(self, dz: Tensor, ds: Tensor, dtau: Tensor, dkappa: Tensor) -> Tensor:
        """Return the longest step that stays inside the cones, (B,)."""
        blocks, point = self.program.blocks, self.scaling.point
        lengths = [blocks.longest(point, ds), blocks.longest(point, dz)]
        lengths += [torch.where(d < 0, -v / d, torch.inf) for v, d in ((self.tau, dtau), (self.kappa, dkappa))]
        return torch.stack(lengths).amin(0)


def largest(a: Tensor) -> Tensor:
    """Return the largest absolute entry of each row of a (B, n); 0 if n = 0."""
    return a.abs().amax(1) if a.shape[1] else a.new_zeros(len(a))
