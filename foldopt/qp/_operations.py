"""Operations on the matrices of quadratic programs, dense tensors (B, m, n) or a `SparseMatrix`.

Every function takes either kind, so that the engine is written once for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldopt.qp.matrix import Pattern, SparseMatrix

Matrix = Tensor | SparseMatrix


def dense(M: Matrix) -> Tensor:
    """Return M, narrowed to a dense tensor; the callers have checked that it is one."""
    if isinstance(M, SparseMatrix):
        raise TypeError("a dense tensor was expected, not a SparseMatrix")
    return M


def numbers(M: Matrix) -> Tensor:
    """Return the stored entries of each sample, (B, k)."""
    return M.values if isinstance(M, SparseMatrix) else M.flatten(1)


def matmul(M: Matrix, x: Tensor) -> Tensor:
    """Return the products M x for x (B, n, k)."""
    return M.matvec(x) if isinstance(M, SparseMatrix) else M @ x


def split(M: Matrix) -> tuple[Pattern | None, Tensor]:
    """Return the sparsity pattern (None if M is dense) and the tensor of entries; the inverse of `joined`."""
    return (M.pattern, M.values) if isinstance(M, SparseMatrix) else (None, M)


def joined(pattern: Pattern | None, tensor: Tensor) -> Matrix:
    """Return the matrix with a sparsity pattern (None if it is dense) and a tensor of entries."""
    return tensor if pattern is None else SparseMatrix(pattern, tensor)


def outer(pattern: Pattern | None, left: Tensor, right: Tensor) -> Tensor:
    """Return the entries of left right' in a sparsity pattern, for left (B, m, k) and right (B, n, k)."""
    if pattern is None:
        return left @ right.mT
    return (left.index_select(1, pattern.rows) * right.index_select(1, pattern.columns)).sum(2)


def rescaled(M: Matrix, left: Tensor, right: Tensor) -> Matrix:
    """Return diag(left) M diag(right), for left (B, m) and right (B, n)."""
    if isinstance(M, SparseMatrix):
        p = M.pattern
        return SparseMatrix(p, left.index_select(1, p.rows) * M.values * right.index_select(1, p.columns))
    return left[:, :, None] * M * right[:, None, :]


def where_samples(mask: Tensor, M: Matrix, other: Tensor | float = 0.0) -> Matrix:
    """Return M where the mask (B,) is True, and `other` times the identity in the other samples."""
    if isinstance(M, SparseMatrix):
        fill = 0.0 if other == 0.0 else torch.where(M.pattern.rows == M.pattern.columns, other, 0.0).to(M.values)
        return SparseMatrix(M.pattern, torch.where(mask[:, None], M.values, fill))
    fill = other * torch.eye(M.shape[1], dtype=M.dtype, device=M.device) if other != 0.0 else 0.0
    return torch.where(mask[:, None, None], M, fill)


def masked_rows(M: Matrix, mask: Tensor) -> Matrix:
    """Return M with zeros in the rows where the mask (B or 1, m) is False."""
    if isinstance(M, SparseMatrix):
        return SparseMatrix(M.pattern, torch.where(mask.index_select(1, M.pattern.rows), M.values, 0))
    return torch.where(mask[:, :, None], M, 0)


def largest_in_rows(M: Matrix, weights: Tensor | None = None) -> Tensor:
    """Return the largest entry of each row of M >= 0, (B, m), after multiplying the columns by weights (B, n) >= 0."""
    if isinstance(M, SparseMatrix):
        p = M.pattern
        terms = M.values if weights is None else M.values * weights.index_select(1, p.columns)
        return _largest(terms, p.rows, p.shape[0])
    if not M.shape[2]:
        return M.new_zeros(M.shape[:2])
    return (M if weights is None else M * weights[:, None, :]).amax(2)


def largest_in_columns(M: Matrix, weights: Tensor | None = None) -> Tensor:
    """Return the largest entry of each column of M >= 0, (B, n), after multiplying the rows by weights (B, m) >= 0."""
    if isinstance(M, SparseMatrix):
        return largest_in_rows(M.mT, weights)
    if not M.shape[1]:
        return M.new_zeros(len(M), M.shape[2])
    return (M if weights is None else M * weights[:, :, None]).amax(1)


def _largest(terms: Tensor, at: Tensor, size: int) -> Tensor:
    out = terms.new_zeros(len(terms), size)
    return out.scatter_reduce(1, at.expand(len(terms), -1), terms, "amax")


def single_entries(M: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return which rows have exactly one nonzero entry, (B, m) bool, and the column and value of that entry.

    In the other rows the column is arbitrary and the value 1. If a dense M is one matrix expanded over the batch, B is
    1 in the result.
    """
    if isinstance(M, SparseMatrix):
        p, there = M.pattern, (M.values != 0)
        zero = torch.zeros(len(M), p.shape[0], dtype=torch.long, device=M.device)
        single = zero.index_add(1, p.rows, there.long()) == 1
        at = zero.index_add(1, p.rows, torch.where(there, p.columns, 0))
        value = M.values.new_zeros(len(M), p.shape[0]).index_add(1, p.rows, M.values)
        return single, torch.where(single, at, 0), torch.where(single, value, 1.0)
    C = M[:1] if M.stride(0) == 0 else M
    single = (C != 0).sum(2) == 1
    at = C.abs().argmax(2)
    return single, at, torch.where(single, C.gather(2, at[:, :, None])[:, :, 0], 1.0)


def several_entries(M: Matrix) -> Tensor:
    """Return which rows have more than one nonzero entry, (B, m) bool."""
    if isinstance(M, SparseMatrix):
        zero = torch.zeros(len(M), M.shape[1], dtype=torch.long, device=M.device)
        return zero.index_add(1, M.pattern.rows, (M.values != 0).long()) > 1
    return (M != 0).sum(2) > 1


def assembled(blocks: Sequence[Sequence[Matrix | None]]) -> Matrix:
    """Return the block matrix of rows of blocks, all dense or all sparse; None stands for a block of zeros."""
    heights = [next(M.shape[1] for M in row if M is not None) for row in blocks]
    widths = [next(M.shape[2] for M in column if M is not None) for column in zip(*blocks, strict=True)]
    some = [M for row in blocks for M in row if M is not None]
    first = some[0]
    if isinstance(first, SparseMatrix):
        rows, columns, values, top = [], [], [], 0
        batch = max(len(M) for M in some)
        for row, height in zip(blocks, heights, strict=True):
            left = 0
            for M, width in zip(row, widths, strict=True):
                if isinstance(M, SparseMatrix):
                    rows.append(M.pattern.rows + top)
                    columns.append(M.pattern.columns + left)
                    values.append(M.values.expand(batch, -1))
                left += width
            top += height
        pattern = Pattern(torch.cat(rows), torch.cat(columns), (sum(heights), sum(widths)))
        return SparseMatrix(pattern, torch.cat(values, 1))
    batch = len(first)
    made = [
        [M if isinstance(M, Tensor) else first.new_zeros(batch, h, w) for M, w in zip(row, widths, strict=True)]
        for row, h in zip(blocks, heights, strict=True)
    ]
    return torch.cat([torch.cat(row, 2) for row in made], 1)


def zeros(like: Matrix, m: int, n: int) -> Matrix:
    """Return matrices of zeros (B, m, n), dense or sparse as `like`."""
    if isinstance(like, SparseMatrix):
        return SparseMatrix(Pattern.none((m, n), like.device), like.values[:, :0])
    return like.new_zeros(len(like), m, n)


def identity(like: Matrix, n: int, times: float = 1.0) -> Matrix:
    """Return multiples of the identity, (B, n, n), dense or sparse as `like`."""
    if isinstance(like, SparseMatrix):
        return SparseMatrix(Pattern.identity(n, like.device), like.values.new_full((len(like), n), times))
    return (times * torch.eye(n, dtype=like.dtype, device=like.device)).expand(len(like), n, n)


def diagonal(like: Matrix, entries: Tensor) -> Matrix:
    """Return diagonal matrices with these entries (B, n), dense or sparse as `like`."""
    if isinstance(like, SparseMatrix):
        return SparseMatrix(Pattern.identity(entries.shape[1], like.device), entries)
    return torch.diag_embed(entries)


def column(like: Matrix, values: Tensor) -> Matrix:
    """Return matrices with a single column of values (B, m), dense or sparse as `like`."""
    if isinstance(like, SparseMatrix):
        at = torch.arange(values.shape[1], device=values.device)
        return SparseMatrix(Pattern(at, torch.zeros_like(at), (values.shape[1], 1)), values)
    return values[:, :, None]


def selected_rows(M: Matrix, rows: Tensor) -> Matrix:
    """Return the rows (k,) int64 of every sample, (B, k, n)."""
    if isinstance(M, SparseMatrix):
        p = M.pattern
        place = torch.full((p.shape[0],), -1, dtype=torch.long, device=M.device)
        place[rows] = torch.arange(len(rows), device=M.device)
        kept = (place[p.rows] >= 0).nonzero()[:, 0]
        pattern = Pattern(place[p.rows[kept]], p.columns[kept], (len(rows), p.shape[1]))
        return SparseMatrix(pattern, M.values[:, kept])
    return M[:, rows]


def compact(M: Matrix) -> Tensor:
    """Return a batch of one (1, k, n) as a dense matrix (k, n') with the same MM'; columns of zeros are left out."""
    if isinstance(M, SparseMatrix):
        used, at = torch.unique(M.pattern.columns, return_inverse=True)
        out = M.values.new_zeros(M.pattern.shape[0], len(used))
        return out.index_put((M.pattern.rows, at), M.values[0])
    return M[0]
