"""The KKT systems of solved programs on their strongly active rows: what derivatives are solved with."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.qp.kkt import Rows, Spectral
from foldopt.qp.program import Program, Units
from foldopt.solvers.saddle import Saddle, block_factor, block_solve

ROUNDING = 1e-13
TINY_MOVE = 1e-6  # of a row along a unit vector, relative to its entries, that counts as none


class System(Protocol):
    """Solves [[H, S'], [S, 0]] (a, c) = (r1, r2) for S the strong rows; c (B, r) is zero in the others."""

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, c) for r1 (B, n) and r2 (B, r), whose entries off the strong rows are not looked at."""
        ...


class Schur(NamedTuple):
    """By the Schur complement of a positive definite H in the strong rows, which are independent."""

    saddle: Saddle
    strong: Tensor
    root: Tensor
    units: Units

    @classmethod
    def of(cls, saddle: Saddle, H: Tensor, strong: Tensor) -> Schur:
        """Factor the block of the strong rows; in units in which H and the Schur complement have a diagonal of ones."""
        d, e = (part.diagonal(dim1=1, dim2=2).rsqrt() for part in (H, saddle.M))
        return cls(saddle, strong, block_factor(saddle.M, strong), Units(d, e, torch.ones_like(d[:, :1])))

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`."""
        saddle = self.saddle
        half = saddle.halved(r1)
        c = block_solve(self.root, self.strong, matvec(saddle.Y.mT, half) - r2)
        return saddle.completed(half - matvec(saddle.Y, c)), c


class Equilibrated:
    """By the KKT matrix in equilibrated units, by its eigenvalues where it is singular."""

    def __init__(self, scaled: Program, units: Units, strong: Tensor) -> None:
        self.units, self.strong = units, strong
        self.rows = Rows.of(strong)
        self.kkt = Spectral(scaled.H, self.rows.take_rows(scaled.C), self.rows.there)

    def gathered(self, r1: Tensor, r2: Tensor) -> Tensor:
        """Return a right-hand side in the matrix's units, (B, N)."""
        d, e, c = self.units
        return torch.cat([c * d * r1, self.rows.take(e * r2)], 1)

    def spread(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return a solution in the caller's units."""
        d, e, c = self.units
        n = d.shape[1]
        return d * z[:, :n], e * self.rows.put(z[:, n:], e.shape[1]) / c

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`; the solution of least norm, in equilibrated units, where there are many."""
        return self.spread(self.kkt.solve(self.gathered(r1, r2)))


class Restrained(NamedTuple):
    """A system whose x is not unique: of all solutions a, the one that moves some other rows least.

    base: the system. projection: (B, n, n), takes a solution to that one, in the base's units.
    """

    base: Equilibrated
    projection: Tensor

    @classmethod
    def of(cls, base: Equilibrated, rows: Tensor, basis: Tensor) -> Restrained:
        """rows: (B, r, n), zero but for those that are to move least. basis: (B, n, N), of what x may move by."""
        seen = rows @ basis
        seen = torch.where(seen.abs() > TINY_MOVE * rows.abs().sum(2, keepdim=True), seen, 0)
        inverse = torch.linalg.pinv(seen.mT @ seen, rtol=1e-12, hermitian=True)
        eye = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
        return cls(base, eye - basis @ (inverse @ (seen.mT @ rows)))

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`; what it solves with in backward mode is its transpose in forward mode."""
        return self.base.spread(self.found(self.base.gathered(r1, r2)))

    def found(self, r: Tensor) -> Tensor:
        """Return the solution z (B, N) of a gathered right-hand side."""
        z = self.base.kkt.solve(r)
        n = self.projection.shape[1]
        return torch.cat([matvec(self.projection, z[:, :n]), z[:, n:]], 1)


class Mended(NamedTuple):
    """One system for a batch but for some samples, which have their own."""

    most: System
    others: Tensor
    own: System

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`."""
        a, c = self.most.solve(r1, r2)
        a[self.others], c[self.others] = self.own.solve(r1[self.others], r2[self.others])
        return a, c


def solved(
    system: System, H: Tensor, C: Tensor, r1: Tensor, r2: Tensor, scale: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (a, c) of `System` as a function of everything, differentiable to any order.

    H, C: of the program that the system is of. The gradient of H is that of its symmetric part. scale: what a (B, n)
    and c (B, r) are added to, if known. Beside it they are rounding at a solution, and so are the first derivatives
    with respect to H and C, which are then left out.
    """
    found: tuple[Tensor, Tensor] = _Solve.apply(system, H, C, r1, r2, scale)
    return found


def _beside(change: Tensor, value: Tensor) -> bool:
    """Whether a change is rounding beside a value, in every sample."""
    if not change.numel():
        return True
    return bool((change.abs().amax(1) <= ROUNDING * value.abs().amax(1)).all())


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        system: System, H: Tensor, C: Tensor, r1: Tensor, r2: Tensor, scale: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        return system.solve(r1, r2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.system, H, C, _, _, scale = inputs
        ctx.settled = scale is not None and all(map(_beside, output, scale))
        ctx.save_for_backward(H, C, *output)

    @staticmethod
    def backward(ctx: Any, ga: Tensor, gc: Tensor) -> tuple[Tensor | None, ...]:
        H, C, a, c = ctx.saved_tensors
        b1, b2 = _Solve.apply(ctx.system, H, C, ga, gc, None)
        _, of_H, of_C, *_ = ctx.needs_input_grad
        if ctx.settled and not torch.is_grad_enabled():
            of_H = of_C = False
        pair = torch.stack([b1, a], 2)
        gH = -0.5 * pair @ pair.flip(2).mT if of_H else None
        gC = -torch.stack([c, b2], 2) @ pair.mT if of_C else None
        return None, gH, gC, b1, b2, None


def products(H: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Hx, Cx and C'y for symmetric H (B, n, n) and C (B, r, n); the gradient of H is symmetric."""
    found: tuple[Tensor, Tensor, Tensor] = _Products.apply(H, C, x, y)
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(H: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return matvec(H, x), matvec(C, x), matvec(C.mT, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gH_x: Tensor, gC_x: Tensor, gC_y: Tensor) -> tuple[Tensor | None, ...]:
        H, C, x, y = ctx.saved_tensors
        of_H, of_C, of_x, of_y = ctx.needs_input_grad
        pair = torch.stack([gH_x, x], 2)
        gH = 0.5 * pair @ pair.flip(2).mT if of_H else None
        gC = torch.stack([gC_x, y], 2) @ torch.stack([x, gC_y], 2).mT if of_C else None
        gx = matvec(H, gH_x) + matvec(C.mT, gC_x) if of_x else None
        return gH, gC, gx, matvec(C, gC_y) if of_y else None
