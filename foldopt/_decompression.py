"""The derivatives of a smooth program as products, and sparse matrices computed from a few of them.

Rows of a Jacobian that share no column can be computed together: one product with the transpose gives all of them,
because each number of the product belongs to one entry. Which rows go together is a graph coloring, found greedily
here. Columns with many entries would keep all their rows apart; such a column gets a product of its own, with the
matrix itself.

Source: Curtis, Powell and Reid, On the estimation of sparse Jacobian matrices (1974); Gebremedhin, Manne and Pothen,
What color is your Jacobian? (2005).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.step import Recorded, pushforward, vjp_of
from foldopt.updates.programs import SmoothProgram

__all__ = ["Decompression", "Derivative", "Derivatives", "Product", "on_cpu"]

Product = Callable[[Tensor], Tensor]


class Derivative(NamedTuple):
    """A Jacobian J, (B, m, n), as two products: ``pull(s)`` is J's, (B, n), and ``push(t)`` is J t, (B, m)."""

    pull: Product
    push: Product

    @classmethod
    def of(cls, value: Tensor, x: Tensor) -> Derivative:
        """Return the Jacobian of a recorded value (B, m) with respect to x (B, n)."""
        recorded = Recorded((value,), (x,), ())

        def pull(s: Tensor) -> Tensor:
            pulled = vjp_of(recorded, (x,), (s,))[0]
            return torch.zeros_like(x) if pulled is None else pulled

        return cls(pull, lambda t: pushforward(recorded, (x,))((t,))[0])


class Derivatives:
    """The derivatives of a program, recorded at a point; they pass no gradient on.

    Args:
        program: the program.
        x: points (B, n).
        params: parameters of the program.

    Attributes:
        x: the points, recorded.
        gradient: gradient of f, (B, n).
        c: constraints, (B, r).
        jacobian: their Jacobian.
    """

    def __init__(self, program: SmoothProgram, x: Tensor, params: Sequence[Tensor]) -> None:
        params = [p.detach() for p in params]
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self._f, self.c = program.objective(self.x, *params).sum(), program.constraints(self.x, *params)
            self.gradient = _gradient(self._f, self.x)
        self.jacobian = Derivative.of(self.c, self.x)

    def hessian(self, y: Tensor, weight: float = 1.0) -> Derivative:
        """Return the Hessian of weight * f + y'c for y, (B, r)."""
        with torch.enable_grad():
            slope = _gradient(weight * self._f + (y.detach() * self.c).sum(), self.x)
        return Derivative.of(slope, self.x)


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a scalar with respect to x, recorded."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)[0]


class Decompression:
    """How the entries of a Jacobian with known places are computed from products."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        by_rows, by_columns = _Groups.of(pattern), _Groups.of(pattern.transposed)
        self._transposed = by_columns.products < by_rows.products
        self._groups = by_columns if self._transposed else by_rows

    @property
    def products(self) -> int:
        """The number of products."""
        return self._groups.products

    def matrix(self, of: Derivative, like: Tensor) -> SparseMatrix:
        """Return the Jacobian; `like` is a tensor with the batch size, dtype and device of its arguments."""
        first, second = (of.push, of.pull) if self._transposed else (of.pull, of.push)
        found = [
            on_cpu(product(seed.to(like).expand(len(like), -1)))
            for seeds, product in ((self._groups.seeds, first), (self._groups.alone, second))
            for seed in seeds
        ]
        values = torch.cat(found, 1) if found else torch.zeros(len(like), 0, dtype=torch.float64)
        return SparseMatrix(self.pattern, values.index_select(1, self._groups.places))


class _Groups(NamedTuple):
    """Groups of rows of a pattern that share no column, and the columns that are left out of this.

    Attributes:
        seeds: (k, m), vectors for the products with the transpose.
        alone: (d, n), vectors for the products with the matrix, which follow.
        places: (nnz,), the position of each entry of the pattern in these products, laid side by side.
    """

    seeds: Tensor
    alone: Tensor
    places: Tensor

    @classmethod
    def of(cls, pattern: Pattern) -> _Groups:
        """Return the groups of a pattern."""
        m, n = pattern.shape
        rows, columns = pattern.rows, pattern.columns
        degrees, order = torch.bincount(columns, minlength=n).sort(descending=True)
        # The fullest of the columns that remain has as many entries as there must be groups.
        d = int((torch.arange(n) + degrees).argmin()) if n else 0
        own = torch.full((n,), -1, dtype=torch.long)
        own[order[:d]] = torch.arange(d)
        shared = own[columns] < 0
        color = _coloring(rows[shared], columns[shared], m, n)
        count = int(color.max()) + 1 if m and bool(shared.any()) else 0
        seeds = torch.zeros(count, m, dtype=torch.float64)
        taking_part = rows[shared].unique()
        seeds[color[taking_part], taking_part] = 1
        alone = torch.zeros(d, n, dtype=torch.float64)
        alone[torch.arange(d), order[:d]] = 1
        places = torch.where(shared, color[rows] * n + columns, count * n + own[columns] * m + rows)
        return cls(seeds, alone, places)

    @property
    def products(self) -> int:
        return len(self.seeds) + len(self.alone)


def _coloring(rows: Tensor, columns: Tensor, m: int, n: int) -> Tensor:
    """Return a color for every row, (m,), such that rows of one color share no column; fullest rows first."""
    entries: list[list[int]] = [[] for _ in range(m)]
    for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
        entries[i].append(j)
    taken_by = [0] * n  # colors of the rows of each column, one bit per color
    color = [0] * m
    for i in sorted(range(m), key=lambda i: -len(entries[i])):
        forbidden = 0
        for j in entries[i]:
            forbidden |= taken_by[j]
        free = ~forbidden & (forbidden + 1)
        color[i] = free.bit_length() - 1
        for j in entries[i]:
            taken_by[j] |= free
    return torch.tensor(color, dtype=torch.long)


def on_cpu(t: Tensor) -> Tensor:
    """Return a detached tensor in float64 on the CPU."""
    return t.detach().double().cpu()
