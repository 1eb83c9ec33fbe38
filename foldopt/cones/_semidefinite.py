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
    """The cone of positive semidefinite n by n matrices X, as vectors svec(X) in R^d with d = n (n + 1) / 2.

    It is its own dual cone. With X = Q diag(w) Q' the projection is Q diag(max(w, 0)) Q'. The derivative multiplies
    Q'GQ entrywise by the divided differences of max(w, 0), also if eigenvalues repeat. There is no derivative where an
    eigenvalue is 0.

    Args:
        triangle: which triangle of X the vectors hold, stacked column by column: "lower" (default, as in SCS) or
            "upper" (as in Clarabel).

    Raises:
        InputError: if `triangle` is neither of the two.

    Source: Higham, Computing a nearest symmetric positive semidefinite matrix (1988); Bhatia, Matrix Analysis (1997),
    section V.3, for the derivative.

    Examples:
        >>> from foldopt.cones import Semidefinite, smat, svec
        >>> X = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1
        >>> smat(Semidefinite().project(svec(X)))
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]])
    """

    triangle: Triangle = "lower"

    def __post_init__(self) -> None:
        if self.triangle not in ("lower", "upper"):
            raise InputError(f'triangle={self.triangle!r}: choose "lower" or "upper".')

    def centre(self, d: int) -> Tensor:
        """Return svec(I), (d,); see `Cone.centre`. Raises InputError if d is not n (n + 1) / 2 for any n."""
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
        """Return the eigenvalues and eigenvectors of the matrices of the points v."""
        w, Q = torch.linalg.eigh(smat(v, self.triangle))
        return w, Q


def svec(X: Tensor, triangle: Triangle = "lower") -> Tensor:
    """Return a symmetric matrix as a vector: one triangle, column by column, with off-diagonal entries times sqrt(2).

    With these weights svec(X)'svec(Y) = trace(XY).

    Args:
        X: (..., n, n), symmetric; only the chosen triangle is read.
        triangle: "lower" (default) or "upper".

    Returns:
        (..., n (n + 1) / 2).

    Examples:
        >>> foldopt.cones.svec(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        tensor([1.0000, 2.8284, 3.0000])
    """
    rows, columns, weights = _entries(X.shape[-1], triangle, X)
    return X[..., rows, columns] * weights


def smat(v: Tensor, triangle: Triangle = "lower") -> Tensor:
    """Return the symmetric matrix of a vector, the inverse of `svec`.

    Args:
        v: (..., n (n + 1) / 2).
        triangle: the triangle that v holds, "lower" (default) or "upper".

    Returns:
        (..., n, n).

    Raises:
        InputError: if the last dimension of v is not n (n + 1) / 2 for any n.

    Examples:
        >>> foldopt.cones.smat(foldopt.cones.svec(torch.tensor([[1.0, 2.0], [2.0, 3.0]])))
        tensor([[1., 2.],
                [2., 3.]])
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
        raise InputError(
            f"a vector of length {d} is not a triangle of a square matrix; expected n (n + 1) / 2: 1, 3, 6, 10, ..."
        )
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
