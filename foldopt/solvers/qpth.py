"""qpth, the differentiable solver of quadratic programs of OptNet, with correct sums and optional equalities.

Source: Amos and Kolter, OptNet (2017).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foldopt.errors import MissingDependencyError
from foldopt.updates.admm import batched_qp

__all__ = ["qp_function", "solve_qpth"]


def qp_function() -> Any:
    """Return the class QPFunction of qpth.

    Returns:
        The class.

    Raises:
        MissingDependencyError: qpth is not installed.

    Examples:
        >>> foldopt.solvers.qpth.qp_function().__name__
        'QPFunction'
    """
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise MissingDependencyError(
            "qpth is not installed; install it with: pip install 'foldopt[qpth]'. foldopt.QPLayer and foldopt.f_pgd_b "
            "need no extra package."
        ) from error
    return QPFunction


def solve_qpth(*parts: Tensor, eps: float, max_iter: int) -> Tensor:
    """Solve quadratic programs with qpth, differentiably.

    qpth returns the batch mean as the gradient of an argument without a batch dimension, so every argument is expanded
    over the batch first. It does not report which samples it solved, and has no second derivative.

    Args:
        *parts: Q, p, G, h, A and b, of the shapes of `foldopt.QPLayer`; Q is positive definite.
        eps: tolerance of its interior point.
        max_iter: largest number of its iterations.

    Returns:
        x, (B, n).

    Raises:
        InputError: shapes do not fit.
        MissingDependencyError: qpth is not installed.

    Examples:
        >>> none = torch.zeros(0, 1), torch.zeros(0)
        >>> program = torch.eye(1), torch.tensor([[-2.0]]), torch.eye(1), torch.ones(1), *none
        >>> x = foldopt.solvers.qpth.solve_qpth(*(part.double() for part in program), eps=1e-12, max_iter=30)
        >>> round(x.item(), 6)
        1.0
    """
    Q, p, G, h, A, b = (part.contiguous() for part in batched_qp(*parts))
    none = p.new_zeros(0)
    return qp_function()(verbose=-1, eps=eps, maxIter=max_iter)(Q, p, G, h, *((A, b) if b.shape[1] else (none, none)))
