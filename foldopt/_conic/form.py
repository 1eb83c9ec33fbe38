"""Batches of conic programs with fixed sparsity patterns: products with their matrices, and their equilibration."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from foldopt.cones import ProductCone

ROUNDS = 4  # rounds of equilibration
TINY = 1e-300


class Data(NamedTuple):
    """The entries of a batch of programs in float64: P (B, nnz of P), q (B, n), A (B, nnz of A), b (B, m)."""

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor

    def at(self, index: Tensor) -> Data:
        """Return the programs of the samples in `index`."""
        return Data(*(part[index] for part in self))


class Form:
    """The structure that all programs of a batch share: sparsity patterns by columns, and the cone K.

    The first rows of K are `zero` equalities, then `nonneg` inequalities follow.

    Args:
        n: the number of variables.
        m: the number of rows.
        P_rows: numpy (nnz,), the rows of the entries of P (n, n), which is symmetric and stored in full.
        P_ptr: numpy (n + 1,), where each column of P starts.
        A_rows: numpy (nnz,), the rows of the entries of A (m, n).
        A_ptr: numpy (n + 1,), where each column of A starts.
        cones: the cone K, as the `dims` of `foldopt.cones.ProductCone`.
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
        self.sparse: Any = None  # the `foldopt._conic.systems.SparsePattern`, made when needed
        self.block = torch.arange(m)  # for each row the first row of its cone
        for _, rows in self.cone.groups:
            self.block[rows] = rows[:, :1]

    def data(self, theta: Tensor) -> Data:
        """Split theta (B, size), which has the entries of P, q, A and b one after the other."""
        return Data(*theta.split(self.sizes, 1))

    def dense(self, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return P (B, n, n), q (B, n), A (B, m, n) and b (B, m)."""
        B = len(data.q)
        P, A = data.P.new_zeros(B, self.n, self.n), data.A.new_zeros(B, self.m, self.n)
        P[:, self.P_row, self.P_column] = data.P
        A[:, self.A_row, self.A_column] = data.A
        return P, data.q, A, data.b

    def matrices(self, data: Data) -> tuple[Any, Any]:
        """Return the P of all samples as one block-diagonal SciPy matrix, and so the A; they share memory with data."""
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
    """The matrices P and A of a batch, for products with vectors."""

    def __init__(self, form: Form, data: Data) -> None:
        self.form = form
        self.P, self.A = form.matrices(data)
        self.A_T = self.A.T

    def times(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Px (B, n), Ax (B, m) and A'y (B, n), without a gradient."""
        flat_x, flat_y = x.contiguous().numpy().ravel(), y.contiguous().numpy().ravel()
        products = (self.P @ flat_x, self.A @ flat_x, self.A_T @ flat_y)
        return tuple(torch.from_numpy(z).view(len(x), -1) for z in products)  # type: ignore[return-value]


def products(form: Form, P: Tensor, A: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Px, Ax and A'y, differentiable to any order in x, y and the entries of P and A.

    The gradient of P has an entry for each entry of the full, symmetric pattern.
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
    """The units of equilibrated programs: x = d x', s = s' / e, y = e y' / c, with d (B, n), e (B, m) and c (B, 1).

    They are powers of 2, and all rows of a cone have the same e.
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
    """Return units in which the columns of [P; A], the rows of A, and q or P have a largest entry of about 1.

    All rows of a cone are scaled by the same factor.

    Source: Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices (2001), as in SCS
    (O'Donoghue et al., 2016, section 5).
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
    """Return for each index the largest of its values (B, k) >= 0, (B, size); 0 if it has none."""
    out = values.new_zeros(len(values), size)
    return out.scatter_reduce(1, index.expand(len(values), -1), values, "amax")


def _inverse_root(size: Tensor) -> Tensor:
    return torch.where(size > TINY, size, 1.0).rsqrt()


class Program:
    """A batch of programs in equilibrated units.

    units: the units. data: the programs in these units, zero in samples that are not finite. finite: (B,) bool.
    matrices: P and A in these units, for products. scale: (B, n + m), the units of (x, y).
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
        """Convert a point (x, y) from the user's units to the equilibrated ones."""
        return x / self.units.d, y * self.units.c / self.units.e

    def outside(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Convert a point (x, y) from the equilibrated units to the user's."""
        return x * self.units.d, y * self.units.e / self.units.c
