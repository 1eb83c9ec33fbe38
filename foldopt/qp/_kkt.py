"""Linear systems with the KKT matrix K = [[H, S'], [S, 0]] of equilibrated programs, which may be singular.

S has the active rows. If they depend on each other, or H vanishes on their null space, K is singular although the
program has a solution. `Shifted` finds a solution of K z = r if there is one; the polish uses it. `Spectral` also knows
the null space of K; derivatives and verdicts use it. `Factored` does both for sparse matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.qp._operations import Matrix, dense
from foldopt.qp._sparse_kkt import SparseKKT
from foldopt.qp.matrix import SparseMatrix

SHIFT = 1e-8  # added to the diagonal to make K regular; the entries of K are at most about 1
NULL = 1e-11  # eigenvalues below this times the largest count as zero
SUSPECT = 1e9  # K may be singular if solving enlarges a generic right-hand side by this factor
REFINEMENTS = 6


class Rows(NamedTuple):
    """Rows of C that were chosen in each sample, gathered to the front.

    places: (B, s), their indices. there: (B, s) bool, False in the blanks that fill up samples with fewer rows.
    """

    places: Tensor
    there: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Rows:
        """Gather the rows where `chosen` (B, r) is True."""
        if len(chosen) == 1:
            places = chosen.nonzero()[:, 1][None]
            return cls(places, torch.ones_like(places, dtype=torch.bool))
        most = int(chosen.sum(1).max()) if chosen.numel() else 0
        if most == chosen.shape[1]:
            return cls(torch.arange(most, device=chosen.device).expand(len(chosen), most), chosen)
        index = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        return cls(index, chosen.gather(1, index))

    def take(self, values: Tensor) -> Tensor:
        """Return the chosen entries of values (B, r), zero in blanks."""
        return torch.where(self.there, values.gather(1, self.places), 0)

    def take_rows(self, C: Tensor) -> Tensor:
        """Return the chosen rows of C (B, r, n), zero in blanks."""
        return C.gather(1, self.places[:, :, None].expand(-1, -1, C.shape[2])) * self.there[:, :, None]

    def put(self, values: Tensor, r: int) -> Tensor:
        """Return the inverse of `take`: (B, r) with the values at the chosen rows and zero elsewhere."""
        out = values.new_zeros(len(values), r)
        return out.scatter_add(1, self.places, torch.where(self.there, values, 0))


def probe(size: int, like: Tensor) -> Tensor:
    """Return a generic vector (size,), the same at every call.

    It is a deterministic sequence (Weyl's), because torch.func.vmap does not allow random numbers.
    """
    k = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    return torch.sin(0.7 * k * k)


def matrix(H: Tensor, S: Tensor, there: Tensor) -> Tensor:
    """Return [[H, S'], [S, 0]], (B, n + s, n + s), with -1 on the diagonal of blank rows."""
    n, s = H.shape[1], S.shape[1]
    K = H.new_zeros(len(H), n + s, n + s)
    K[:, :n, :n], K[:, n:, :n], K[:, :n, n:] = H, S, S.mT
    K.diagonal(dim1=1, dim2=2)[:, n:] = -(~there).to(H)
    return K


class Shifted:
    """Dense K, factored with SHIFT added to the diagonal of H and -SHIFT below; refinement removes the shift."""

    def __init__(self, H: Tensor, S: Tensor, there: Tensor) -> None:
        self.K = matrix(H, S, there)
        shifted = self.K.clone()
        diagonal = shifted.diagonal(dim1=1, dim2=2)
        diagonal[:, : H.shape[1]] += SHIFT
        diagonal[:, H.shape[1] :] -= SHIFT
        self.lu, self.pivots, _ = lu_factor(shifted)

    def solve(self, r: Tensor) -> Tensor:
        """Return a small solution of K z = r, (B, N); the part of r without a solution is ignored.

        Each refinement reduces the residual along an eigenvector by the factor shift / eigenvalue, so that the residual
        that remains is in the null space.
        """
        z, left = self._refined(r)
        stuck = torch.linalg.vector_norm(left, dim=1) > 1e-9 * torch.linalg.vector_norm(r, dim=1)
        if stuck.any():
            again, _ = self._refined(r - left)
            z = torch.where(stuck[:, None], again, z)
        return z

    def _refined(self, r: Tensor) -> tuple[Tensor, Tensor]:
        z, left = torch.zeros_like(r), r
        size = torch.linalg.vector_norm(r, dim=1)
        best = size
        for _ in range(REFINEMENTS):
            step = torch.linalg.lu_solve(self.lu, self.pivots, left[:, :, None])[:, :, 0]
            following = r - matvec(self.K, z + step)
            now = torch.linalg.vector_norm(following, dim=1)
            better = (now < best)[:, None]
            z, left = torch.where(better, z + step, z), torch.where(better, following, left)
            slow = now > 0.5 * best
            best = torch.minimum(best, now.nan_to_num(nan=torch.inf))
            if (slow | (best <= 1e-15 * size)).all():
                break
        return z, left


class Spectral:
    """Dense K, solved by LU factorization, and by its eigenvalues in the samples where it is singular."""

    def __init__(self, H: Tensor, S: Tensor, there: Tensor) -> None:
        self.n = H.shape[1]
        self.K = matrix(H, S, there)
        self.lu, self.pivots, info = lu_factor(self.K)
        r = probe(self.K.shape[1], self.K).expand(len(self.K), -1)
        grown = torch.linalg.vector_norm(self._regular(r), dim=1) / torch.linalg.vector_norm(r, dim=1)
        finite = self.K.isfinite().flatten(1).all(1)
        self.singular = finite & ((info > 0) | ~(grown < SUSPECT))
        if self.singular.any():
            self.values, self.vectors = torch.linalg.eigh(self.K[self.singular])
            self.zero = self.values.abs() <= NULL * self.values.abs().amax(1, keepdim=True)

    def _regular(self, r: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.lu, self.pivots, r[:, :, None])[:, :, 0]

    def solve(self, r: Tensor) -> Tensor:
        """Return the solution of K z = r, (B, N), refined once; the least-norm solution where K is singular."""
        z = self._regular(r)
        z = z + self._regular(r - matvec(self.K, z))
        if self.singular.any():
            inverse = torch.where(self.zero, 0, 1 / torch.where(self.zero, 1, self.values))
            part = r[self.singular]
            least = matvec(self.vectors, inverse * matvec(self.vectors.mT, part))
            left = part - matvec(self.K[self.singular], least)
            least = least + matvec(self.vectors, inverse * matvec(self.vectors.mT, left))
            z = z.clone()
            z[self.singular] = least
        return z

    def null_part(self, r: Tensor) -> Tensor:
        """Return the component of r, (B, N), in the null space of K."""
        out = torch.zeros_like(r)
        if self.singular.any():
            part = torch.where(self.zero, matvec(self.vectors.mT, r[self.singular]), 0)
            out[self.singular] = matvec(self.vectors, part)
        return out

    def null_basis(self) -> Tensor:
        """Return an orthonormal basis of the null space, (B, N, N), in which the other columns are zero."""
        out = torch.zeros_like(self.K)
        if self.singular.any():
            out[self.singular] = self.vectors * self.zero[:, None, :]
        return out

    def null_vectors(self) -> Tensor:
        """Return vectors (B, N, k) that span the null space; the other columns are zero."""
        return self.null_basis()


class Factored:
    """Sparse K, one sample after the other on the CPU, for the polish and for derivatives.

    known: systems of the samples that were factored before; used if they have the same rows.
    """

    def __init__(
        self, H: SparseMatrix, C: SparseMatrix, rows: Rows, known: Sequence[Known | None] | None = None
    ) -> None:
        self.n, self.rows = H.shape[1], rows
        self.there = rows.there.cpu().numpy()
        self.parts = []
        for i, places in enumerate(rows.places.cpu().numpy()):
            chosen = places[self.there[i]]
            kept = None if known is None else known[i]
            if kept is not None and len(kept.rows) == len(chosen) and (kept.rows == chosen).all():
                self.parts.append(kept.system)
            else:
                self.parts.append(SparseKKT(H.to_scipy(i), C.to_scipy(i)[chosen]))

    def known(self, sample: int) -> Known:
        """Return the factored system of a sample together with its rows."""
        return Known(self.rows.places[sample].cpu().numpy()[self.there[sample]], self.parts[sample])

    def solve(self, r: Tensor) -> Tensor:
        """Return a small solution of K z = r, (B, N); the part of r without a solution is ignored."""
        return self._mapped(_small_solution, r)

    def null_part(self, r: Tensor) -> Tensor:
        """Return the component of r, (B, N), in the null space of K."""
        return self._mapped(SparseKKT.null_part, r)

    @property
    def singular(self) -> Tensor:
        """The samples in which K is singular, (B,) bool."""
        return torch.tensor([part.singular for part in self.parts], device=self.rows.places.device)

    def null_vectors(self) -> Tensor:
        """Return generic vectors of the null space, (B, N, k); see `SparseKKT.null_vectors`."""
        found = [torch.as_tensor(part.null_vectors()) for part in self.parts]
        out = torch.zeros(len(found), self.n + self.there.shape[1], found[0].shape[1], dtype=torch.float64)
        for i, vectors in enumerate(found):
            out[i, self.places(i)] = vectors
        return out.to(self.rows.places.device)

    def places(self, sample: int) -> Tensor:
        """Return the indices, among the N of the batch, that belong to the sample's own system."""
        own = torch.as_tensor(self.there[sample].nonzero()[0])
        return torch.cat([torch.arange(self.n), self.n + own])

    def _mapped(self, function: Callable[[SparseKKT, Any], Any], r: Tensor) -> Tensor:
        vectors = r.detach().cpu()
        out = torch.zeros_like(vectors)
        for i, part in enumerate(self.parts):
            at = self.places(i)
            out[i, at] = torch.as_tensor(function(part, vectors[i, at].numpy()))
        return out.to(r.device)


class Known(NamedTuple):
    """A factored system, and the rows of C that it contains."""

    rows: Any
    system: SparseKKT


def _small_solution(system: SparseKKT, r: Any) -> Any:
    z, left = system.solve(r)
    norm = system.np.linalg.norm
    if norm(left) > 1e-9 * norm(r):  # a residual that does not fall is in the null space
        r = r - left
        z, _ = system.solve(r)
    if system.known_singular:
        z = z - system.null_part(z)
        z = z + system.solve(r - system.times(z))[0]
    return z


def polishing_system(
    H: Matrix, C: Matrix, rows: Rows, known: Sequence[Known | None] | None = None
) -> Shifted | Factored:
    """Return K for some rows of C, for the polish."""
    if isinstance(H, SparseMatrix) and isinstance(C, SparseMatrix):
        return Factored(H, C, rows, known)
    return Shifted(dense(H), rows.take_rows(dense(C)), rows.there)


def derivative_system(
    H: Matrix, C: Matrix, rows: Rows, known: Sequence[Known | None] | None = None
) -> Spectral | Factored:
    """Return K for some rows of C, for derivatives and verdicts."""
    if isinstance(H, SparseMatrix) and isinstance(C, SparseMatrix):
        return Factored(H, C, rows, known)
    return Spectral(dense(H), rows.take_rows(dense(C)), rows.there)
