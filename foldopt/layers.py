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
        ``layer(*params) -> (x, nu, lam)``, differentiable. At a vertex (as many active constraints as variables) the
        derivative is exactly zero; at a weakly active constraint it is a one-sided one; where the multipliers are not
        unique it is that of least norm, and ``layer.update.last.singular`` marks the sample. Where the solution itself
        is not unique there is no derivative and the sample falls under `on_failure`.
    """
    return fold(solve, SQP(program, stepsize), dtype=dtype, **options)
