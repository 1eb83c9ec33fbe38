"""The SQP step of the portfolio problem in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.problems.blocks import Chosen, times
from foldopt.solvers.qp import TOLERANCE
from foldopt.updates.sqp import SQP, SQPState

SAFE = 1e-10  # smaller pivots of V on the assets held, relative to its largest variance, are left to the general step


class PortfolioSQP(SQP):
    """`foldopt.SQP` on a `PortfolioProblem`, with the quadratic model solved on the assets that are held.

    Where the guess of the active set, which is the step's own, has the risk limit active and determines the solution of
    the model in every sample, the inverse of V on these assets is all that it takes; else it is the general step.
    `last` is None after a step in closed form.
    """

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step."""
        new = _model_solution(*state, *params)
        if new is None:
            return super().forward(state, *params)
        self.last = None
        if self.stepsize == 1:
            return new
        x, nu, lam = (torch.lerp(old, moved, self.stepsize) for old, moved in zip(state, new, strict=True))
        return x, nu, lam


def _model_solution(x: Tensor, nu: Tensor, lam: Tensor, c: Tensor, V: Tensor, gamma: Tensor) -> SQPState | None:
    """Return (x + d, nu, lam) of the quadratic model's solution d; None where the guess is not that of its active set.

    With k = 2 lam_0 / gamma, the model's Hessian is k V, and the gradient of the risk limit is a = 2 V x / gamma. On
    the assets that are held k V (x + d) = c - nu 1 + (lam_0 - mu_0) a, of which two equations for nu and lam_0 - mu_0
    follow from 1'(x + d) = 1 and a'(x + d) = 1 + a'x / 2.
    """
    gamma = gamma.expand(len(x))[:, None]
    lam_0 = lam[:, :1]
    a = times(V, x) * (2 / gamma)
    risk = (a * x).sum(1, keepdim=True) / 2
    with torch.no_grad():
        held = lam[:, 1:] <= x
        if not (lam_0 > 1 - risk).all() or not held.any(1).all():
            return None
        top = c.amax(1, keepdim=True)
        on = Chosen(held)
    below = c - top
    k = lam_0 * (2 / gamma)
    root, info = torch.linalg.cholesky_ex(on.block(V))
    ones, c_held, a_held = on.used.to(x), on.take(below), on.take(a)
    P1, Pc, Pa = torch.cholesky_solve(torch.stack([ones, c_held, a_held], 2), root).unbind(2)
    one_P1, one_Pc, one_Pa = (P.sum(1, keepdim=True) for P in (P1, Pc, Pa))
    a_Pc, a_Pa = ((a_held * P).sum(1, keepdim=True) for P in (Pc, Pa))
    excess = (one_Pc - k) / one_P1
    fallen = (k * (1 + risk) - a_Pc + one_Pa * excess) / (a_Pa - one_Pa.square() / one_P1)  # lam_0 - mu_0
    shift = excess + fallen * one_Pa / one_P1
    new = on.put((Pc - shift * P1 + fallen * Pa) / k)
    reduced = torch.where(held, 0.0, k * times(V, new) - below + shift - fallen * a)
    multipliers = torch.cat([lam_0 - fallen, reduced], 1)
    with torch.no_grad():
        size = c.abs().amax(1, keepdim=True) + multipliers.abs().amax(1, keepdim=True)
        least = torch.where(on.used, root.diagonal(dim1=1, dim2=2).square(), torch.inf).amin(1)
        regular = (info == 0) & (least > SAFE * V.diagonal(dim1=-2, dim2=-1).amax(-1))
        fits = regular.all() & (new >= -TOLERANCE).all() & (multipliers >= -TOLERANCE * size).all()
    return (new, shift + top, multipliers) if fits else None
