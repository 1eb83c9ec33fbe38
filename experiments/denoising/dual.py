"""Linear systems of the dual of total variation denoising, whose matrices are blocks of M = D D'."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from experiments.numerics.blocks import Chosen
from foldopt.batched import lu_factor
from foldopt.errors import InputError

LARGEST = 4_000_000  # most entries of a factorization that is kept for the next system
SAFE = 1e-10  # smallest ratio of Cholesky pivots; blocks below it are factored by LU


def stepsize(D: Tensor, M: Tensor | None = None) -> Tensor:
    """Return a stepsize for dual proximal gradient, at most 1 / |D|_2^2 and close to it; shape ().

    Eq. (28b) takes 1/4, which suits the differencing operator but not an operator that was learned from it. |D|_2^2 is
    the spectral radius of M = D D', which is bounded by the eighth root of any norm of M^8.
    """
    M = D.detach() @ D.detach().mT if M is None else M
    size = M.abs().sum(1).amax()
    power = M / size
    for _ in range(3):
        power = power @ power
    return 1 / (size * power.abs().sum(1).amax() ** (1 / 8))


class DualSystem:
    """Linear systems with blocks of M = D D', (m, m), for a batch of signals that share D, (m, n).

    M is inverted once. A system on the free coordinates is then reduced to a smaller one on the coordinates that are
    *not* free, which are few: those where the denoised signal jumps. The factorization of that system is kept for the
    next call with the same blocks.
    """

    _last: ClassVar[DualSystem | None] = None

    def __init__(self, D: Tensor) -> None:
        self.D = D.detach().clone()
        self.M = self.D @ self.D.mT
        self._blocks: _Blocks | None = None

    @cached_property
    def stepsize(self) -> Tensor:
        """The stepsize of `DenoisingStep`."""
        return stepsize(self.D, self.M)

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of M, (m, m). Raises InputError if the rows of D are linearly dependent."""
        root, info = torch.linalg.cholesky_ex(self.M)
        pivots = root.diagonal().square()
        if int(info) or float(pivots.min()) <= 1e-13 * float(pivots.max()):
            raise InputError(
                f"D of shape {tuple(self.D.shape)} and norm {float(self.D.norm()):.3g} has dependent rows, so its dual "
                "is not unique. Lower train.lr, or start from another D."
            )
        return torch.cholesky_inverse(root)

    def damped(self, rho: Tensor) -> Tensor:
        """Return the inverse of M + rho I, (m, m); rho is a positive number of shape ()."""
        shifted = self.M.clone()
        shifted.diagonal().add_(rho)
        return torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted)[0])

    @classmethod
    def of(cls, D: Tensor) -> DualSystem:
        """Return the system of D, reusing the last one if D is unchanged, as from a forward to its backward pass."""
        last = cls._last
        if last is None or last.D.dtype != D.dtype or last.D.device != D.device or not torch.equal(last.D, D):
            cls._last = last = cls(D)
        return last

    def solve(self, r: Tensor, free: Tensor) -> Tensor:
        """Return z with (M z)_F = r_F and zero outside F, where F is the free set of each sample.

        Args:
            r: Right-hand sides, (B, m).
            free: Free sets, (B, m) bool.

        Returns:
            z, (B, m).
        """
        kept = self._blocks
        if kept is not None and kept.adapt(free):
            return kept.solve(r)
        blocks = _Blocks(self, free)
        if kept is None or len(free) >= len(kept.free):  # a part of a batch does not replace the whole
            self._blocks = blocks if blocks.root.numel() <= LARGEST else None
        return blocks.solve(r)


class _Blocks:
    """Factored systems on the free sets of a batch, (B, m) bool, or on their complements where these are smaller."""

    def __init__(self, dual: DualSystem, free: Tensor) -> None:
        bound, inside = (int(s.sum(1).max()) if len(s) else 0 for s in (~free, free))
        inverse = dual.inverse  # computed in either case, as it raises for dependent rows
        self.free, self.inverse = free.clone(), None if inside < bound else inverse
        self.K = dual.M if self.inverse is None else self.inverse
        self.chosen = Chosen(self._side(free))
        block = self.chosen.block(self.K)
        self.root, exact = _cholesky(block)
        self.lu = None if exact else lu_factor(block)[:2]

    def _side(self, free: Tensor) -> Tensor:
        return free if self.inverse is None else ~free

    def adapt(self, free: Tensor) -> bool:
        """Return whether the factorization is that of `free`, after factoring anew where few samples have changed."""
        if free.shape != self.free.shape:
            return False
        rows = (free != self.free).any(1).nonzero()[:, 0]
        if not len(rows):
            return True
        side, most = self._side(free[rows]), self.chosen.index.shape[1]
        if self.lu is not None or 2 * len(rows) > len(free) or int(side.sum(1).max()) > most:
            return False
        chosen = Chosen(side, most)
        root, exact = _cholesky(chosen.block(self.K))
        if exact:
            for whole, part in (
                (self.free, free[rows]),
                (self.chosen.index, chosen.index),
                (self.chosen.used, chosen.used),
                (self.root, root),
            ):
                whole[rows] = part
        return exact

    def solve(self, r: Tensor) -> Tensor:
        """Solve as `DualSystem.solve` does."""
        r = torch.where(self.free, r, 0)
        if self.inverse is None:
            return self._within(r)
        # Correct r such that z vanishes in the coordinates that are not free.
        excess = self._within(r @ self.inverse)
        return torch.where(self.free, (r - excess) @ self.inverse, 0)

    def _within(self, r: Tensor) -> Tensor:
        y = self.chosen.take(r)[:, :, None]
        y = torch.cholesky_solve(y, self.root) if self.lu is None else torch.linalg.lu_solve(*self.lu, y)
        return self.chosen.put(y[:, :, 0])


def _cholesky(blocks: Tensor) -> tuple[Tensor, bool]:
    """Return the Cholesky factors of (B, k, k) and whether all of them are accurate."""
    root, info = torch.linalg.cholesky_ex(blocks)
    sizes = root.diagonal(dim1=1, dim2=2).square()
    close = sizes.amin(1) > SAFE * sizes.amax(1) if root.shape[1] else True
    return root, bool(((info == 0) & close).all())
