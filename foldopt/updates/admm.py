"""ADMM for quadratic programs as an update step (paper eqs. 29-30)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldopt.checks import require_positive
from foldopt.errors import InputError
from foldopt.solvers.multipliers import recover_multipliers

ADMMState = tuple[Tensor, Tensor]
QPData = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class ADMM(nn.Module):
    """One ADMM step for min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, parameters in the order of qpth.

    With G = -I and h = 0 it is the paper's (eqs. 29-30, which must read argmin). State (z, u), both (B, m): the copy z
    of Gx that is kept below h, and the scaled dual of Gx = z. Both are needed: with u = 0 at a solution the folded
    derivative is wrong; `state` makes both from a solution and its multipliers. Boyd et al., Distributed optimization
    and statistical learning via ADMM (2011), 5.2.

    Args:
        rho: penalty above 0. The gradient of the folded layer does not depend on it.

    Parameters of the step, each also without its batch dimension where the batch shares it: Q (B, n, n), positive
    semidefinite; p (B, n); G (B, m, n); h (B, m); A (B, k, n) of full row rank and b (B, k), k may be 0. An active
    constraint that the others imply makes I - Phi singular, as the dual is not unique; the default linear solver then
    returns the exact derivative by least squares. At a weakly active constraint (no slack, no multiplier)
    the derivative is the one-sided one with the constraint active.
    """

    def __init__(self, rho: float = 1.0) -> None:
        super().__init__()
        require_positive("rho", rho)
        self.rho = rho

    def forward(self, state: ADMMState, *params: Tensor) -> ADMMState:
        """Return the state after one step."""
        z, u = state
        Q, p, G, h, A, b = batched_qp(*params)
        Gx = torch.einsum("bmn,bn->bm", G, self._minimize(z - u, Q, p, G, A, b))
        z = torch.where(Gx + u < h, Gx + u, h)  # torch.minimum would mix both sides at a tie
        return z, u + Gx - z

    def primal(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return x (B, n) of a state; at the fixed point it is the solution."""
        z, u = state
        Q, p, G, _, A, b = batched_qp(*params)
        return self._minimize(z - u, Q, p, G, A, b)

    def state(self, x: Tensor, lam: Tensor, G: Tensor) -> ADMMState:
        """Return the fixed point (z, u) of a solution x (B, n) with multipliers lam (B, m) >= 0 of Gx <= h."""
        return torch.einsum("...mn,...n->...m", G, x), lam / self.rho

    def recover(self, x: Tensor, *params: Tensor) -> ADMMState:
        """Return the fixed point (z, u) of a primal solution x (B, n): its multipliers come from least squares.

        With dependent active constraints they are not unique, and this is one choice of them.
        """
        Q, p, G, h, A, _ = batched_qp(*params)
        gradient = torch.einsum("bij,bj->bi", Q, x) + p
        _, lam = recover_multipliers(gradient, A, torch.einsum("bmn,bn->bm", G, x) - h, G)
        return self.state(x, lam, G)

    def jacobian(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return Phi of the step at a state, (B, 2m, 2m), in closed form.

        Gx moves by P (dz - du) with P = rho G K G', K the upper left block of the inverse of the KKT matrix.
        """
        z, u = state
        Q, p, G, h, A, b = batched_qp(*params)
        n, m = p.shape[1], h.shape[1]
        kkt = self._kkt(Q, G, A)
        pull = torch.cat([self.rho * G.mT, p.new_zeros(len(p), b.shape[1], m)], 1)
        P = G @ torch.linalg.solve(kkt, pull)[:, :n]
        below = torch.einsum("bmn,bn->bm", G, self._minimize(z - u, Q, p, G, A, b)) + u < h
        moved = torch.cat([P, torch.eye(m, dtype=p.dtype, device=p.device) - P], 2)  # of Gx + u with (z, u)
        return torch.cat([torch.where(below[:, :, None], moved, 0), torch.where(below[:, :, None], 0, moved)], 1)

    def _minimize(self, target: Tensor, Q: Tensor, p: Tensor, G: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """Return argmin 1/2 x'Qx + p'x + rho/2 |Gx - target|^2 subject to Ax = b."""
        pull = self.rho * torch.einsum("bmn,bm->bn", G, target)
        return torch.linalg.solve(self._kkt(Q, G, A), torch.cat([pull - p, b], 1))[:, : p.shape[1]]

    def _kkt(self, Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
        corner = A.new_zeros(len(A), A.shape[1], A.shape[1])
        return torch.cat([torch.cat([Q + self.rho * G.mT @ G, A.mT], 2), torch.cat([A, corner], 2)], 1)


def batched_qp(Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> QPData:
    """Give every part of a QP its batch dimension.

    Raises InputError for shapes that do not fit, naming the argument.
    """
    n = p.shape[-1] if p.dim() else 0
    m, k = h.shape[-1] if h.dim() else 0, b.shape[-1] if b.dim() else 0
    shapes = {"Q": (Q, (n, n)), "p": (p, (n,)), "G": (G, (m, n)), "h": (h, (m,)), "A": (A, (k, n)), "b": (b, (k,))}
    sizes = {value.shape[0] for value, shape in shapes.values() if value.dim() == len(shape) + 1}
    B = max(sizes, default=1)
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) not in (shape, (B, *shape)):
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, expected {shape} or {(B, *shape)} to go with p of shape "
                f"{tuple(p.shape)}, h of shape {tuple(h.shape)} and b of shape {tuple(b.shape)}."
            )
    Q, p, G, h, A, b = (value.expand(B, *shape) for value, shape in shapes.values())
    return Q, p, G, h, A, b
