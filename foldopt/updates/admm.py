"""ADMM for quadratic programs as an update step."""

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
    """One ADMM step for min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b; its state is (z, u), both (B, m).

    z is the copy of Gx that is kept below h, and u is the scaled dual of Gx = z. Both belong to the state: with u = 0
    at a solution the folded derivative would be wrong. `state` computes both from a solution and its multipliers,
    `primal` the solution x from both. With G = -I and h = 0 it is the paper's step.

    The step is called as ``step((z, u), Q, p, G, h, A, b)``, the order of qpth: Q (B, n, n), positive semidefinite;
    p (B, n); G (B, m, n); h (B, m); A (B, k, n) of full row rank and b (B, k), where k may be 0. Each may lack its
    batch dimension, and is then shared. If active constraints imply each other, the dual is not unique and I - Phi
    singular; the default linear solver then finds the exact derivative by least squares. At a constraint that is active
    with a multiplier of zero, the derivative is the one-sided one with the constraint active.

    Args:
        rho: penalty, above 0; default 1. The gradient of the folded layer does not depend on it.

    Raises:
        InputError: rho is not above 0, or, when called, shapes do not fit.

    Source: paper, eqs. 29 and 30 (which must read argmin); Boyd et al., Distributed optimization and statistical
        learning
    via ADMM (2011), section 5.2.

    Examples:
        >>> none = torch.zeros(0, 1), torch.zeros(0)
        >>> program = torch.eye(1), torch.tensor([[-2.0]]), torch.eye(1), torch.ones(1), *none
        >>> step = foldopt.ADMM()
        >>> state = step.state(torch.ones(1, 1), torch.ones(1, 1), program[2])  # x = 1 with multiplier 1
        >>> step(state, *program)
        (tensor([[1.]]), tensor([[1.]]))
    """

    def __init__(self, rho: float = 1.0) -> None:
        super().__init__()
        require_positive("rho", rho)
        self.rho = rho

    def forward(self, state: ADMMState, *params: Tensor) -> ADMMState:
        """Return the state after one step.

        Args:
            state: the pair (z, u), each (B, m).
            *params: Q, p, G, h, A and b.

        Returns:
            The pair (z, u).
        """
        return self._step(*state, *batched_qp(*params))[1:]

    def primal(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return the x, (B, n), of a state; at the fixed point it is the solution.

        Args:
            state: the pair (z, u), each (B, m).
            *params: Q, p, G, h, A and b.

        Returns:
            x, (B, n).
        """
        z, u = state
        Q, p, G, _, A, b = batched_qp(*params)
        return self._minimize(z - u, Q, p, G, A, b)[0]

    def state(self, x: Tensor, lam: Tensor, G: Tensor) -> ADMMState:
        """Return the fixed point of a solution and its multipliers.

        Args:
            x: solution, (B, n).
            lam: multipliers of Gx <= h, (B, m), at least 0.
            G: (m, n) or (B, m, n).

        Returns:
            The pair (z, u), each (B, m).
        """
        return torch.einsum("...mn,...n->...m", G, x), lam / self.rho

    def recover(self, x: Tensor, *params: Tensor) -> ADMMState:
        """Return the fixed point of a solution, whose multipliers are found by least squares.

        If active constraints depend on each other the multipliers are not unique, and this is one choice of them.

        Args:
            x: solution, (B, n).
            *params: Q, p, G, h, A and b.

        Returns:
            The pair (z, u), each (B, m).
        """
        Q, p, G, h, A, _ = batched_qp(*params)
        gradient = matvec(Q, x) + p
        _, lam = recover_multipliers(gradient, A, matvec(G, x) - h, G)
        return self.state(x, lam, G)

    def jacobian(self, state: ADMMState, *params: Tensor) -> Tensor:
        """Return Phi of the step in closed form.

        Gx moves by P (dz - du), where P = rho G K G' and K is the upper left block of the inverse of the KKT matrix.

        Args:
            state: the pair (z, u), each (B, m).
            *params: Q, p, G, h, A and b.

        Returns:
            Phi, (B, 2m, 2m).
        """
        Q, _, G, _, A, _ = batched_qp(*params)
        return self._phi(self._response(Q, G, A), state, *params)

    def _phi(self, response: Tensor, state: ADMMState, *params: Tensor) -> Tensor:
        """Return Phi, (B, 2m, 2m), given the response of x."""
        z, u = state
        Q, p, G, h, A, b = batched_qp(*params)
        P = G @ response
        below = self._minimize(z - u, Q, p, G, A, b)[1] + u < h
        eye = torch.eye(h.shape[1], dtype=p.dtype, device=p.device)
        moved = torch.cat([P, eye - P], 2)  # derivative of Gx + u with respect to (z, u)
        return torch.cat([torch.where(below[:, :, None], moved, 0), torch.where(below[:, :, None], 0, moved)], 1)

    def _response(self, Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
        """Return the derivative of x with respect to the target of `_minimize`, (B, n, m)."""
        pull = torch.cat([self.rho * G.mT, G.new_zeros(len(G), A.shape[1], G.shape[1])], 1)
        return solve(self._kkt(Q, G, A), pull)[:, : G.shape[2]]

    def _step(
        self, z: Tensor, u: Tensor, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x, z, u) after one step."""
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
        """Return the KKT matrix of `_minimize`, (B, n + k, n + k)."""
        corner = A.new_zeros(len(A), A.shape[1], A.shape[1])
        return torch.cat([torch.cat([(Q + Q.mT) / 2 + self.rho * G.mT @ G, A.mT], 2), torch.cat([A, corner], 2)], 1)


class PrimalADMM(ADMM):
    """ADMM whose state (x, z, u) includes x, so that a layer can return it; the next step does not depend on this x.

    Args:
        rho: penalty, above 0; default 1. The gradient of the folded layer does not depend on it.

    Raises:
        InputError: rho is not above 0, or, when called, shapes do not fit.

    Examples:
        >>> none = torch.zeros(0, 1), torch.zeros(0)
        >>> program = torch.eye(1), torch.tensor([[-2.0]]), torch.eye(1), torch.ones(1), *none
        >>> foldopt.updates.admm.PrimalADMM()((torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)), *program)
        (tensor([[1.]]), tensor([[1.]]), tensor([[1.]]))
    """

    def forward(self, state: PrimalState, *params: Tensor) -> PrimalState:  # type: ignore[override]
        """Return the state (x, z, u) after one step."""
        return self._step(*state[1:], *batched_qp(*params))

    def jacobian(self, state: PrimalState, *params: Tensor) -> Tensor:  # type: ignore[override]
        """Return Phi of the step, (B, N, N) with N = n + 2m."""
        Q, _, G, _, A, _ = batched_qp(*params)
        X = self._response(Q, G, A)
        rows = torch.cat([torch.cat([X, -X], 2), self._phi(X, state[1:], *params)], 1)
        return torch.cat([rows.new_zeros(*rows.shape[:2], X.shape[1]), rows], 2)


def symmetric(Q: Tensor) -> Tensor:
    """Return the symmetric part of Q, on which alone x'Qx depends.

    Args:
        Q: matrices (B, n, n).

    Returns:
        (Q + Q') / 2, (B, n, n); Q itself if it is symmetric.

    Examples:
        >>> foldopt.updates.admm.symmetric(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    return Q if torch.equal(Q, Q.mT) else Q.mT.contiguous().add_(Q).mul_(0.5)


def batched_qp(Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> QPData:
    """Give every part of a quadratic program its batch dimension.

    Args:
        Q: (B, n, n) or (n, n).
        p: (B, n) or (n,).
        G: (B, m, n) or (m, n).
        h: (B, m) or (m,).
        A: (B, k, n) or (k, n).
        b: (B, k) or (k,).

    Returns:
        Q, p, G, h, A and b with their batch dimension, expanded without copies.

    Raises:
        InputError: shapes do not fit; the error names the argument.

    Examples:
        >>> parts = torch.eye(1), torch.zeros(3, 1), torch.eye(1), torch.ones(1), torch.zeros(0, 1), torch.zeros(0)
        >>> [tuple(part.shape) for part in foldopt.updates.admm.batched_qp(*parts)]
        [(3, 1, 1), (3, 1), (3, 1, 1), (3, 1), (3, 0, 1), (3, 0)]
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
