"""ADMM for quadratic programs as an update step (paper eqs. 29-30)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt.batched import matvec, solve
from foldopt.checks import require_positive
from foldopt.errors import InputError
from foldopt.solvers.multipliers import recover_multipliers
from foldopt.solvers.saddle import Saddle
from foldopt.transforms import transformed

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
        self._prepared: Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

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

    def inverse(
        self, g: Tensor, transposed: bool, stepped: ADMMState, state: ADMMState, *params: Tensor
    ) -> Tensor | None:
        """Return v = Phi^T v + g, or v = Phi v + g if `transposed`, (B, 2m); None where Q and the rows do not suit.

        With S = C Q^-1 C' on the rows of G, those of A eliminated, the P of `jacobian` is the (S + I / rho)^-1 S of
        both sides, and what is left to solve is the block of S of the active constraints: the KKT system. stepped: the
        state after the step.
        """
        Q, _, G, h, A, b = batched_qp(*params)
        reduced = self._reduced(Q, G, A)
        if reduced is None:
            return None
        k = b.shape[1]
        gz, gu = g.chunk(2, dim=1)
        active = stepped[0] >= h
        held = torch.cat([torch.ones_like(b, dtype=torch.bool), active], 1)
        given, target = (-gz, gu / self.rho) if transposed else (self.rho * gz, gu)
        zero = torch.zeros_like(b)
        r, Sr = reduced.saddle.complete(held, torch.cat([zero, given], 1), torch.cat([zero, target], 1))
        r, Sr = r[:, k:], Sr[:, k:]
        if not transposed:
            return torch.cat([gz + Sr, gu + r / self.rho], 1)
        moved = torch.where(active, r + gz, gu - self.rho * Sr)
        return torch.cat([torch.where(active, gz, gz + moved), torch.where(active, gu + moved, gu)], 1)

    def prepare(self, Q: Tensor, G: Tensor, A: Tensor) -> Saddle | None:
        """Factor Q (B, n, n) with the rows of A and G for steps with just these tensors, until the next call.

        None where they do not suit (see `Saddle`); the steps then factor the KKT matrix. Steps with other tensors, or
        with these after they were written to, factor by themselves; what is written through ``.data``, which PyTorch
        does not count, needs another call.
        """
        reduced = self._reduce(Q, G, A)
        self._prepared = Prepared.of(reduced, Q, G, A)
        return reduced and reduced.saddle

    def _reduced(self, Q: Tensor, G: Tensor, A: Tensor) -> Reduced | None:
        if transformed(Q, G, A):
            return None
        prepared = self._prepared
        return prepared.reduced if prepared and prepared.suits(Q, G, A) else self._reduce(Q, G, A)

    def _reduce(self, Q: Tensor, G: Tensor, A: Tensor) -> Reduced | None:
        with torch.no_grad():
            saddle = Saddle.of(symmetric(Q), _rows(G, A))
        if saddle is None:
            return None
        d = torch.full((A.shape[1] + G.shape[1],), 1 / self.rho, dtype=Q.dtype, device=Q.device)
        d[: A.shape[1]] = 0
        return Reduced(saddle, saddle.shifted(d))

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
        reduced = self._reduced(Q, G, A)
        if reduced is None:
            pull = self.rho * matvec(G.mT, target)
            x = solve(self._kkt(Q, G, A), torch.cat([pull - p, b], 1))[:, : p.shape[1]]
            return x, matvec(G, x)
        saddle, shifted = reduced
        x, y = saddle.solve(Q, _rows(G, A), shifted, -p, torch.cat([b, target], 1))
        return x, target + y[:, b.shape[1] :] / self.rho

    def _kkt(self, Q: Tensor, G: Tensor, A: Tensor) -> Tensor:
        corner = A.new_zeros(len(A), A.shape[1], A.shape[1])
        return torch.cat([torch.cat([(Q + Q.mT) / 2 + self.rho * G.mT @ G, A.mT], 2), torch.cat([A, corner], 2)], 1)


class PrimalADMM(ADMM):
    """The same step; a state (x, z, u) has x in it, on which nothing depends: what a layer that returns x can fold."""

    def forward(  # type: ignore[override]
        self, state: ADMMState | PrimalState, *params: Tensor
    ) -> ADMMState | PrimalState:
        """Return the state after one step, of as many parts."""
        stepped = self._step(*state[-2:], *batched_qp(*params))
        return stepped if len(state) == 3 else stepped[1:]

    def jacobian(self, state: ADMMState | PrimalState, *params: Tensor) -> Tensor:
        """Return Phi of the step at a state, (B, N, N) with N = 2m, or n + 2m where x is in the state."""
        Q, _, G, _, A, _ = batched_qp(*params)
        X = self._response(Q, G, A)
        inner = self._phi(X, state[-2:], *params)
        if len(state) == 2:
            return inner
        rows = torch.cat([torch.cat([X, -X], 2), inner], 1)
        return torch.cat([rows.new_zeros(*rows.shape[:2], X.shape[1]), rows], 2)

    def inverse(
        self,
        g: Tensor,
        transposed: bool,
        stepped: ADMMState | PrimalState,
        state: ADMMState | PrimalState,
        *params: Tensor,
    ) -> Tensor | None:
        """Return v = Phi^T v + g, or v = Phi v + g if `transposed`, (B, N); see `ADMM.inverse` and `jacobian`."""
        n = 0 if len(state) == 2 else state[0].shape[1]
        gx, inner = g[:, :n], g[:, n:]
        if n and not transposed:
            pulled = self._pulled(gx, *params)
            inner = inner + torch.cat([pulled, -pulled], 1)
        v = super().inverse(inner, transposed, stepped[-2:], state[-2:], *params)
        if v is None or not n:
            return v
        if transposed:
            vz, vu = v.chunk(2, dim=1)
            gx = gx + self._moved(vz - vu, *params)
        return torch.cat([gx, v], 1)

    def _moved(self, change: Tensor, *params: Tensor) -> Tensor:
        """Return how x moves when z - u does, (B, n)."""
        Q, p, G, _, A, b = batched_qp(*params)
        return self._minimize(change, Q, torch.zeros_like(p), G, A, torch.zeros_like(b))[0]

    def _pulled(self, cotangent: Tensor, *params: Tensor) -> Tensor:
        """Return the cotangent of z - u that pulls back one of x: rho times how Gx moves when -p moves by it."""
        Q, _, G, h, A, b = batched_qp(*params)
        return self.rho * self._minimize(torch.zeros_like(h), Q, -cotangent, G, A, torch.zeros_like(b))[1]


class Reduced(NamedTuple):
    """What the steps with one Q, G and A share: their `Saddle`, and its shift by 1 / rho in the rows of G."""

    saddle: Saddle
    shifted: Tensor


def _rows(G: Tensor, A: Tensor) -> Tensor:
    return torch.cat([A, G], 1) if A.shape[1] else G


class Prepared(NamedTuple):
    """A reduction, and the tensors that it belongs to as they were; None suits if they cannot be told from others."""

    reduced: Reduced | None
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, reduced: Reduced | None, *tensors: Tensor) -> Prepared | None:
        """Take note of the tensors as they are."""
        if any(t.is_inference() for t in tensors):  # which keep no version
            return None
        return cls(reduced, tuple(t.detach() for t in tensors), tuple(t._version for t in tensors))

    def suits(self, *tensors: Tensor) -> bool:
        """Whether these are the same memory, not written to since."""
        return all(
            not t.is_inference()
            and (t.data_ptr(), t._version, t.dtype, t.shape, t.stride())
            == (own.data_ptr(), version, own.dtype, own.shape, own.stride())
            for t, own, version in zip(tensors, self.tensors, self.versions, strict=True)
        )


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
