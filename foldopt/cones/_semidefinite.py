"""The cone of positive semidefinite matrices, as vectors of one triangle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split, remembered
from foldopt.errors import InputError

Triangle = Literal["lower", "upper"]


@dataclass(frozen=True)
class Semidefinite(Cone):
    """{X positive semidefinite}, n by n, as svec(X) in R^d, d = n (n + 1) / 2; its own dual.

    triangle: "lower" or "upper", stacked column by column: SCS takes the lower triangle, Clarabel the upper one.

    With X = Q diag(w) Q' the projection is Q diag(max(w, 0)) Q' (Higham, 1988); its derivative multiplies Q'GQ by the
    divided differences of max(w, 0), also where eigenvalues repeat (Bhatia, Matrix Analysis, 1997, V.3). It has none
    where an eigenvalue is 0.
    """

    triangle: Triangle = "lower"

    def __post_init__(self) -> None:
        if self.triangle not in ("lower", "upper"):
            raise InputError(f'triangle={self.triangle!r}: expected "lower" or "upper".')

    def centre(self, d: int) -> Tensor:
        """Return svec(I), (d,)."""
        return svec(torch.eye(side(d), dtype=torch.float64), self.triangle)

    def _require_size(self, v: Tensor) -> None:
        super()._require_size(v)
        side(v.shape[-1])

    def _split(self, v: Tensor) -> Split:
        w, Q = self._spectrum(v)
        s, p = (svec((Q * part[..., None, :]) @ Q.mT, self.triangle) for part in (w.clamp(min=0), w.clamp(max=0)))
        inside, polar = w[..., :1] >= 0, w[..., -1:] <= 0
        return torch.where(inside, v, torch.where(polar, 0.0, s)), torch.where(inside, 0.0, torch.where(polar, v, p))

    def _derivative(self, v: Tensor) -> Tensor:
        w, Q = self._spectrum(v)
        n = Q.shape[-1]
        rows, columns, weights = _entries(n, self.triangle, v)
        Qr, Qc = Q[..., rows, :], Q[..., columns, :]
        basis = Qr[..., rows] * Qc[..., columns] + Qr[..., columns] * Qc[..., rows]  # of svec, by eigenvectors
        basis = basis * (0.5 * weights[:, None] * weights)
        return (basis * _differences(w)[..., rows, columns][..., None, :]) @ basis.mT

    def _pushed(self, v: Tensor, g: Tensor) -> Tensor:
        w, Q = self._spectrum(v)
        return svec(Q @ (_differences(w) * (Q.mT @ smat(g, self.triangle) @ Q)) @ Q.mT, self.triangle)

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        w, Q = self._spectrum(v)
        G, H = (Q.mT @ smat(x, self.triangle) @ Q for x in (g, h))
        size = w.abs()
        mixed = (w[..., :, None] >= 0) != (w[..., None, :] >= 0)
        M = torch.where(mixed, 1 / torch.where(mixed, size[..., :, None] + size[..., None, :], 1.0), 0.0)
        # The second divided difference of three eigenvalues, of which k has the other sign than i and j, is
        # |w_k| / ((|w_i| + |w_k|) (|w_j| + |w_k|)); with three of one sign it is 0.
        half = (M * G * size[..., None, :]) @ (M * H) + M * size[..., None, :] * (G @ (M * H))
        half = half + M * size[..., None, :] * (H @ (M * G))
        return svec(Q @ (half + half.mT) @ Q.mT, self.triangle)

    def _distance(self, v: Tensor) -> Tensor:
        return self._spectrum(v)[0].abs().amin(-1)

    @remembered
    def _spectrum(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues and eigenvectors of the matrices of points."""
        w, Q = torch.linalg.eigh(smat(v, self.triangle))
        return w, Q


def svec(X: Tensor, triangle: Triangle = "lower") -> Tensor:
    """Return one triangle of X (..., n, n), symmetric, column by column, off-diagonal entries times sqrt(2).

    (..., n (n + 1) / 2); so that the product of two vectors is the trace of the product of the matrices.
    """
    rows, columns, weights = _entries(X.shape[-1], triangle, X)
    return X[..., rows, columns] * weights


def smat(v: Tensor, triangle: Triangle = "lower") -> Tensor:
    """Return the symmetric matrix (..., n, n) whose svec is v (..., n (n + 1) / 2).

    Raises InputError for a last dimension that is no n (n + 1) / 2.
    """
    n = side(v.shape[-1])
    rows, columns, weights = _entries(n, triangle, v)
    where = torch.zeros(n, n, dtype=torch.long, device=v.device)
    where[rows, columns] = where[columns, rows] = torch.arange(len(rows), device=v.device)
    return (v / weights)[..., where]


def side(d: int) -> int:
    """Return n such that d = n (n + 1) / 2; raises InputError if there is none."""
    n = (math.isqrt(8 * d + 1) - 1) // 2
    if n * (n + 1) // 2 != d:
        raise InputError(f"a vector of length {d} is no triangle of a square matrix: expected n (n + 1) / 2.")
    return n


def _entries(n: int, triangle: Triangle, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows, columns and weights, 1 or sqrt(2), of the entries of svec, in the dtype of `like`."""
    indices = torch.triu_indices if triangle == "lower" else torch.tril_indices
    columns, rows = indices(n, n, device=like.device)
    return rows, columns, (2.0 - (rows == columns).to(like)).sqrt()


def _differences(w: Tensor) -> Tensor:
    """Return the divided differences of max(w, 0), (..., n, n)."""
    positive = (w >= 0).to(w)
    size = w.abs()
    mixed = positive[..., :, None] != positive[..., None, :]
    total = torch.where(mixed, size[..., :, None] + size[..., None, :], 1.0)
    larger = torch.where(positive[..., :, None] > 0, size[..., :, None], size[..., None, :])
    return torch.where(mixed, larger / total, positive[..., :, None])
