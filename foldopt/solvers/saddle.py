"""Strictly convex quadratic programs with few constraints: Q is factored once, all else happens among the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import matvec

__all__ = ["CARRYING", "CONDITION", "EXACT", "MARGIN", "PIVOTS", "Saddle", "block_factor", "block_solve", "on_block"]

PIVOTS = 15  # steps of block pivoting; for independent rows 5 are usually enough
CONDITION = 1e7  # smallest trusted pivot of Q relative to its diagonal, in units of the dtype's rounding
EXACT = 1e-12  # residual of a row or column, relative to its terms, that is taken as rounding
MARGIN = 1e-7  # slack, relative to the size of its row, above which the row is clearly inactive
CARRYING = 1e-6  # multiplier, relative to the cost, above which the row is clearly active


class Saddle(NamedTuple):
    """The systems [[Q, C'], [C, 0]] of a batch, with Q positive definite, reduced to the rows of C.

    Attributes:
        L: (B, n, n), the Cholesky factor, Q = L L'.
        Y: (B, n, r), L^-1 C'.
        M: (B, r, r), Y'Y = C Q^-1 C'.

    Examples:
        >>> Q, C = 2 * torch.eye(2, dtype=torch.float64)[None], torch.ones(1, 1, 2, dtype=torch.float64)
        >>> saddle = foldopt.solvers.saddle.Saddle.of(Q, C)
        >>> p, limits = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> x, multipliers, clear = saddle.minimize(Q, p, C, limits, 1)  # min |x|^2 subject to x_1 + x_2 = 1
        >>> [round(value, 6) for value in x[0].tolist()], clear
        ([0.5, 0.5], tensor([True]))
    """

    L: Tensor
    Y: Tensor
    M: Tensor

    @classmethod
    def of(cls, Q: Tensor, C: Tensor) -> Saddle | None:
        """Reduce the systems of a batch.

        Args:
            Q: (B, n, n); only the lower half is read.
            C: (B, r, n).

        Returns:
            The reduction; None if Q is not safely positive definite in some sample, or if C has more rows than columns.
        """
        if C.shape[1] > C.shape[2]:
            return None
        with torch.no_grad():
            L, info = torch.linalg.cholesky_ex(Q)
            pivots = L.diagonal(dim1=1, dim2=2).square() / Q.diagonal(dim1=1, dim2=2)
            if not ((info == 0) & (pivots.amin(1) > CONDITION * torch.finfo(Q.dtype).eps)).all():
                return None
            Y = torch.linalg.solve_triangular(L, C.mT, upper=False)
            return cls(L, Y, Y.mT @ Y)

    def minimize(self, Q: Tensor, p: Tensor, C: Tensor, limits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Minimize 1/2 x'Qx + p'x subject to Cx = limits in the first k rows and Cx <= limits in the others.

        Block pivoting solves for one guess of the active set per step; it may cycle, and is stopped then.

        Args:
            Q: (B, n, n).
            p: (B, n).
            C: (B, r, n).
            limits: (B, r).
            k: number of equalities.

        Returns:
            x, (B, n); the multipliers, (B, r); and whether x is *clearly* the solution, (B,) bool: it satisfies the KKT
            conditions up to rounding, and no row is near the border between active and inactive.

        Source: Kostreva, Block pivot methods (1978); Judice and Pires, A block principal pivoting algorithm (1994).
        """
        half = self.halved(p)
        r = limits + matvec(self.Y.mT, half)  # the slack of the rows is r + M y
        equality = torch.arange(r.shape[1], device=r.device) < k
        held = (r < 0) | equality
        y = torch.zeros_like(r)
        todo = torch.arange(len(r), device=r.device)
        for _ in range(PIVOTS):
            M, now, part = (self.M, held, r) if len(todo) == len(r) else (self.M[todo], held[todo], r[todo])
            new = on_block(M, now, -part)
            slack = part + matvec(M, new)
            following = torch.where(now, (new > 0) | equality, slack < 0)
            changed = (following != now).any(1)
            y[todo], held[todo] = new, following
            todo = todo[changed]
            if not len(todo):
                break
        x = -self.completed(half + matvec(self.Y, y))
        return x, y, self._clear(Q, p, C, limits, half, equality | (y != 0), equality, x, y)

    def _clear(
        self,
        Q: Tensor,
        p: Tensor,
        C: Tensor,
        limits: Tensor,
        half: Tensor,
        held: Tensor,
        equality: Tensor,
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Return which points are clearly solutions; Q gives the units: lengths of rows, its diagonal for columns."""
        Qx, Cx, forces = matvec(Q, x), matvec(C, x), matvec(C.mT, y)
        unit = Q.diagonal(dim1=1, dim2=2).rsqrt()
        left = (Qx + p + forces).abs()
        terms = Qx.abs() + p.abs() + forces.abs()
        stationary = (left <= EXACT * terms) | (unit * left <= EXACT * (unit * terms).amax(1, keepdim=True))
        length = self.M.diagonal(dim1=1, dim2=2).sqrt()
        size = torch.linalg.vector_norm(matvec(self.L.mT, x), dim=1, keepdim=True)
        reach = length * size + limits.abs()
        slack = limits - Cx
        feasible = torch.where(held, slack.abs() <= EXACT * reach, slack > MARGIN * reach)
        cost = torch.linalg.vector_norm(half, dim=1, keepdim=True)
        carries = equality | ~held | (y * length > CARRYING * cost)
        return stationary.all(1) & (feasible & carries & (length > 0)).all(1)

    def halved(self, r: Tensor) -> Tensor:
        """Return L^-1 r, (B, n)."""
        return _triangular(self.L, r)

    def completed(self, half: Tensor) -> Tensor:
        """Return L'^-1 half, (B, n)."""
        return _triangular(self.L, half, transposed=True)


def _triangular(L: Tensor, r: Tensor, transposed: bool = False) -> Tensor:
    """Return L^-1 r, or L'^-1 r."""
    factor = L.mT if transposed else L
    return torch.linalg.solve_triangular(factor, r[:, :, None], upper=transposed)[:, :, 0]


def block_factor(M: Tensor, held: Tensor) -> Tensor:
    """Factor the block of M in the rows that are held; the other rows and columns are those of the identity.

    Args:
        M: symmetric matrices (B, r, r).
        held: rows of the block, (B, r) bool.

    Returns:
        Cholesky factors, (B, r, r), NaN in samples where the block is singular.

    Examples:
        >>> foldopt.solvers.saddle.block_factor(4 * torch.eye(2)[None], torch.tensor([[True, False]]))
        tensor([[[2., 0.],
                 [0., 1.]]])
    """
    block = torch.where(held[:, :, None] & held[:, None, :], M, 0)
    block.diagonal(dim1=1, dim2=2).add_((~held).to(M))
    return _cholesky(block)


def on_block(M: Tensor, held: Tensor, rhs: Tensor) -> Tensor:
    """Solve (M y) = rhs in the rows that are held, with y = 0 in the others.

    Args:
        M: symmetric matrices (B, r, r).
        held: rows of the block, (B, r) bool.
        rhs: right-hand sides (B, r).

    Returns:
        y, (B, r), NaN in samples where the block is singular.

    Examples:
        >>> held = torch.tensor([[True, False]])
        >>> foldopt.solvers.saddle.on_block(4 * torch.eye(2)[None], held, torch.tensor([[2.0, 7.0]]))
        tensor([[0.5000, 0.0000]])
    """
    return block_solve(block_factor(M, held), held, rhs)


def block_solve(root: Tensor, held: Tensor, rhs: Tensor) -> Tensor:
    """Solve as `on_block` does, with a factor from `block_factor`.

    Args:
        root: factors (B, r, r).
        held: rows of the block, (B, r) bool.
        rhs: right-hand sides (B, r).

    Returns:
        y, (B, r).

    Examples:
        >>> held = torch.tensor([[True, False]])
        >>> root = foldopt.solvers.saddle.block_factor(4 * torch.eye(2)[None], held)
        >>> foldopt.solvers.saddle.block_solve(root, held, torch.tensor([[2.0, 7.0]]))
        tensor([[0.5000, 0.0000]])
    """
    return torch.cholesky_solve(torch.where(held, rhs, 0)[:, :, None], root)[:, :, 0]


def _cholesky(M: Tensor) -> Tensor:
    """Return the Cholesky factor of M, (B, r, r); NaN in samples where rounding loses a pivot."""
    root, info = torch.linalg.cholesky_ex(M)
    pivots = root.diagonal(dim1=1, dim2=2).square()
    if not M.shape[1]:
        return root
    least = (pivots / M.diagonal(dim1=1, dim2=2)).amin(1)
    lost = (info > 0) | ~(least > 1e4 * torch.finfo(M.dtype).eps)
    return torch.where(lost[:, None, None], torch.nan, root) if lost.any() else root
