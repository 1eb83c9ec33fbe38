"""Ready layers: the folded optimizers of the paper's section 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foldopt.fold import FoldedLayer, fold
from foldopt.solvers.qp import solve_qp
from foldopt.step import State
from foldopt.updates.admm import ADMM, ADMMState, batched_qp
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


class QPLayer(nn.Module):
    """A quadratic program as a layer: folded ADMM (paper eqs. 29-30) around an exact batched solver.

    ``QPLayer()(Q, p, G, h, A, b) -> x`` solves min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, with the arguments of
    qpth's QPFunction in its order. Every argument may lack the batch dimension; the gradient of one that does is the
    sum over the batch. A and b may be None.

    Args:
        rho: penalty of ADMM, above 0; the gradient does not depend on it. dtype: float64 by default whatever the
            caller's, in which x comes back; None keeps the caller's.
        options: as for `foldopt.fold`. on_failure decides what happens to infeasible or unbounded samples (x is NaN
            there) and to those without a derivative.

    ``fold`` is the folded layer of the states (z, u); ``fold.last`` holds its per-sample certificates.
    """

    def __init__(self, rho: float = 1.0, *, dtype: torch.dtype | None = torch.float64, **options: Any) -> None:
        super().__init__()
        self.update = ADMM(rho)
        self.fold = fold(self._solve, self.update, dtype=dtype, **options)

    def forward(
        self, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """Return the solutions, (B, n), in the dtype of Q."""
        if A is None or b is None or not A.numel():
            A, b = p.new_zeros(0, p.shape[-1]), p.new_zeros(0)
        params = Q, p, G, h, A, b
        state = self.fold(*params)
        dtype = self.fold.dtype or Q.dtype
        solved = state[0].detach().isfinite().all(1, keepdim=True)
        state = tuple(torch.where(solved, part.to(dtype), 0) for part in state)
        x = self.update.primal(state, *(t.to(dtype) for t in params))
        return torch.where(solved, x, torch.nan).to(Q.dtype)

    def _solve(self, *params: Tensor) -> ADMMState:
        Q, p, G, h, A, b = batched_qp(*params)
        found = solve_qp((Q + Q.mT) / 2, p, A, b, G, h)
        return self.update.state(found.x, found.lam, G)
