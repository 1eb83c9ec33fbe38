"""Batches of sparse matrices with one sparsity pattern, as an argument of `foldopt.QPLayer`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foldopt.qp._sparse_kkt import packages

__all__ = ["Pattern", "SparseMatrix"]


class Pattern:
    """The sparsity pattern of a matrix: the positions that may hold nonzeros.

    Args:
        rows: (nnz,) int64, the row of each entry.
        columns: (nnz,) int64, the column of each entry. No position may occur twice; the order is free.
        shape: the shape (m, n) of the matrix.

    Examples:
        >>> from foldopt.qp import Pattern
        >>> pattern = Pattern(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), (2, 3))
        >>> pattern.transposed.shape
        (3, 2)
    """

    def __init__(self, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.columns, self.shape = rows, columns, shape

    @classmethod
    def identity(cls, n: int, device: torch.device) -> Pattern:
        """Return the pattern of a diagonal matrix.

        Args:
            n: its number of rows and columns.
            device: where the indices are stored.

        Returns:
            The pattern, of shape (n, n).
        """
        at = torch.arange(n, device=device)
        return cls(at, at, (n, n))

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> Pattern:
        """Return the pattern of a matrix of zeros.

        Args:
            shape: the shape (m, n) of the matrix.
            device: where the indices are stored.

        Returns:
            The pattern, without entries.
        """
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return cls(empty, empty, shape)

    def same_as(self, other: Pattern) -> bool:
        """Return whether another pattern has the same shape and the same positions in the same order.

        Args:
            other: the pattern to compare with.

        Returns:
            True if both are the same.
        """
        return (
            self.shape == other.shape
            and len(self.rows) == len(other.rows)
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.columns, other.columns)
        )

    @cached_property
    def distinct(self) -> bool:
        """Whether no position occurs twice."""
        place = torch.sort(self.rows * self.shape[1] + self.columns).values
        return bool((place[1:] != place[:-1]).all())

    @cached_property
    def transposed(self) -> Pattern:
        """The pattern of the transpose, with its entries in the same order."""
        return Pattern(self.columns, self.rows, (self.shape[1], self.shape[0]))

    @cached_property
    def by_rows(self) -> tuple[Any, Any, Any]:
        """The pattern in compressed rows, as three numpy arrays: order, columns, row pointers.

        The order sorts the entries by row and column; it is None if they are sorted.
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
    """A batch of sparse matrices (B, m, n) that share one sparsity pattern.

    Pass it to `foldopt.QPLayer` as Q, G or A. It works where torch's sparse tensors do not, as inside the transforms of
    `torch.func`, and gradients reach `values`. It has the few methods of a tensor that the engine uses.

    Args:
        pattern: the positions of the entries.
        values: (B, nnz), the entries of each sample in the order of the pattern; (nnz,) for one matrix that the whole
            batch shares.

    Examples:
        The gradient of x_1 + x_2, where x minimizes 1/2 (q_1 x_1^2 + q_2 x_2^2) - x_1 - x_2, with respect to q:

        >>> from foldopt.qp import Pattern, SparseMatrix
        >>> q = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Q = SparseMatrix(Pattern(torch.tensor([0, 1]), torch.tensor([0, 1]), (2, 2)), q)
        >>> x = foldopt.QPLayer()(Q, torch.tensor([-1.0, -1.0]))
        >>> x.sum().backward()
        >>> q.grad
        tensor([-1.0000, -0.2500])
    """

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        self.pattern, self.values = pattern, values

    @property
    def shape(self) -> torch.Size:
        """The shape: (B, m, n), or (m, n) if the values are (nnz,)."""
        return torch.Size((*self.values.shape[:-1], *self.pattern.shape))

    @property
    def device(self) -> torch.device:
        """The device of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def mT(self) -> SparseMatrix:  # noqa: N802  # as torch calls it
        """The transposed matrices; they share the values."""
        return SparseMatrix(self.pattern.transposed, self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, samples: Tensor) -> SparseMatrix:
        return SparseMatrix(self.pattern, self.values[samples])

    def abs(self) -> SparseMatrix:
        """Return the matrices of absolute values."""
        return SparseMatrix(self.pattern, self.values.abs())

    def detach(self) -> SparseMatrix:
        """Return the matrices detached from autograd's graph."""
        return SparseMatrix(self.pattern, self.values.detach())

    def matvec(self, x: Tensor) -> Tensor:
        """Return the matrix-vector products.

        Args:
            x: (B, n), or (B, n, k) for k vectors in each sample.

        Returns:
            (B, m) or (B, m, k).
        """
        values = self.values if x.dim() == 2 else self.values[:, :, None]
        terms = values * x.index_select(1, self.pattern.columns)
        return terms.new_zeros(len(terms), self.pattern.shape[0], *x.shape[2:]).index_add(1, self.pattern.rows, terms)

    def to_scipy(self, sample: int) -> Any:
        """Return the matrix of one sample as a SciPy CSR matrix, without explicit zeros.

        Args:
            sample: its position in the batch.

        Returns:
            A ``scipy.sparse.csr_matrix`` (m, n).

        Raises:
            MissingDependencyError: if SciPy or qdldl is not installed.
        """
        _, sparse, _ = packages()
        order, columns, starts = self.pattern.by_rows
        values = self.values[sample].detach().cpu().numpy()
        out = sparse.csr_matrix((values if order is None else values[order], columns, starts), shape=self.pattern.shape)
        if not values.all():
            out = out.copy()  # the pattern is shared
            out.eliminate_zeros()
        return out
