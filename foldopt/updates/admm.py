"""ADMM for quadratic programs as an update step (paper eqs. 29-30)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foldopt.batched import matvec, solve
from foldopt.checks import require_positive
from foldopt.errors import InputError
from foldopt.solvers.multipliers import recover_multipliers

__all__ = ["ADMM", "ADMMState", "PrimalADMM", "PrimalState", "QPData", "batched_qp", "symmetric"]

ADMMState = tuple[Tensor, Tensor]
PrimalState = tuple[Tensor, Tensor, Tensor]
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
        return self._step(*state, *batched_qp(*params))[1:]

    def primal(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return x (B, n) of a state; at the fixed point it is the solution."""
        z, u = state
        Q, p, G, _, A, b = batched_qp(*params)
        return self._minimize(z - u, Q, p, G, A, b)[0]

    def state(self, x: Tensor, lam: Tensor, G: Tensor) -> ADMMState:
        """Return the fixed point (z, u) of a solution x (B, n) with multipliers lam (B, m) >= 0 of Gx <= h."""
        return torch.einsum("...mn,...n->...m", G, x), lam / self.rho

    def recover(self, x: Tensor, *params: Tensor) -> ADMMState:
        """Return the fixed point (z, u) of a primal solution x (B, n): its multipliers come from least squares.

        With dependent active constraints they are not unique, and this is one choice of them.
        """
        Q, p, G, h, A, _ = batched_qp(*params)
        gradient = matvec(Q, x) + p
        _, lam = recover_multipliers(gradient, A, matvec(G, x) - h, G)
        return self.state(x, lam, G)

    def jacobian(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return Phi of the step at a state, (B, 2m, 2m), in closed form.

        Gx moves by P (dz - du) with P = rho G K G', K the upper left block of the inverse of the KKT matrix.
        """
        Q, _, G, _, A, _ = batched_qp(*params)
        return self._phi(self._response(Q, G, A), state, *params)

    def _phi(self, response: Tensor, state: ADMMState, *params: Tensor) -> Tensor:
        z, u = state
        Q, p, G, h, A, b = batched_qp(*params)
        P = G @ response
        below = self._minimize(z - u, Q, p, G, A, b)[1] + u < h
        eye = torch.eye(h.shape[1], dtype=p.dtype, device=p.device)
        moved = torch.cat([P, eye - P], 2)  # of Gx + u with (z, u)
        return torch.cat([torch.where(below[:, :, None], moved, 0), torch.where(below[:, :, None], 0, moved)], 1)

    def _response(self, Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
        """Return how x moves with the target of `_minimize`, (B, n, m)."""
        pull = torch.cat([self.rho * G.mT, G.new_zeros(len(G), A.shape[1], G.shape[1])], 1)
        return solve(self._kkt(Q, G, A), pull)[:, : G.shape[2]]

    def _step(
        self, z: Tensor, u: Tensor, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, Gx = self._minimize(z - u, Q, p, G, A, b)
        moved = Gx + u
        z = torch.where(moved < h, moved, h)  # torch.minimum would mix both sides at a tie
        return x, z, moved - z

    def _minimize(self, target: Tensor, Q: Tensor, p: Tensor, G: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x, Gx) of argmin 1/2 x'Qx + p'x + rho/2 |Gx - target|^2 subject to Ax = b."""
        pull = self.rho * matvec(G.mT, target)
        x = solve(self._kkt(Q, G, A), torch.cat([pull - p, b], 1))[:, : p.shape[1]]
        return x, matvec(G, x)

    def _kkt(self, Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
        corner = A.new_zeros(len(A), A.shape[1], A.shape[1])
        return torch.cat([torch.cat([(Q + Q.mT) / 2 + self.rho * G.mT @ G, A.mT], 2), torch.cat([A, corner], 2)], 1)


class PrimalADMM(ADMM):
    """The same step with x in its state (x, z, u), though nothing depends on it: so that a layer can return x."""

    def forward(self, state: PrimalState, *params: Tensor) -> PrimalState:  # type: ignore[override]
        """Return the state after one step."""
        return self._step(*state[1:], *batched_qp(*params))

    def jacobian(self, state: PrimalState, *params: Tensor) -> Tensor:  # type: ignore[override]
        """Return Phi of the step at a state, (B, N, N) with N = n + 2m."""
        Q, _, G, _, A, _ = batched_qp(*params)
        X = self._response(Q, G, A)
        rows = torch.cat([torch.cat([X, -X], 2), self._phi(X, state[1:], *params)], 1)
        return torch.cat([rows.new_zeros(*rows.shape[:2], X.shape[1]), rows], 2)


def symmetric(Q: Tensor) -> Tensor:
    """Return the symmetric part of Q (B, n, n), which is all that x'Qx knows of it."""
    return Q if torch.equal(Q, Q.mT) else Q.mT.contiguous().add_(Q).mul_(0.5)


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
