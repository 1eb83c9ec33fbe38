"""Products of cones, as in conic programs; factors of the same kind and size are processed together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Dual, Split
from foldopt.cones._elementwise import Free, Nonnegative, Zero
from foldopt.cones._exponential import Exponential
from foldopt.cones._power import Power
from foldopt.cones._second_order import SecondOrder
from foldopt.cones._semidefinite import Semidefinite, Triangle
from foldopt.errors import InputError

KINDS = ("zero", "nonneg", "soc", "psd", "exp", "pow")


@dataclass(frozen=True)
class BlockDiagonal:
    """A batch of symmetric block-diagonal matrices (..., m, m), stored as groups of blocks of equal size.

    `ProductCone.derivative` returns one. ``M @ x`` multiplies it with vectors x (..., m).

    Args:
        groups: one pair (rows, values) for each group. rows: (k, d) int64, the rows and columns of its k blocks.
            values: (..., k, d, d), the blocks.
        size: m.

    Examples:
        >>> cone = foldopt.cones.ProductCone({"nonneg": 1, "soc": [3]})
        >>> D = cone.derivative(torch.tensor([-1.0, 0.0, 3.0, 4.0]))
        >>> D @ torch.ones(4)
        tensor([0.0000, 1.2000, 0.8000, 0.9000])
        >>> D.dense().shape
        torch.Size([4, 4])
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    size: int

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return the products with the vectors x (..., m), of the same shape."""
        out = torch.zeros_like(x)
        for rows, values in self.groups:
            out[..., rows] = (values @ x[..., rows, None])[..., 0]
        return out

    def dense(self) -> Tensor:
        """Return the matrices as a dense tensor.

        Returns:
            (..., m, m).
        """
        batch = self.groups[0][1].shape[:-3]
        M = self.groups[0][1].new_zeros(*batch, self.size, self.size)
        for rows, values in self.groups:
            M[..., rows[:, :, None], rows[:, None, :]] = values
        return M


class ProductCone:
    """A product of cones in R^m, with the projection on it.

    The projection acts on each factor by itself. Points have the shape (..., m); the rows are ordered by the kind of
    cone as in CVXPY's conic programs: zero, nonneg, soc, psd, exp, pow.

    Args:
        dims: the factors, as a dict from kinds to sizes; any kind may be missing and the order of the keys is free.

            - "zero", "nonneg": the number of rows.
            - "soc": a list of the sizes of second-order cones, t first.
            - "psd": a list of the sides n of semidefinite matrices, with n (n + 1) / 2 rows each, see `svec`.
            - "exp": the number of exponential cones, with 3 rows each.
            - "pow": a list of the exponents alpha of power cones, with 3 rows each.
        triangle: the triangle of the semidefinite matrices that the rows hold, "lower" (default) or "upper"; see
            `Semidefinite`.

    Raises:
        InputError: if a key is unknown, a size is not a whole number, an alpha is outside (0, 1), or `triangle` is
            neither "lower" nor "upper".

    Examples:
        >>> cone = foldopt.cones.ProductCone({"nonneg": 1, "soc": [3]})
        >>> cone.project(torch.tensor([-1.0, 0.0, 3.0, 4.0]))
        tensor([0.0000, 2.5000, 1.5000, 2.0000])
        >>> cone.kinks(torch.tensor([1e-9, 0.0, 3.0, 4.0]), 1e-6)
        tensor([ True, False, False, False])
    """

    def __init__(self, dims: Mapping[str, Any], *, triangle: Triangle = "lower") -> None:
        unknown = [key for key in dims if key not in KINDS]
        if unknown:
            raise InputError(f"dims has {unknown}: expected keys among {list(KINDS)}.")
        self.dims = {kind: dims[kind] for kind in KINDS if kind in dims}
        self.triangle = triangle
        rows: dict[Cone, dict[int, list[range]]] = {}
        at = 0
        for cone, d in _factors(self.dims, triangle):
            rows.setdefault(cone, {}).setdefault(d, []).append(range(at, at + d))
            at += d
        self.size = at
        self.groups: tuple[tuple[Cone, Tensor], ...] = tuple(
            (cone, torch.tensor([list(block) for block in blocks], dtype=torch.long))
            for cone, by_size in rows.items()
            for blocks in by_size.values()
        ) or ((Zero(), torch.zeros(0, 1, dtype=torch.long)),)
        order = torch.cat([rows.flatten() for _, rows in self.groups]).argsort()
        self._order = {order.device: order}
        self._rows = {order.device: [rows for _, rows in self.groups]}

    def __repr__(self) -> str:
        return f"ProductCone({self.dims})"

    def dual(self) -> ProductCone:
        """Return the dual cone: rows of "zero" become free; "nonneg", "soc" and "psd" are their own dual cones.

        Returns:
            The dual cone, with the same order of rows.
        """
        other = copy.copy(self)
        other.groups = tuple((_dual(cone), rows) for cone, rows in self.groups)
        return other

    def project(self, v: Tensor) -> Tensor:
        """Return the nearest point of the cone; see `Cone.project` for its derivatives.

        Args:
            v: (..., m), of any floating-point dtype.

        Returns:
            (..., m), in the dtype of v.

        Raises:
            InputError: if v holds NaN or inf, or its last dimension is not m.
        """
        return self._gathered(v, [cone.project(v[..., rows]) for cone, rows in self._groups(v)])

    def split(self, v: Tensor) -> Split:
        """Return the projections on the cone and on its polar cone, without a gradient.

        Args:
            v: (..., m).

        Returns:
            A pair (s, p) of shape (..., m) each, with s + p = v and s'p = 0 to rounding.

        Raises:
            InputError: if the last dimension of v is not m.
        """
        s, p = zip(*(cone.split(v[..., rows]) for cone, rows in self._groups(v)), strict=True)
        return self._gathered(v, s), self._gathered(v, p)

    def derivative(self, v: Tensor) -> BlockDiagonal:
        """Return the derivative of the projection, without a gradient; see `Cone.derivative`.

        Args:
            v: (..., m).

        Returns:
            The derivative, a symmetric block-diagonal matrix (..., m, m).

        Raises:
            InputError: if the last dimension of v is not m.
        """
        groups = tuple((rows, cone.derivative(v[..., rows])) for cone, rows in self._groups(v))
        return BlockDiagonal(groups, self.size)

    def kinks(self, v: Tensor, tol: float | Tensor) -> Tensor:
        """Return the rows of those factors that are close to a point where their projection has no derivative.

        Args:
            v: (..., m).
            tol: the distance that counts as close, in the units of v; a number, or (...), one for each point.

        Returns:
            (..., m) bool.

        Raises:
            InputError: if the last dimension of v is not m.
        """
        if isinstance(tol, Tensor):
            tol = tol[..., None]
        parts = [cone.kinks(v[..., rows], tol)[..., None].expand(v[..., rows].shape) for cone, rows in self._groups(v)]
        return self._gathered(v, parts)

    def centre(self) -> Tensor:
        """Return a point deep inside every factor and its dual cone.

        For a small number e, ``derivative(v + e * centre)`` and ``derivative(v - e * centre)`` are the derivatives on
        the two sides of a kink at v.

        Returns:
            (m,) float64; 0 in the rows of "zero" and in free rows.
        """
        v = torch.zeros(self.size, dtype=torch.float64)
        return self._gathered(v, [cone.centre(rows.shape[1]).expand(rows.shape) for cone, rows in self.groups])

    def _groups(self, v: Tensor) -> list[tuple[Cone, Tensor]]:
        if v.dim() < 1 or v.shape[-1] != self.size:
            raise InputError(f"v has shape {tuple(v.shape)}, expected (..., {self.size}) to go with {self}.")
        if v.device not in self._rows:
            self._rows[v.device] = [rows.to(v.device) for _, rows in self.groups]
        return [(cone, rows) for (cone, _), rows in zip(self.groups, self._rows[v.device], strict=True)]

    def _gathered(self, v: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Put the rows of the groups, (..., k, d) each, back into the order of v, (..., m)."""
        if v.device not in self._order:
            self._order[v.device] = torch.cat([rows.flatten() for rows in self._rows[v.device]]).argsort()
        return torch.cat([part.flatten(-2) for part in parts], -1)[..., self._order[v.device]]


def _factors(dims: Mapping[str, Any], triangle: Triangle) -> list[tuple[Cone, int]]:
    """Return the factors, each with its number of rows."""
    factors: list[tuple[Cone, int]] = [(Zero(), 1)] * _whole("zero", dims.get("zero", 0))
    factors += [(Nonnegative(), 1)] * _whole("nonneg", dims.get("nonneg", 0))
    factors += [(SecondOrder(), _whole("soc", d)) for d in dims.get("soc", ())]
    factors += [(Semidefinite(triangle), n * (n + 1) // 2) for n in (_whole("psd", n) for n in dims.get("psd", ()))]
    factors += [(Exponential(), 3)] * _whole("exp", dims.get("exp", 0))
    factors += [(Power(float(alpha)), 3) for alpha in dims.get("pow", ())]
    return [(cone, d) for cone, d in factors if d]


def _dual(cone: Cone) -> Cone:
    if isinstance(cone, Dual):
        return cone.cone
    if isinstance(cone, Zero | Free):
        return Free() if isinstance(cone, Zero) else Zero()
    return cone if isinstance(cone, Nonnegative | SecondOrder | Semidefinite) else Dual(cone)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f'dims["{name}"] has {value!r}: expected a whole number of at least 0.')
    return value
