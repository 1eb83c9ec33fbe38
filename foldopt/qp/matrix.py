"""Batches of sparse matrices with one sparsity pattern, as an argument of `foldopt.QPLayer`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foldopt.qp._sparse_kkt import packages

__all__ = ["Pattern", "SparseMatrix"]


class Pattern:
    """Where a sparse matrix (m, n) has entries: rows and columns (nnz,), int64, each place at most once."""

    def __init__(self, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.columns, self.shape = rows, columns, shape

    @classmethod
    def identity(cls, n: int, device: torch.device) -> Pattern:
        """Return the diagonal of a matrix (n, n)."""
        at = torch.arange(n, device=device)
        return cls(at, at, (n, n))

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> Pattern:
        """Return a matrix without entries."""
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return cls(empty, empty, shape)

    def same_as(self, other: Pattern) -> bool:
        """Whether the other has the same entries in the same order."""
        return (
            self.shape == other.shape
            and len(self.rows) == len(other.rows)
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.columns, other.columns)
        )

    @cached_property
    def distinct(self) -> bool:
        """Whether no place has two entries."""
        place = torch.sort(self.rows * self.shape[1] + self.columns).values
        return bool((place[1:] != place[:-1]).all())

    @cached_property
    def transposed(self) -> Pattern:
        """Return the pattern of the transpose, its entries in the same order."""
        return Pattern(self.columns, self.rows, (self.shape[1], self.shape[0]))

    @cached_property
    def by_rows(self) -> tuple[Any, Any, Any]:
        """Return as numpy arrays the order of the entries by row and column, their columns and where each row begins.

        The order is None where the entries are in it.
        """
        import numpy as np

        rows, columns = self.rows.cpu().numpy(), self.columns.cpu().numpy()
        place = rows * self.shape[1] + columns
        order = None if (place[1:] > place[:-1]).all() else np.argsort(place, kind="stable")
        columns = columns if order is None else columns[order]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.shape[0]))])
        small = np.int32 if max(len(rows), *self.shape) < 2**31 - 1 else np.int64
        return order, columns.astype(small), starts.astype(small)


class SparseMatrix:
    """A batch of sparse matrices (B, m, n) with one pattern: values (B, nnz).

    It has of a tensor's methods those that the engine uses. As an argument of `QPLayer` it may have values (nnz,).
    """

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        self.pattern, self.values = pattern, values

    @property
    def shape(self) -> torch.Size:
        """The shape (B, m, n); (m, n) with values (nnz,)."""
        return torch.Size((*self.values.shape[:-1], *self.pattern.shape))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def mT(self) -> SparseMatrix:  # noqa: N802  # as torch calls it
        """The transposes."""
        return SparseMatrix(self.pattern.transposed, self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, samples: Tensor) -> SparseMatrix:
        return SparseMatrix(self.pattern, self.values[samples])

    def abs(self) -> SparseMatrix:
        """Return the absolute values."""
        return SparseMatrix(self.pattern, self.values.abs())

    def detach(self) -> SparseMatrix:
        """Return it without gradient."""
        return SparseMatrix(self.pattern, self.values.detach())

    def matvec(self, x: Tensor) -> Tensor:
        """Return the products with x (B, n) or (B, n, k), (B, m) or (B, m, k)."""
        values = self.values if x.dim() == 2 else self.values[:, :, None]
        terms = values * x.index_select(1, self.pattern.columns)
        return terms.new_zeros(len(terms), self.pattern.shape[0], *x.shape[2:]).index_add(1, self.pattern.rows, terms)

    def to_scipy(self, sample: int) -> Any:
        """Return one sample as a scipy CSR matrix."""
        _, sparse, _ = packages()
        order, columns, starts = self.pattern.by_rows
        values = self.values[sample].detach().cpu().numpy()
        out = sparse.csr_matrix((values if order is None else values[order], columns, starts), shape=self.pattern.shape)
        if not values.all():
            out = out.copy()  # the pattern is shared
            out.eliminate_zeros()
        return out
