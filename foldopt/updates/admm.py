"""ADMM for quadratic programs as an update step (paper eqs. 29-30)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldopt.checks import require_positive
from foldopt.errors import InputError

ADMMState = tuple[Tensor, Tensor]


class ADMM(nn.Module):
    """One ADMM step for min 1/2 x'Qx + p'x subject to Ax = b, x >= 0 (eq. 29, which must read argmin).

    State (z, u), both (B, n): the nonnegative copy of x and the scaled dual of x = z. Both are needed: from (x*, 0) the
    folded derivative is wrong; `state` recovers u from a primal solution. Boyd et al., Distributed optimization
    and statistical learning via ADMM (2011), 5.2.

    Args:
        rho: penalty above 0. The gradient of the folded layer does not depend on it.

    Parameters of the step: Q (n, n) or (B, n, n), positive semidefinite; p (B, n); A (k, n) or (B, k, n), of full row
    rank; b (k,) or (B, k). A bound that the equalities imply already makes I - Phi singular: leave it out.
    """

    def __init__(self, rho: float = 1.0) -> None:
        super().__init__()
        require_positive("rho", rho)
        self.rho = rho

    def forward(self, state: ADMMState, Q: Tensor, p: Tensor, A: Tensor, b: Tensor) -> ADMMState:
        """Return the state after one step."""
        z, u = state
        Q, A, b = _batched(p, Q, A, b)
        n, k = p.shape[1], b.shape[1]
        penalty = self.rho * torch.eye(n, dtype=p.dtype, device=p.device)
        corner = p.new_zeros(len(p), k, k)
        kkt = torch.cat([torch.cat([Q + penalty, A.mT], 2), torch.cat([A, corner], 2)], 1)
        x = torch.linalg.solve(kkt, torch.cat([self.rho * (z - u) - p, b], 1))[:, :n]
        z = (x + u).clamp(min=0)
        return z, u + x - z

    @torch.no_grad()
    def state(self, x: Tensor, Q: Tensor, p: Tensor, A: Tensor, b: Tensor) -> ADMMState:
        """Return the fixed point (z, u) that belongs to the primal solution x (B, n).

        rho u = -lam with the bounds' multipliers lam = Qx + p + A'nu, nu by least squares on the entries of x above 0.
        """
        Q, A, b = _batched(p, Q, A, b)
        gradient = torch.einsum("bij,bj->bi", Q, x) + p
        free = x > 1e-9 * (1 + x.abs().amax(1, keepdim=True))
        nu = -torch.linalg.pinv(A.mT * free[:, :, None]) @ (gradient * free)[:, :, None]
        lam = (gradient + (A.mT @ nu)[:, :, 0]).clamp(min=0)
        return torch.where(free, x, 0), -torch.where(free, 0, lam) / self.rho


def _batched(p: Tensor, Q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, n = p.shape
    if Q.shape[-2:] != (n, n) or A.shape[-1] != n or b.shape[-1] != A.shape[-2]:
        raise InputError(
            f"Q has shape {tuple(Q.shape)}, A {tuple(A.shape)}, b {tuple(b.shape)}: expected (n, n), (k, n), (k,) or "
            f"these behind a batch dimension, to go with p of shape {(B, n)}."
        )
    return Q.expand(B, n, n), A.expand(B, *A.shape[-2:]), b.expand(B, b.shape[-1])
