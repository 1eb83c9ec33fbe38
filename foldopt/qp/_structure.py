"""Makes the matrices H and C of a `Program` from the arguments Q, G and A of a quadratic program.

A sparse argument is split into its sparsity pattern, which is found once, and its values, which gradients reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt._compat import batched_by_autograd, untransformed, wrapped_by_func
from foldopt.errors import InputError
from foldopt.qp._program import Program
from foldopt.qp.matrix import Pattern, SparseMatrix

LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def is_sparse_argument(M: Any) -> bool:
    """Return whether M is a sparse matrix, of a kind that `sparse_argument` accepts or refuses."""
    if isinstance(M, Tensor):
        return M.layout != torch.strided
    return isinstance(M, SparseMatrix) or (hasattr(M, "tocsr") and hasattr(M, "shape"))


class SparseArgument(NamedTuple):
    """A matrix that the user passed: its sparsity pattern, and its values, (B, nnz) or shared by the batch (nnz,)."""

    pattern: Pattern
    values: Tensor


def sparse_argument(name: str, M: Any, device: torch.device) -> SparseArgument:
    """Return the pattern and values of a torch sparse (COO, CSR, CSC), SciPy, `SparseMatrix` or dense matrix.

    The gradient with respect to the values reaches M in its own layout. The pattern of a batch (B, m, n) is the union
    over its samples. A dense M keeps its zeros only if it needs a gradient. Also under transforms of `torch.func` the
    pattern consists of plain tensors, so that a layer may keep it.

    Raises InputError for another layout, another device, or numbers that are not real.
    """
    if isinstance(M, Tensor) and M.layout == torch.strided:
        found = _of_dense(M)
    else:
        with untransformed():
            found = _of_sparse(name, M, device)
    values = found.values
    if values.is_complex() or values.dtype == torch.bool:
        raise InputError(f"{name} is of dtype {values.dtype}, expected real numbers.")
    if values.device != device:
        raise InputError(f"{name} is on {values.device}, other arguments are on {device}; move them to one device.")
    return SparseArgument(found.pattern, values)


def _of_sparse(name: str, M: Any, device: torch.device) -> SparseArgument:
    if isinstance(M, SparseMatrix):
        return _of_pattern(name, M)
    if not isinstance(M, Tensor):
        return _of_scipy(name, M, device)
    if M.layout == torch.sparse_coo:
        return _of_coo(name, M)
    if M.layout in LAYOUTS:
        return _of_compressed(name, M)
    raise InputError(
        f"{name} is of layout {M.layout}, expected dense, sparse COO, CSR or CSC; pass {name}.to_sparse()."
    )


def _of_pattern(name: str, M: SparseMatrix) -> SparseArgument:
    (rows, columns, (m, n)), values = (M.pattern.rows, M.pattern.columns, M.pattern.shape), M.values
    count = len(rows)
    if values.dim() not in (1, 2) or values.shape[-1] != count or len(columns) != count:
        raise InputError(
            f"{name} has values of shape {tuple(values.shape)}, expected {(count,)} or (B, {count}): its pattern has "
            f"{count} row and {len(columns)} column indices."
        )
    if ((rows < 0) | (rows >= m) | (columns < 0) | (columns >= n)).any():
        raise InputError(
            f"{name} has an entry outside its shape {(m, n)}; correct the rows and columns of its pattern."
        )
    if not M.pattern.distinct:
        raise InputError(f"{name} has two entries in one position; add them up.")
    return SparseArgument(M.pattern, values)


def _of_scipy(name: str, M: Any, device: torch.device) -> SparseArgument:
    import numpy as np

    csr = M.tocsr()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    if not np.issubdtype(csr.dtype, np.number) or np.issubdtype(csr.dtype, np.complexfloating):
        raise InputError(f"{name} is of dtype {csr.dtype}, expected real numbers.")
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    at, columns = (torch.as_tensor(part, dtype=torch.long, device=device) for part in (rows, csr.indices))
    values = torch.as_tensor(csr.data.astype(np.float64), device=device)
    return SparseArgument(Pattern(at, columns, (int(csr.shape[0]), int(csr.shape[1]))), values)


def _of_dense(M: Tensor) -> SparseArgument:
    m, n = M.shape[-2:]
    whole = M.requires_grad or wrapped_by_func(M) or batched_by_autograd(M)
    with untransformed():
        if whole:
            kept = torch.arange(m * n, device=M.device)
        else:
            there = (M != 0).flatten(-2)
            kept = (there if M.dim() == 2 else there.any(0)).nonzero()[:, 0]
        pattern = Pattern(kept // max(n, 1), kept % max(n, 1), (m, n))
    flat = M.flatten(-2)
    return SparseArgument(pattern, flat if whole else flat[..., kept])


def _of_coo(name: str, M: Tensor) -> SparseArgument:
    if M.dense_dim() or M.dim() not in (2, 3):
        raise InputError(
            f"{name} of shape {tuple(M.shape)} has {M.sparse_dim()} sparse and {M.dense_dim()} dense dimensions; "
            "expected a sparse (m, n) or (B, m, n)."
        )
    M = M if M.is_coalesced() else M.coalesce()
    indices, values = M.indices(), M.values()
    if M.dim() == 2:
        return SparseArgument(Pattern(indices[0], indices[1], (M.shape[0], M.shape[1])), values)
    return _united(indices[0], indices[1], indices[2], values, M.shape)


def _of_compressed(name: str, M: Tensor) -> SparseArgument:
    if M.dense_dim() or M.dim() not in (2, 3):
        raise InputError(f"{name} has shape {tuple(M.shape)}, expected a sparse (m, n) or (B, m, n).")
    values: Tensor = _Values.apply(M)
    by_rows = M.layout == torch.sparse_csr
    pointers = M.crow_indices() if by_rows else M.ccol_indices()
    inner = M.col_indices() if by_rows else M.row_indices()
    m, n = M.shape[-2:]
    if M.dim() == 3 and bool((pointers == pointers[:1]).all()) and bool((inner == inner[:1]).all()):
        pointers, inner = pointers[0], inner[0]
    outer = torch.repeat_interleave(
        torch.arange(m if by_rows else n, device=M.device).expand(*pointers.shape[:-1], -1).flatten(),
        pointers.diff(dim=-1).flatten().long(),
    )
    inner = inner.long()
    if inner.dim() == 2:
        batch, count = inner.shape
        sample = torch.arange(batch, device=M.device).repeat_interleave(count)
        rows, columns = (outer, inner.flatten()) if by_rows else (inner.flatten(), outer)
        return _united(sample, rows, columns, values.flatten(), M.shape)
    rows, columns = (outer, inner) if by_rows else (inner, outer)
    order = None if by_rows else torch.argsort(rows * n + columns)
    if order is not None:
        rows, columns, values = rows[order], columns[order], values[..., order]
    return SparseArgument(Pattern(rows, columns, (m, n)), values)


def _united(sample: Tensor, rows: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> SparseArgument:
    """Return the matrices of a batch in the union of their sparsity patterns."""
    batch, m, n = shape
    places, at = torch.unique(rows * n + columns, return_inverse=True)
    pattern = Pattern(places // n, places % n, (m, n))
    return SparseArgument(pattern, values.new_zeros(batch, len(places)).index_put((sample, at), values))


class _Values(torch.autograd.Function):
    """The values of a CSR or CSC tensor, with all derivatives; torch's `values()` has no second derivative."""

    @staticmethod
    def forward(M: Tensor) -> Tensor:
        return M.values().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        (ctx.like,) = (part.detach() for part in inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Filled.apply(g, ctx.like)


class _Filled(torch.autograd.Function):
    """A CSR or CSC tensor with the pattern of another one and these values."""

    @staticmethod
    def forward(values: Tensor, like: Tensor) -> Tensor:
        by_rows = like.layout == torch.sparse_csr
        pointers, inner = (
            (like.crow_indices(), like.col_indices()) if by_rows else (like.ccol_indices(), like.row_indices())
        )
        return torch.sparse_compressed_tensor(
            pointers, inner, values.contiguous(), like.shape, layout=like.layout, check_invariants=False
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Values.apply(g), None


class Structure:
    """Makes programs from sparse Q, G and A of fixed sparsity patterns.

    H is the symmetric part of Q; the rows of C are those of A, then those of G, then the bounds of the variables.
    bounded: whether the variables have bounds.
    """

    def __init__(self, Q: Pattern, G: Pattern, A: Pattern, bounded: bool) -> None:
        self.own, self.bounded = (Q, G, A), bounded
        n = Q.shape[0]
        places = torch.cat([Q.rows * n + Q.columns, Q.columns * n + Q.rows])
        found, at = torch.unique(places, return_inverse=True)
        self.H = Pattern(found // max(n, 1), found % max(n, 1), (n, n))
        self.direct, self.mirrored = at.split([len(Q.rows)] * 2)
        blocks = [A, G] + ([Pattern.identity(n, Q.rows.device)] if bounded else [])
        tops = [0, A.shape[0], A.shape[0] + G.shape[0]]
        self.C = Pattern(
            torch.cat([block.rows + top for block, top in zip(blocks, tops, strict=False)]),
            torch.cat([block.columns for block in blocks]),
            (sum(block.shape[0] for block in blocks), n),
        )

    def suits(self, Q: Pattern, G: Pattern, A: Pattern, bounded: bool) -> bool:
        """Return whether these are its patterns."""
        pairs = zip(self.own, (Q, G, A), strict=True)
        return bounded == self.bounded and all(a is b or a.same_as(b) for a, b in pairs)

    def program(self, *params: Tensor) -> Program:
        """Return the program of Q, p, G, h, A, b, lower, upper, where Q, G and A are values (nnz,) or (B, nnz)."""
        Q, p, G, h, A, b, lower, upper = params
        B = max((len(t) for t in params if t.dim() == 2), default=1)
        n, m, k = p.shape[-1], h.shape[-1], b.shape[-1]
        half = 0.5 * (Q if Q.dim() == 2 else Q[None])
        H = half.new_zeros(len(half), len(self.H.rows)).index_add(1, self.direct, half)
        H = H.index_add(1, self.mirrored, half)
        none = torch.full((B, n if self.bounded else 0), torch.inf, dtype=p.dtype, device=p.device)
        values = [A.expand(B, -1), G.expand(B, -1), torch.ones_like(none)]
        low = [b.expand(B, k), torch.full((B, m), -torch.inf, dtype=p.dtype, device=p.device)]
        low.append(lower.expand(B, n) if lower.shape[-1] else -none)
        high = [b.expand(B, k), h.expand(B, m), upper.expand(B, n) if upper.shape[-1] else none]
        return Program(
            SparseMatrix(self.H, H.expand(B, -1)),
            p.expand(B, n),
            SparseMatrix(self.C, torch.cat(values, 1)),
            torch.cat(low, 1),
            torch.cat(high, 1),
        )


def program_of(
    Q: Tensor,
    p: Tensor,
    G: Tensor,
    h: Tensor,
    A: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    symmetric: Tensor | None = None,
) -> Program:
    """Return the program of dense arguments. The rows of C are those of A, of G, then the bounds if there are any.

    symmetric: the symmetric part of Q if it was computed before, of Q's shape or expanded over the batch.
    """
    dims = ((Q, 3), (p, 2), (G, 3), (h, 2), (A, 3), (b, 2), (lower, 2), (upper, 2))
    B = max((len(t) for t, dim in dims if t.dim() == dim), default=1)
    n, m, k = p.shape[-1], h.shape[-1], b.shape[-1]
    H = symmetrized(Q) if symmetric is None else _SymmetricPart.apply(Q.expand_as(symmetric), symmetric)
    rows, low, high = [], [], []
    if k:
        rows, low, high = [A.expand(B, k, n)], [b.expand(B, k)], [b.expand(B, k)]
    if m:
        rows, high = [*rows, G.expand(B, m, n)], [*high, h.expand(B, m)]
        low.append(torch.full((B, m), -torch.inf, dtype=p.dtype, device=p.device))
    if lower.shape[-1] or upper.shape[-1]:
        none = torch.full((B, n), torch.inf, dtype=p.dtype, device=p.device)
        rows.append(torch.eye(n, dtype=p.dtype, device=p.device).expand(B, n, n))
        low.append(lower.expand(B, n) if lower.shape[-1] else -none)
        high.append(upper.expand(B, n) if upper.shape[-1] else none)
    empty = p.new_zeros(B, 0)
    C = torch.cat(rows, 1) if len(rows) > 1 else rows[0] if rows else p.new_zeros(B, 0, n)
    least, most = (torch.cat(part, 1) if part else empty for part in (low, high))
    return Program(H.expand(B, n, n), p.expand(B, n), C, least, most)


class _SymmetricPart(torch.autograd.Function):
    """The symmetric part of Q, which was computed before; valid where the gradient that comes back is symmetric."""

    @staticmethod
    def forward(Q: Tensor, part: Tensor) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def symmetrized(Q: Tensor) -> Tensor:
    """Return the symmetric part of Q, which alone determines x'Qx."""
    return Q if torch.equal(Q, Q.mT) else (Q + Q.mT) / 2
