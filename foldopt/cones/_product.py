"""Products of cones, as conic programs have them: many factors of equal size are worked on at once."""

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
    """A symmetric block-diagonal matrix (..., m, m), as groups of blocks of equal size.

    groups: pairs of rows (k, d), the rows and columns of k blocks, and values (..., k, d, d).
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    size: int

    def __matmul__(self, x: Tensor) -> Tensor:
        """Return the product with the vectors x, (..., m)."""
        out = torch.zeros_like(x)
        for rows, values in self.groups:
            out[..., rows] = (values @ x[..., rows, None])[..., 0]
        return out

    def dense(self) -> Tensor:
        """Return the matrix, (..., m, m)."""
        batch = self.groups[0][1].shape[:-3]
        M = self.groups[0][1].new_zeros(*batch, self.size, self.size)
        for rows, values in self.groups:
            M[..., rows[:, :, None], rows[:, None, :]] = values
        return M


class ProductCone:
    """A product of cones in R^m; points are (..., m), their rows in the order of CVXPY's conic programs.

    Args:
        dims: how many of what, in this order of rows whatever that of the keys: "zero" and "nonneg" a number of rows,
            "soc" a list of sizes (t first), "psd" a list of n (n (n + 1) / 2 rows each, see `svec`), "exp" a number of
            cones (3 rows each), "pow" a list of alpha (3 rows each). A key may be missing.
        triangle: which one of symmetric matrices the rows of "psd" hold, see `Semidefinite`.

    Raises InputError for an unknown key, a size that is not a whole number, or an alpha outside of (0, 1).
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
        """Return the dual cone: the rows of "zero" become free; "nonneg", "soc" and "psd" are their own duals."""
        other = copy.copy(self)
        other.groups = tuple((_dual(cone), rows) for cone, rows in self.groups)
        return other

    def project(self, v: Tensor) -> Tensor:
        """Return the nearest point of the cone, (..., m), in the dtype of v; see `Cone.project` for its derivatives.

        Raises InputError for NaN and inf, and for a last dimension other than m.
        """
        return self._gathered(v, [cone.project(v[..., rows]) for cone, rows in self._groups(v)])

    def split(self, v: Tensor) -> Split:
        """Return v's projections on the cone and on its polar, (..., m) each, not recorded by autograd."""
        s, p = zip(*(cone.split(v[..., rows]) for cone, rows in self._groups(v)), strict=True)
        return self._gathered(v, s), self._gathered(v, p)

    def derivative(self, v: Tensor) -> BlockDiagonal:
        """Return the derivative of `project` at v, not recorded by autograd; see `Cone.derivative`."""
        groups = tuple((rows, cone.derivative(v[..., rows])) for cone, rows in self._groups(v))
        return BlockDiagonal(groups, self.size)

    def kinks(self, v: Tensor, tol: float | Tensor) -> Tensor:
        """Return which rows belong to a factor within `tol` of where it has no derivative, (..., m) bool.

        tol: in the units of v, a number or (...), one for each point.
        """
        if isinstance(tol, Tensor):
            tol = tol[..., None]
        parts = [cone.kinks(v[..., rows], tol)[..., None].expand(v[..., rows].shape) for cone, rows in self._groups(v)]
        return self._gathered(v, parts)

    def centre(self) -> Tensor:
        """Return a point deep inside of every factor and of its dual, 0 for "zero" and free rows, (m,) float64.

        ``derivative(v + e * centre)`` and ``derivative(v - e * centre)`` are, for a small e, the derivatives on both
        sides of a kink at v.
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
        """Return the rows of the groups, (..., k, d) each, in their order, (..., m), on the device of v."""
        if v.device not in self._order:
            self._order[v.device] = torch.cat([rows.flatten() for rows in self._rows[v.device]]).argsort()
        return torch.cat([part.flatten(-2) for part in parts], -1)[..., self._order[v.device]]


def _factors(dims: Mapping[str, Any], triangle: Triangle) -> list[tuple[Cone, int]]:
    """Return the factors and their numbers of rows."""
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
