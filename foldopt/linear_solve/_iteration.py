"""Fixed-point iterations on v = Phi^T v + g: the paper's, and its acceleration by Anderson's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, Iterative, LinearSolveInfo, norm, relative
from foldopt.linear_solve._phi import Phi

__all__ = ["LFPI", "Anderson"]


@dataclass(frozen=True)
class LFPI(Iterative):
    """The linear fixed-point iteration v <- Phi^T v + g: the backward pass of unrolling, for comparison with the paper.

    By Theorem 1 it converges at the rate -log rho(Phi) if the spectral radius rho(Phi) is below 1; otherwise it
    diverges.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.
        divergence: a sample whose relative residual exceeds this is given up as not ok; default 1e8.

    Raises:
        InputError: a setting is out of range.

    Source: paper, eq. 25 and Theorem 1.

    Examples:
        >>> v, info = foldopt.linear_solve.LFPI()(lambda v: 0.5 * v, torch.ones(1, 2, dtype=torch.float64))
        >>> info.iterations, info.ok
        (tensor([34]), tensor([True]))
    """

    divergence: float = 1e8

    def __call__(
        self, vjp: VJP, g: Tensor, phi: Phi | None = None, guess: Tensor | None = None
    ) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        tol = self.tolerance(g.dtype)
        v = g if guess is None else self.start(vjp, g, guess)[0]
        iterations = torch.full((len(g),), int(guess is not None), device=g.device)
        residual = torch.full_like(g[:, 0], torch.inf) if g.numel() else g.sum(-1)
        active = torch.ones_like(iterations, dtype=torch.bool)
        for _ in range(self.max_iter):
            new = vjp(v) + g
            iterations = iterations + active
            residual = torch.where(active, relative(new - v, g), residual)
            active = active & (residual > tol) & (residual < self.divergence)
            if not active.any():
                break
            v = torch.where(active[:, None], new, v)
        else:
            residual = torch.where(active, relative(vjp(v) + g - v, g), residual)
        return v, LinearSolveInfo.of("lfpi", iterations, residual, tol)


@dataclass(frozen=True)
class Anderson(Iterative):
    """Anderson's acceleration of `LFPI`: each iterate combines earlier ones such that their residual is smallest.

    It takes about as many products as GMRES, also where LFPI diverges, and stores at most 2 `memory` vectors. The best
    iterate is returned. A sample is given up when the rounding error of v exceeds the tolerance.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.
        memory: number of earlier iterates that are combined, at least 1; default 10.

    Raises:
        InputError: a setting is out of range.

    Source: Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49(4), 2011.

    Examples:
        >>> v, info = foldopt.linear_solve.Anderson()(lambda v: 3 * v, torch.ones(1, 2))
        >>> info.ok
        tensor([True])
    """

    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise InputError(f"Anderson(memory={self.memory}): at least one earlier iterate is needed.")

    def __call__(
        self, vjp: VJP, g: Tensor, phi: Phi | None = None, guess: Tensor | None = None
    ) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        tol = self.tolerance(g.dtype)
        v, r = self.start(vjp, g, guess)
        best, smallest = v, relative(r, g)
        iterations = torch.ones(len(g), dtype=torch.long, device=g.device)
        lost = torch.zeros_like(smallest, dtype=torch.bool)
        moves: list[Tensor] = []
        changes: list[Tensor] = []
        for _ in range(self.max_iter - 1):
            active = (smallest > tol) & r.isfinite().all(1) & ~lost
            if not active.any():
                break
            move = torch.where(active[:, None], r, 0)
            if changes:
                move = move - _combination(torch.stack(changes, 2), move, torch.stack(moves, 2))
            new = v + move
            new_r = g + vjp(new) - new
            known = active[:, None] & new_r.isfinite()
            moves = [*moves, torch.where(known, move, 0)][-self.memory :]
            changes = [*changes, torch.where(known, new_r - r, 0)][-self.memory :]
            v, r = torch.where(active[:, None], new, v), torch.where(active[:, None], new_r, r)
            iterations = iterations + active
            size = relative(r, g)
            # For such a large v, rounding alone can make the residual vanish.
            lost = torch.finfo(g.dtype).eps * norm(v) > tol * norm(g)
            better = active & (size < smallest) & ~lost
            best, smallest = torch.where(better[:, None], v, best), torch.where(better, size, smallest)
        return best, LinearSolveInfo.of("anderson", iterations, smallest, tol)


def _combination(changes: Tensor, r: Tensor, moves: Tensor) -> Tensor:
    """Return (moves + changes) gamma for the gamma that makes ||r - changes gamma|| smallest, (B, N)."""
    scale = torch.linalg.vector_norm(changes, dim=1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    cutoff = 1e3 * torch.finfo(r.dtype).eps
    gamma = torch.linalg.pinv(changes / scale, rtol=cutoff) @ r[:, :, None]
    return ((moves + changes) / scale @ gamma)[:, :, 0]
