"""Linear algebra on batches of matrices, around one fault and one slow path of PyTorch on the CPU.

**LU.** After ``torch.set_num_threads(k)`` with k above 1, torch.linalg on the CPU factors the matrices of a batch in
threads that oneMKL splits again. For more than about 150 rows the pivots are then wrong without any report in `info`,
or the call never returns (pytorch issues 141358 and 142815, torch 2.5 to 2.15). Matrices of more than `LARGEST` rows
are therefore factored one by one in that case.

**Matrix times vector.** torch.bmm with a single column takes 2 to 5 times as long as with a single row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "lu_factor", "matvec", "solve"]

LARGEST = 128  # rows up to which batched LU is safe


def lu_factor(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor matrices as torch.linalg.lu_factor_ex does.

    Args:
        M: matrices (B, n, n).

    Returns:
        The tuple (lu, pivots, info): (B, n, n), (B, n) and (B,); info is not 0 where a matrix is singular.

    Examples:
        >>> lu, pivots, info = foldopt.batched.lu_factor(torch.eye(2).expand(3, 2, 2))
        >>> info
        tensor([0, 0, 0], dtype=torch.int32)
    """
    if _safe(M):
        return torch.linalg.lu_factor_ex(M)
    lu, pivots, info = zip(*map(torch.linalg.lu_factor_ex, M), strict=True)
    return torch.stack(lu), torch.stack(pivots), torch.stack(info)


def solve(M: Tensor, rhs: Tensor) -> Tensor:
    """Solve M z = rhs as torch.linalg.solve does.

    Args:
        M: regular matrices (B, n, n).
        rhs: right-hand sides (B, n) or (B, n, k).

    Returns:
        z, of the shape of rhs.

    Examples:
        >>> foldopt.batched.solve(2 * torch.eye(2).expand(1, 2, 2), torch.tensor([[2.0, 4.0]]))
        tensor([[1., 2.]])
    """
    return torch.linalg.solve(M, rhs) if _safe(M) else torch.stack(list(map(torch.linalg.solve, M, rhs)))


def matvec(A: Any, x: Tensor) -> Tensor:
    """Multiply each matrix with a vector.

    Args:
        A: matrices (B, m, n): a tensor or a `foldopt.qp.matrix.SparseMatrix`.
        x: vectors (B, n).

    Returns:
        The products (B, m).

    Examples:
        >>> foldopt.batched.matvec(torch.ones(1, 2, 3), torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[6., 6.]])
    """
    if not isinstance(A, Tensor):
        return A.matvec(x)
    return torch.bmm(x[:, None, :], A.mT)[:, 0]


def _safe(M: Tensor) -> bool:
    """Return whether torch factors these matrices correctly as a batch."""
    return M.is_cuda or len(M) < 2 or M.shape[1] <= LARGEST or torch.get_num_threads() == 1
