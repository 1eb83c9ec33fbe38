"""Conic programs on fixed sparsity patterns: products with their matrices, and the units in which these are near 1."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from foldopt.cones import ProductCone

ROUNDS = 4  # of equilibration
TINY = 1e-300


class Data(NamedTuple):
    """The entries of a batch of programs: P (B, entries), q (B, n), A (B, entries), b (B, m), float64."""

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor

    def at(self, index: Tensor) -> Data:
        """Return the programs of some samples."""
        return Data(*(part[index] for part in self))


class Form:
    """Patterns of P (n, n), symmetric and stored in full, and of A (m, n), by columns, and the cone K.

    P_ptr, A_ptr: where each column starts, (n + 1,); P_rows, A_rows: rows of the entries; numpy. zero, nonneg: how many
    rows the cone has of these kinds, the first ones.
    """

    def __init__(self, n: int, m: int, P_rows: Any, P_ptr: Any, A_rows: Any, A_ptr: Any, cones: dict[str, Any]) -> None:
        self.n, self.m, self.cone = n, m, ProductCone(cones, triangle="upper")
        self.zero, self.nonneg = cones["zero"], cones["nonneg"]
        self.P_rows, self.P_ptr, self.A_rows, self.A_ptr = P_rows, P_ptr, A_rows, A_ptr
        columns = np.arange(n)
        self.P_row, self.A_row = torch.as_tensor(P_rows).long(), torch.as_tensor(A_rows).long()
        self.P_column = torch.as_tensor(np.repeat(columns, np.diff(P_ptr)))
        self.A_column = torch.as_tensor(np.repeat(columns, np.diff(A_ptr)))
        self.sizes = [len(P_rows), n, len(A_rows), m]
        self.sparse: Any = None  # what `foldopt._conic.systems.Sparse` keeps of the patterns
        self.block = torch.arange(m)  # rows of one cone share a number: its first row
        for _, rows in self.cone.groups:
            self.block[rows] = rows[:, :1]

    def data(self, theta: Tensor) -> Data:
        """Split the entries theta (B, entries of P, q, A and b in a row)."""
        return Data(*theta.split(self.sizes, 1))

    def dense(self, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return P (B, n, n), q (B, n), A (B, m, n) and b (B, m)."""
        B = len(data.q)
        P, A = data.P.new_zeros(B, self.n, self.n), data.A.new_zeros(B, self.m, self.n)
        P[:, self.P_row, self.P_column] = data.P
        A[:, self.A_row, self.A_column] = data.A
        return P, data.q, A, data.b

    def matrices(self, data: Data) -> tuple[Any, Any]:
        """Return all P, and all A, of a batch as one block-diagonal scipy matrix each; their memory is shared."""
        found = []
        for values, rows, ptr, height in (
            (data.P, self.P_rows, self.P_ptr, self.n),
            (data.A, self.A_rows, self.A_ptr, self.m),
        ):
            i = np.arange(len(values))[:, None]
            where, ends = (rows + i * height).ravel(), (ptr[1:] + i * ptr[-1]).ravel()
            flat = values.contiguous().numpy().ravel()
            shape = len(values) * height, len(values) * self.n
            found.append(sp.csc_array((flat, where, np.concatenate([[0], ends])), shape))
        return found[0], found[1]


class Matrices:
    """P and A of a batch, to multiply with."""

    def __init__(self, form: Form, data: Data) -> None:
        self.form = form
        self.P, self.A = form.matrices(data)
        self.A_T = self.A.T

    def times(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Px (B, n), Ax (B, m) and A'y (B, n); no graph."""
        flat_x, flat_y = x.contiguous().numpy().ravel(), y.contiguous().numpy().ravel()
        products = (self.P @ flat_x, self.A @ flat_x, self.A_T @ flat_y)
        return tuple(torch.from_numpy(z).view(len(x), -1) for z in products)  # type: ignore[return-value]


def products(form: Form, P: Tensor, A: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Px, Ax and A'y as functions of the entries of P and A too, differentiable to any order.

    The gradient of P is that of the full pattern.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Products.apply(P, A, x, y, form)
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(P: Tensor, A: Tensor, x: Tensor, y: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        return Matrices(form, Data(P, x, A, y)).times(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.form = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, of_Px: Tensor, of_Ax: Tensor, of_ATy: Tensor) -> tuple[Tensor | None, ...]:
        P, A, x, y = ctx.saved_tensors
        form = ctx.form
        of_P, of_A, of_x, of_y, _ = ctx.needs_input_grad
        gP = of_Px[:, form.P_row] * x[:, form.P_column] if of_P else None
        gA = of_Ax[:, form.A_row] * x[:, form.A_column] + y[:, form.A_row] * of_ATy[:, form.A_column] if of_A else None
        gx = gy = None
        if of_x:
            moved, _, pulled = products(form, P, A, of_Px, of_Ax)
            gx = moved + pulled
        if of_y:
            gy = products(form, P, A, of_ATy, of_Ax)[1]
        return gP, gA, gx, gy, None


class Units(NamedTuple):
    """The units of equilibrated programs: x = d x', s = s' / e, y = e y' / c; d (B, n), e (B, m), c (B, 1).

    Powers of 2; rows of one cone share their e.
    """

    d: Tensor
    e: Tensor
    c: Tensor

    def scaled(self, form: Form, data: Data) -> Data:
        """Return the programs in these units."""
        d, e, c = self
        return Data(
            c * d[:, form.P_row] * data.P * d[:, form.P_column],
            c * d * data.q,
            e[:, form.A_row] * data.A * d[:, form.A_column],
            e * data.b,
        )


def equilibrate(form: Form, data: Data) -> Units:
    """Return units in which the columns of [P; A] and the rows of A have a largest entry of about 1, and so has q or P.

    Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices (2001), as in SCS (O'Donoghue et
    al., 2016, section 5): rows of one cone are scaled alike.
    """
    P, A = data.P.abs(), data.A.abs()
    d, e, c = torch.ones_like(data.q), torch.ones_like(data.b), torch.ones_like(data.q[:, :1])
    for _ in range(ROUNDS):
        curved = c * d[:, form.P_row] * P * d[:, form.P_column]
        scaled = e[:, form.A_row] * A * d[:, form.A_column]
        columns = torch.maximum(_largest(curved, form.P_column, form.n), _largest(scaled, form.A_column, form.n))
        rows = _largest(_largest(scaled, form.A_row, form.m), form.block, form.m)[:, form.block]
        d, e = d * _inverse_root(columns), e * _inverse_root(rows)
        size = torch.maximum(
            _largest(c * d[:, form.P_row] * P * d[:, form.P_column], form.P_column, form.n).mean(1, keepdim=True),
            (c * d * data.q).abs().amax(1, keepdim=True),
        )
        c = c / torch.where(size > TINY, size, 1.0)
    return Units(*(torch.exp2(torch.log2(part).round()) for part in (d, e, c)))


def _largest(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the largest of the values (B, k) >= 0 at each index, (B, size)."""
    out = values.new_zeros(len(values), size)
    return out.scatter_reduce(1, index.expand(len(values), -1), values, "amax")


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > TINY, size, 1.0).rsqrt()


class Program:
    """A batch of programs in equilibrated units.

    units: these. data: the programs in them, zero in samples that are not finite. finite: (B,) bool. matrices: to
    multiply with. scale: (B, n + m), the units of (x, y).
    """

    def __init__(self, form: Form, data: Data) -> None:
        self.form = form
        self.finite = torch.stack([part.isfinite().all(1) for part in data]).all(0)
        if not self.finite.all():
            data = Data(*(torch.where(self.finite[:, None], part, 0) for part in data))
        self.units = equilibrate(form, data)
        self.data = self.units.scaled(form, data)
        self.matrices = Matrices(form, self.data)
        self.scale = torch.cat([self.units.d, self.units.e / self.units.c], 1)

    def inside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a point in these units."""
        return x / self.units.d, y * self.units.c / self.units.e

    def outside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a point of these units in the caller's."""
        return x * self.units.d, y * self.units.e / self.units.c
