"""The KKT systems of solved programs on their strongly active rows, with which derivatives are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.qp._kkt import Known, Rows, derivative_system
from foldopt.qp._operations import Matrix, joined, masked_rows, outer, split
from foldopt.qp._program import Program, Units
from foldopt.qp._sparse_kkt import SparseKKT, packages
from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.solvers.saddle import Saddle, block_factor, block_solve

ROUNDING = 1e-13
TINY_MOVE = 1e-6  # change of a row along a unit vector, relative to its entries, that counts as zero


class System(Protocol):
    """Solves [[H, S'], [S, 0]] (a, c) = (r1, r2), where S has the strongly active rows; c is 0 in the others."""

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """Return a (B, n) and c (B, r) for r1 (B, n) and r2 (B, r); only the strong rows of r2 are used."""
        ...


class Schur(NamedTuple):
    """Solves by the Schur complement, for a positive definite H and independent strong rows."""

    saddle: Saddle
    strong: Tensor
    root: Tensor
    units: Units

    @classmethod
    def of(cls, saddle: Saddle, H: Tensor, strong: Tensor) -> Schur:
        """Factor the strong rows of the Schur complement, in units in which it and H have a diagonal of ones."""
        d, e = (part.diagonal(dim1=1, dim2=2).rsqrt() for part in (H, saddle.M))
        return cls(saddle, strong, block_factor(saddle.M, strong), Units(d, e, torch.ones_like(d[:, :1])))

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`."""
        saddle = self.saddle
        half = saddle.halved(r1)
        c = block_solve(self.root, self.strong, matvec(saddle.Y.mT, half) - r2)
        return saddle.completed(half - matvec(saddle.Y, c)), c


class Equilibrated:
    """Solves with the KKT matrix in equilibrated units, which may be singular.

    known: sparse systems of the samples that were factored before.
    """

    def __init__(
        self, scaled: Program, units: Units, strong: Tensor, known: Sequence[Known | None] | None = None
    ) -> None:
        self.units, self.strong = units, strong
        self.rows = Rows.of(strong)
        self.kkt = derivative_system(scaled.H, scaled.C, self.rows, known)

    def gathered(self, r1: Tensor, r2: Tensor) -> Tensor:
        """Return the right-hand side (B, N) in equilibrated units."""
        d, e, c = self.units
        return torch.cat([c * d * r1, self.rows.take(e * r2)], 1)

    def spread(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return a solution z (B, N) as (a, c) in the user's units."""
        d, e, c = self.units
        n = d.shape[1]
        return d * z[:, :n], e * self.rows.put(z[:, n:], e.shape[1]) / c

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`; of several solutions, the one of least norm in equilibrated units."""
        return self.spread(self.kkt.solve(self.gathered(r1, r2)))


class Restrained(Protocol):
    """A system with several solutions a; it returns the one that changes some other rows of C least."""

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`. In backward mode it solves with the transpose of what it solves with in forward mode."""
        ...

    def found(self, r: Tensor) -> Tensor:
        """Return the solution z (B, N) for a right-hand side r (B, N) in equilibrated units."""
        ...

    def on(self, base: Equilibrated) -> Restrained:
        """Return the same for a system with fewer rows, which imply the others."""
        ...


def restrained(base: Equilibrated, scaled: Program, others: Tensor) -> Restrained:
    """Return the system `base`, restrained so that its solutions change the rows in the mask `others` (B, r) least."""
    rows = masked_rows(scaled.C, others)
    if isinstance(scaled.H, SparseMatrix) or isinstance(rows, SparseMatrix):
        return SparselyRestrained(base, scaled, others)
    return Projected.of(base, rows, base.kkt.null_vectors()[:, : rows.shape[2]])


class Projected(NamedTuple):
    """`Restrained` for dense matrices.

    base: the system. projection: (B, n, n), maps any solution a to the restrained one, in the units of `base`.
    """

    base: Equilibrated
    projection: Tensor

    @classmethod
    def of(cls, base: Equilibrated, rows: Tensor, basis: Tensor) -> Projected:
        """Restrain the rows (B, r, n), zero in the others; basis (B, n, N) spans the directions in which x may move."""
        seen = rows @ basis
        seen = torch.where(seen.abs() > TINY_MOVE * rows.abs().sum(2, keepdim=True), seen, 0)
        inverse = torch.linalg.pinv(seen.mT @ seen, rtol=1e-12, hermitian=True)
        eye = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
        return cls(base, eye - basis @ (inverse @ (seen.mT @ rows)))

    def on(self, base: Equilibrated) -> Projected:
        """See `Restrained`."""
        return Projected(base, self.projection)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `Restrained`."""
        return self.base.spread(self.found(self.base.gathered(r1, r2)))

    def found(self, r: Tensor) -> Tensor:
        """See `Restrained`."""
        z = self.base.kkt.solve(r)
        n = self.projection.shape[1]
        return torch.cat([matvec(self.projection, z[:, :n]), z[:, n:]], 1)


class SparselyRestrained:
    """`Restrained` for sparse matrices: the KKT system of min 1/2 |t|^2 subject to K z = r, W a = t."""

    def __init__(self, base: Equilibrated, scaled: Program, others: Tensor) -> None:
        self.base, self.scaled, self.others = base, scaled, others
        _, sparse, _ = packages()
        self.parts: list[SparseKKT | None] = []
        self.places: list[Tensor] = []
        for i, bad in enumerate((base.kkt.singular & others.any(1)).tolist()):
            own = base.rows.there[i].nonzero()[:, 0]
            self.places.append(torch.cat([torch.arange(scaled.H.shape[1], device=own.device), scaled.H.shape[1] + own]))
            if not bad:
                self.parts.append(None)
                continue
            H, C = (M.to_scipy(i) for M in (scaled.H, scaled.C) if isinstance(M, SparseMatrix))
            places = base.rows.places[i, base.rows.there[i]].cpu().numpy()
            S, W = C[places], C[others[i].cpu().numpy()]
            n, s, w = H.shape[0], S.shape[0], W.shape[0]
            cost = sparse.diags([0.0] * (n + s) + [1.0] * w)
            equations = sparse.bmat([[H, S.T, None], [S, None, None], [W, None, -sparse.identity(w)]], format="csr")
            self.parts.append(SparseKKT(cost, equations))

    def on(self, base: Equilibrated) -> SparselyRestrained:
        """See `Restrained`."""
        return SparselyRestrained(base, self.scaled, self.others)

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `Restrained`."""
        return self.base.spread(self.found(self.base.gathered(r1, r2)))

    def found(self, r: Tensor) -> Tensor:
        """See `Restrained`."""
        z = self.base.kkt.solve(r)
        for i, part in enumerate(self.parts):
            if part is None:
                continue
            at = self.places[i].to(r.device)
            right = torch.zeros(part.n + part.s, dtype=r.dtype)
            right[part.n : part.n + len(at)] = r[i, at].cpu()
            found, _ = part.solve(right.numpy())
            z[i, at] = torch.as_tensor(found[: len(at)], device=r.device)
        return z


class Mended(NamedTuple):
    """A system for a batch in which the samples `others` have a system of their own."""

    most: System
    others: Tensor
    own: System

    def solve(self, r1: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
        """See `System`."""
        a, c = self.most.solve(r1, r2)
        a[self.others], c[self.others] = self.own.solve(r1[self.others], r2[self.others])
        return a, c


def solved(
    system: System, H: Matrix, C: Matrix, r1: Tensor, r2: Tensor, scale: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the solution (a, c) of `System` as a function of H, C, r1 and r2, differentiable to any order.

    H, C: the matrices of the system's program. The gradient of H is symmetric. scale: the vectors to which a (B, n) and
    c (B, r) will be added, if known. At a solution a and c are rounding errors beside these, and so are the first
    derivatives with respect to H and C, which are then left out.
    """
    (pattern_H, H_values), (pattern_C, C_values) = split(H), split(C)
    patterns = pattern_H, pattern_C
    found: tuple[Tensor, Tensor] = _Solve.apply(system, patterns, H_values, C_values, r1, r2, scale)
    return found


def _beside(change: Tensor, value: Tensor) -> bool:
    """Return whether a change is negligible beside a value in every sample."""
    if not change.numel():
        return True
    return bool((change.abs().amax(1) <= ROUNDING * value.abs().amax(1)).all())


Patterns = tuple[Pattern | None, Pattern | None]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        system: System,
        patterns: Patterns,
        H: Tensor,
        C: Tensor,
        r1: Tensor,
        r2: Tensor,
        scale: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        return system.solve(r1, r2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.system, ctx.patterns, H, C, _, _, scale = inputs
        ctx.settled = scale is not None and all(map(_beside, output, scale))
        ctx.save_for_backward(H, C, *output)

    @staticmethod
    def backward(ctx: Any, ga: Tensor, gc: Tensor) -> tuple[Tensor | None, ...]:
        H, C, a, c = ctx.saved_tensors
        b1, b2 = _Solve.apply(ctx.system, ctx.patterns, H, C, ga, gc, None)
        _, _, of_H, of_C, *_ = ctx.needs_input_grad
        if ctx.settled and not torch.is_grad_enabled():
            of_H = of_C = False
        pair = torch.stack([b1, a], 2)
        gH = -0.5 * outer(ctx.patterns[0], pair, pair.flip(2)) if of_H else None
        gC = -outer(ctx.patterns[1], torch.stack([c, b2], 2), pair) if of_C else None
        return None, None, gH, gC, b1, b2, None


def products(H: Matrix, C: Matrix, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Hx, Cx and C'y for a symmetric H (B, n, n) and C (B, r, n); the gradient of H is symmetric."""
    (pattern_H, H_values), (pattern_C, C_values) = split(H), split(C)
    found: tuple[Tensor, Tensor, Tensor] = _Products.apply((pattern_H, pattern_C), H_values, C_values, x, y)
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(patterns: Patterns, H: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = joined(patterns[1], C)
        return matvec(joined(patterns[0], H), x), matvec(rows, x), matvec(rows.mT, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.patterns, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gH_x: Tensor, gC_x: Tensor, gC_y: Tensor) -> tuple[Tensor | None, ...]:
        H, C, x, y = ctx.saved_tensors
        _, of_H, of_C, of_x, of_y = ctx.needs_input_grad
        rows = joined(ctx.patterns[1], C)
        pair = torch.stack([gH_x, x], 2)
        gH = 0.5 * outer(ctx.patterns[0], pair, pair.flip(2)) if of_H else None
        gC = outer(ctx.patterns[1], torch.stack([gC_x, y], 2), torch.stack([x, gC_y], 2)) if of_C else None
        gx = matvec(joined(ctx.patterns[0], H), gH_x) + matvec(rows.mT, gC_x) if of_x else None
        return None, gH, gC, gx, matvec(rows, gC_y) if of_y else None
