"""Linear systems with the Jacobian of a conic program's optimality conditions, which may be singular.

    J = [[P, A'], [-(I - D) A, D]],   D the derivative of the projection on K.

D is symmetric with eigenvalues between 0 and 1, and J is diag(I, I - D) times a matrix whose symmetric part is positive
semidefinite. Therefore J + shift * diag(I, I - D) is regular. Iterative refinement of its solutions with J converges to
a solution if there is one (the proximal point iteration: Rockafellar, 1976), and the residual that remains is the part
of the right-hand side along the null space.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
from torch import Tensor

from foldopt._conic.form import Data, Form, Matrices
from foldopt.batched import lu_factor
from foldopt.cones import BlockDiagonal
from foldopt.qp._kkt import probe

DENSE = 300  # largest n + m for which the systems of a batch are solved as one dense batch
SHIFT = 1e-8  # the matrices have entries of about 1
SUSPECT = 1e9  # J may be singular if solving enlarges a generic vector by this factor
REFINEMENTS = 6
ALIKE = 1e-3  # the factors of a nearby J are used if one solve with them leaves at most this relative residual
SETTLED = 1e-8  # refinement ends after a correction of this relative size


class Jacobian:
    """The Jacobian J of a batch of equilibrated programs."""

    def __init__(self, form: Form, data: Data, matrices: Matrices, D: BlockDiagonal) -> None:
        self.form, self.data, self.matrices, self.D = form, data, matrices, D

    def at(self, index: Tensor) -> Jacobian:
        """Return the Jacobian of the samples in `index`."""
        groups = tuple((rows, values[index]) for rows, values in self.D.groups)
        data = self.data.at(index)
        return Jacobian(self.form, data, Matrices(self.form, data), BlockDiagonal(groups, self.D.size))

    def times(self, z: Tensor, transposed: bool) -> Tensor:
        """Return Jz, or J'z, (B, n + m)."""
        x, y = z.split([self.form.n, self.form.m], 1)
        if transposed:
            Dy = self.D @ y
            Px, Ax, pulled = self.matrices.times(x, y - Dy)
            return torch.cat([Px - pulled, Ax + Dy], 1)
        Px, Ax, pulled = self.matrices.times(x, y)
        return torch.cat([Px + pulled, self.D @ (Ax + y) - Ax], 1)


class Factor(Protocol):
    """A factorization of J + shift * diag(I, I - D)."""

    def solve(self, r: Tensor, transposed: bool) -> Tensor:
        """Return the solution (B, n + m) of the system or its transpose; not finite if the matrix is singular."""
        ...


class Dense:
    """A factorization of all samples as one dense batch."""

    def __init__(self, J: Jacobian, shift: float) -> None:
        n, m = J.form.n, J.form.m
        P, _, A, _ = J.form.dense(J.data)
        K = P.new_zeros(len(P), n + m, n + m)
        K[:, :n, :n], K[:, :n, n:] = P, A.mT
        K[:, n:, :n] = -A
        for rows, values in J.D.groups:
            into = n + rows
            K[:, into, :n] += values @ A[:, rows]
            eye = torch.eye(rows.shape[1], dtype=P.dtype)
            K[:, into[:, :, None], into[:, None, :]] = values + shift * (eye - values)
        K.diagonal(dim1=1, dim2=2)[:, :n] += shift
        self.lu, self.pivots, _ = lu_factor(K)

    def solve(self, r: Tensor, transposed: bool) -> Tensor:
        """See `Factor`."""
        return torch.linalg.lu_solve(self.lu, self.pivots, r[:, :, None], adjoint=transposed)[:, :, 0]


class Sparse:
    """A factorization of every sample by SuperLU, with additional unknowns that keep the matrix sparse.

    The unknowns are dx, dy and, in cones of several rows, dv = -A dx - dy, the change of v = s - y. The equations are
    P dx + A'dy = r1; -(1 - D) A dx + D dy = r2 in cones of one row; -A dx - D dv = r2 and dy + (I - D) dv = r2 in the
    other cones. They have no products of A and D, so that the sparsity pattern does not fill in.
    """

    def __init__(self, J: Jacobian, shift: float) -> None:
        self.form, self.pattern = J.form, SparsePattern.of(J.form)
        P, _, A, _ = J.data
        lone = P.new_zeros(len(P), J.form.m)
        several, rest = [], []
        for rows, values in J.D.groups:
            d = rows.shape[1]
            if d == 1:
                lone[:, rows[:, 0]] = values[:, :, 0, 0]
            else:
                several.append(-values.flatten(1))
                rest.append((torch.eye(d, dtype=P.dtype) - values).flatten(1))
        single, B = self.pattern.single, len(P)
        shifts = P.new_full((B, J.form.n), shift), P.new_full((B, self.pattern.several), shift)
        on = lone[:, single]
        ones = P.new_ones(B, self.pattern.several)
        parts = [P, A, A * (lone[:, J.form.A_row] - 1), on + shift * (1 - on), *several, *rest, ones, *shifts]
        self.lu = [self._factored(values) for values in torch.cat(parts, 1).numpy()]

    def _factored(self, values: Any) -> Any:
        """Return the factorization of one sample; None where SuperLU finds the matrix exactly singular."""
        try:
            return scipy.sparse.linalg.splu(self.pattern.matrix(values))
        except RuntimeError:
            return None

    def solve(self, r: Tensor, transposed: bool) -> Tensor:
        """See `Factor`."""
        n, m, places = self.form.n, self.form.m, self.pattern.places
        low = r[:, n + places]
        full = torch.cat([r, torch.zeros_like(low) if transposed else low], 1).numpy()
        found = [
            np.full(full.shape[1], np.inf) if lu is None else lu.solve(row, "T" if transposed else "N")
            for lu, row in zip(self.lu, full, strict=True)
        ]
        z = torch.from_numpy(np.stack(found))
        if transposed:
            z[:, n + places] += z[:, n + m :]
        return z[:, : n + m]


class SparsePattern:
    """The sparsity pattern of the matrix of `Sparse`, by columns; all samples share it."""

    def __init__(self, form: Form) -> None:
        n, m = form.n, form.m
        groups = [rows for _, rows in form.cone.groups]
        self.single = torch.cat([rows[:, 0] for rows in groups if rows.shape[1] == 1] or [torch.zeros(0).long()])
        blocks = [rows for rows in groups if rows.shape[1] > 1]
        self.places = torch.cat([rows.flatten() for rows in blocks] or [torch.zeros(0).long()])
        self.several = len(self.places)
        self.total = n + m + self.several
        position = torch.zeros(m, dtype=torch.long)
        position[self.places] = n + m + torch.arange(self.several)
        square = [
            (rows[:, :, None].expand(-1, -1, d), rows[:, None, :].expand(-1, d, -1))
            for rows in blocks
            for d in [rows.shape[1]]
        ]
        variables = torch.arange(n)
        pairs = [
            (form.P_row, form.P_column),
            (form.A_column, n + form.A_row),
            (n + form.A_row, form.A_column),
            (n + self.single, n + self.single),
            *((n + i.flatten(), position[j.flatten()]) for i, j in square),
            *((position[i.flatten()], position[j.flatten()]) for i, j in square),
            (position[self.places], n + self.places),
            (variables, variables),
            (n + self.places, n + self.places),
        ]
        rows, columns = (torch.cat([pair[side] for pair in pairs]).numpy() for side in (0, 1))
        keys, self.slot = np.unique(columns * self.total + rows, return_inverse=True)
        self.rows = keys % self.total
        self.ends = np.searchsorted(keys // self.total, np.arange(self.total + 1))

    @classmethod
    def of(cls, form: Form) -> SparsePattern:
        """Return the pattern of a form, which is made once."""
        if form.sparse is None:
            form.sparse = cls(form)
        return form.sparse

    def matrix(self, values: Any) -> Any:
        """Return the matrix with these entries; entries in the same position are added."""
        data = np.bincount(self.slot, values, len(self.rows))
        return sp.csc_array((data, self.rows, self.ends), (self.total, self.total))


class System:
    """Solves with J, which is factored once. singular: (B,) bool, the samples in which J is singular or nearly so.

    near: the system of a nearby point. Its factors are used if a few refinements with them solve to rounding.
    """

    def __init__(self, J: Jacobian, near: System | None = None) -> None:
        self.J = J
        kind = Dense if J.form.n + J.form.m <= DENSE else Sparse
        r = probe(J.form.n + J.form.m, J.data.q).expand(len(J.data.q), -1)
        size = torch.linalg.vector_norm(r, dim=1)
        self.factor: Factor = kind(J, 0.0) if near is None else near.factor
        self.refinements = 1 if near is None else 4
        z = self.factor.solve(r, False)
        if near is not None and not (torch.linalg.vector_norm(r - J.times(z, False), dim=1) <= ALIKE * size).all():
            self.factor, self.refinements = kind(J, 0.0), 1
            z = self.factor.solve(r, False)
        grown = torch.linalg.vector_norm(z, dim=1) / size
        self.singular = ~(grown < SUSPECT)
        self.index = self.singular.nonzero()[:, 0]
        self.part = J.at(self.index) if len(self.index) else J
        self.shifted: Factor | None = kind(self.part, SHIFT) if len(self.index) else None

    def solve(self, r: Tensor, transposed: bool) -> Tensor:
        """Return z (B, n + m) with Jz = r, or J'z = r; the part of r without a solution is ignored."""
        z = self.regular(r, transposed)
        if self.shifted is not None:
            part = r[self.index]
            found = self._refined(self.shifted, part, transposed)
            left = part - self.part.times(found, transposed)
            stuck = torch.linalg.vector_norm(left, dim=1) > 1e-9 * torch.linalg.vector_norm(part, dim=1)
            z[self.index] = torch.where(stuck[:, None], self._refined(self.shifted, part - left, transposed), found)
        return z

    def regular(self, r: Tensor, transposed: bool) -> Tensor:
        """Return the refined solution by the factors of J itself, also if J is nearly singular."""
        z = self.factor.solve(r, transposed)
        for _ in range(self.refinements):
            more = self.factor.solve(r - self.J.times(z, transposed), transposed)
            z = z + more
            if (torch.linalg.vector_norm(more, dim=1) <= SETTLED * torch.linalg.vector_norm(z, dim=1)).all():
                break
        return z

    def null_part(self, r: Tensor) -> Tensor:
        """Return the part of r (B, n + m) in the null space of J, for which J'z = r has no solution; 0 if regular."""
        out = torch.zeros_like(r)
        if self.shifted is not None:
            part = r[self.index]
            for _ in range(REFINEMENTS):
                part = part - self.part.times(self.shifted.solve(part, True), True)
            out[self.index] = part
        return out

    def _refined(self, factor: Factor, r: Tensor, transposed: bool) -> Tensor:
        z = factor.solve(r, transposed)
        for _ in range(REFINEMENTS):
            z = z + factor.solve(r - self.part.times(z, transposed), transposed)
        return z


def solved(system: System, r: Tensor) -> Tensor:
    """Return J^-1 r, (B, n + m), with J held fixed; differentiable in r to any order."""
    found: Tensor = _Solve.apply(system, r, False)
    return found


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(system: System, r: Tensor, transposed: bool) -> Tensor:
        return system.solve(r, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.system, _, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return None, _Solve.apply(ctx.system, g, not ctx.transposed), None
