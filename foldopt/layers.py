"""Ready layers: the folded optimizers of the paper's section 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foldopt.fold import FoldedLayer, fold
from foldopt.step import State
from foldopt.updates.sqp import SQP, SQPProgram


def f_sqp(
    program: SQPProgram,
    solve: Callable[..., State],
    *,
    stepsize: float = 1.0,
    dtype: torch.dtype | None = torch.float64,
    **options: Any,
) -> FoldedLayer:
    """f-SQP: any smooth program, solved by any black box, folded through one SQP step (paper section 6, eqs. 31-32).

    Args:
        program: what SQP models, e.g. ``SmoothProgram(objective, equalities, inequalities)``.
        solve: ``solve(*params) -> (x, nu, lam)``, the primal solution (B, n) and the multipliers (B, p) and (B, m) of
            the Lagrangian f + nu.h + lam.g, lam >= 0.
        stepsize: alpha of eq. 32. dtype: float64 by default whatever the network's dtype; None keeps the caller's.
        options: as for `foldopt.fold`.

    Returns:
        ``layer(*params) -> (x, nu, lam)``, differentiable. Where active constraints are linearly dependent or the
        solution is not unique, the derivative is the least-norm one and ``layer.update.last.singular`` marks the
        sample; at a vertex (as many active constraints as variables) it is exactly zero.
    """
    return fold(solve, SQP(program, stepsize), dtype=dtype, **options)
