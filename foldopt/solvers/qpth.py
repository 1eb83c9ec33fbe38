"""The quadratic program of qpth (Amos and Kolter, OptNet, 2017), with correct sums and optional equalities."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foldopt.errors import MissingDependencyError
from foldopt.updates.admm import batched_qp

__all__ = ["qp_function", "solve_qpth"]


def qp_function() -> Any:
    """Return qpth's QPFunction. Raises MissingDependencyError without qpth."""
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise MissingDependencyError(
            "qpth is not installed; install it with: pip install 'foldopt[qpth]'. foldopt.QPLayer and foldopt.f_pgd_b "
            "need nothing."
        ) from error
    return QPFunction


def solve_qpth(*parts: Tensor, eps: float, max_iter: int) -> Tensor:
    """Solve the program (Q, p, G, h, A, b) with qpth, (B, n); shapes as for `foldopt.QPLayer`, Q positive definite.

    qpth averages the gradient of what a batch shares, so it is given one of each per sample. eps, max_iter: its own
    tolerance and cap of iterations. It does not tell which samples it solved, and has no second derivative.
    """
    Q, p, G, h, A, b = (part.contiguous() for part in batched_qp(*parts))
    none = p.new_zeros(0)
    return qp_function()(verbose=-1, eps=eps, maxIter=max_iter)(Q, p, G, h, *((A, b) if b.shape[1] else (none, none)))
