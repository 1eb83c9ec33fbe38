"""Linear algebra on batches, past a fault and a slow path of PyTorch's on the CPU.

**LU.** After ``torch.set_num_threads(k)``, k above 1, torch.linalg factors the matrices of a batch on the CPU in
threads that oneMKL splits once more; from some 150 rows on the pivots are then wrong, without a word in `info`, or it
never returns (pytorch issues 141358 and 142815, torch 2.5 to 2.15). Larger matrices are therefore factored one after
the other there.

**Matrix times vector.** torch.bmm with a single column takes 2 to 5 times as long as with a single row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "lu_factor", "matvec", "solve"]

LARGEST = 128  # rows of which LU is safe in a batch


def lu_factor(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lu, pivots, info) of M, (B, n, n), as torch.linalg.lu_factor_ex does."""
    if _safe(M):
        return torch.linalg.lu_factor_ex(M)
    lu, pivots, info = zip(*map(torch.linalg.lu_factor_ex, M), strict=True)
    return torch.stack(lu), torch.stack(pivots), torch.stack(info)


def solve(M: Tensor, rhs: Tensor) -> Tensor:
    """Return the solution of M z = rhs, M (B, n, n), rhs (B, n) or (B, n, k), as torch.linalg.solve does."""
    return torch.linalg.solve(M, rhs) if _safe(M) else torch.stack(list(map(torch.linalg.solve, M, rhs)))


def matvec(A: Any, x: Tensor) -> Tensor:
    """Return A x, (B, m), for A (B, m, n), a tensor or a `foldopt.qp.matrix.SparseMatrix`, and x (B, n)."""
    if not isinstance(A, Tensor):
        return A.matvec(x)
    return torch.bmm(x[:, None, :], A.mT)[:, 0]


def _safe(M: Tensor) -> bool:
    return M.is_cuda or len(M) < 2 or M.shape[1] <= LARGEST or torch.get_num_threads() == 1
