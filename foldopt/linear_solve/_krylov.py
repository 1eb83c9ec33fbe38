"""Krylov methods for (I - Phi^T) v = g, for batches, with an optional preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, Iterative, LinearSolveInfo, norm, relative, safe_ratio
from foldopt.linear_solve._phi import Phi

__all__ = ["GMRES", "BiCGSTAB", "Krylov"]


@dataclass(frozen=True)
class Krylov(Iterative):
    """Settings of Krylov methods.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.
        preconditioner: linear function r -> about (I - Phi^T)^-1 r, (B, N) to (B, N); None, the default, for none. It
            is applied from the right, so that it changes the number of products and not the residual that is measured.

    Raises:
        InputError: a setting is out of range, or the preconditioner cannot be called.
    """

    preconditioner: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None and not callable(self.preconditioner):
            raise InputError(f"preconditioner={self.preconditioner!r} is not callable, expected a function of (B, N).")

    def preconditioned(self, r: Tensor) -> Tensor:
        """Apply the preconditioner.

        Raises:
            InputError: it returns another shape than it got.
        """
        if self.preconditioner is None:
            return r
        result = self.preconditioner(r)
        if result.shape != r.shape:
            raise InputError(
                f"the preconditioner returned shape {tuple(result.shape)} for a residual of shape {tuple(r.shape)}; it "
                "has to return the same shape, and one made for another batch does not fit this one."
            )
        return result


@dataclass(frozen=True)
class GMRES(Krylov):
    """Restarted GMRES for (I - Phi^T) v = g.

    It starts from v = g, so that a step with Phi = 0 (SQP at a KKT point) costs a single product. The batched Arnoldi
    process orthogonalizes twice and uses Givens rotations. A sample whose Krylov space is exhausted is frozen without
    disturbing the others.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.
        preconditioner: linear function r -> about (I - Phi^T)^-1 r, (B, N) to (B, N), such as the ``Phi.solve`` of a
            similar problem; None, the default, for none. It changes the number of products and not the answer.
        restart: dimension of the Krylov space after which it starts anew, at least 1; default 50.

    Raises:
        InputError: a setting is out of range, or the preconditioner returns another shape than it got.

    Source: Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7(3), 1986.

    Examples:
        >>> v, info = foldopt.linear_solve.GMRES(tol=1e-6)(lambda v: 3 * v, torch.ones(1, 2))
        >>> v
        tensor([[-0.5000, -0.5000]])
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise InputError(f"GMRES(restart={self.restart}): the Krylov space needs at least one vector.")

    def __call__(
        self, vjp: VJP, g: Tensor, phi: Phi | None = None, guess: Tensor | None = None
    ) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        tol = self.tolerance(g.dtype)
        iterations = torch.ones(len(g), dtype=torch.long, device=g.device)
        v, residual = self.start(vjp, g, guess)
        size = relative(residual, g)
        spent = 1
        while True:
            active = (size > tol) & size.isfinite()
            cap = min(self.restart, g.shape[1], self.max_iter - spent - 1)
            if cap < 1 or not active.any():
                break
            correction, steps = self._cycle(vjp, residual, active, tol * norm(g), cap)
            candidate = v + correction
            new_residual = g + vjp(candidate) - candidate
            new_size = relative(new_residual, g)
            iterations = iterations + torch.where(active, steps + 1, 0)
            spent += int(steps.max()) + 1
            better = active & (new_size < size)
            v = torch.where(better[:, None], candidate, v)
            residual = torch.where(better[:, None], new_residual, residual)
            stalled = not (active & (new_size < 0.5 * size)).any()
            size = torch.where(better, new_size, size)
            if stalled:
                break
        return v, LinearSolveInfo.of("gmres", iterations, size, tol)

    def _cycle(self, vjp: VJP, r: Tensor, active: Tensor, target: Tensor, cap: int) -> tuple[Tensor, Tensor]:
        """Return the correction, (B, N), of one Arnoldi cycle from residual r, and each sample's steps, (B,)."""
        batch, n = r.shape
        beta = torch.where(active, norm(r), torch.zeros_like(r[:, 0]))
        basis = r.new_zeros(batch, cap + 1, n)
        basis[:, 0] = safe_ratio(r, beta[:, None].expand_as(r))
        R = r.new_zeros(batch, cap, cap)
        rotations: list[tuple[Tensor, Tensor]] = []
        rhs = r.new_zeros(batch, cap + 1)
        rhs[:, 0] = beta
        steps = torch.zeros(batch, dtype=torch.long, device=r.device)
        running = active.clone()
        for j in range(cap):
            direction = self.preconditioned(basis[:, j])
            w = direction - vjp(direction)
            size = norm(w)
            seen = basis[:, : j + 1]
            column = torch.zeros_like(rhs[:, : j + 1])
            for _ in range(2):
                overlap = matvec(seen, w)
                w = w - matvec(seen.mT, overlap)
                column = column + overlap
            height = norm(w)
            broken = height <= 10 * torch.finfo(r.dtype).eps * size
            height = torch.where(broken, torch.zeros_like(height), height)
            basis[:, j + 1] = safe_ratio(w, height[:, None].expand_as(w))
            entries = list(column.unbind(1))
            for k, (c, s) in enumerate(rotations):
                entries[k], entries[k + 1] = c * entries[k] + s * entries[k + 1], c * entries[k + 1] - s * entries[k]
            diagonal = torch.hypot(entries[j], height)
            c, s = safe_ratio(entries[j], diagonal), safe_ratio(height, diagonal)
            rotations.append((c, s))
            entries[j] = diagonal
            R[:, : j + 1, j] = torch.stack(entries, 1)
            rhs[:, j + 1] = -s * rhs[:, j]
            rhs[:, j] = c * rhs[:, j]
            steps = torch.where(running, j + 1, steps)
            running = running & ~broken & (rhs[:, j + 1].abs() > 0.1 * target)
            if not running.any():
                break
        used = j + 1
        unused = torch.arange(used, device=r.device) >= steps[:, None]
        R = R[:, :used, :used].masked_fill(unused[:, None, :], 0)
        dead = unused | (R.diagonal(dim1=1, dim2=2) == 0)
        R = R + torch.diag_embed(dead.to(r.dtype))
        y = torch.linalg.solve_triangular(R, rhs[:, :used].masked_fill(dead, 0)[:, :, None], upper=True)
        return self.preconditioned(matvec(basis[:, :used].mT, y[:, :, 0])), steps


@dataclass(frozen=True)
class BiCGSTAB(Krylov):
    """BiCGSTAB for (I - Phi^T) v = g: short recurrences, which store only a few vectors.

    It starts from v = g. A sample that breaks down keeps its best iterate, and is ok only if its residual is within
    tolerance.

    Args:
        tol: relative residual at which a sample is solved, in (0, 1); None, the default: 1e-10 in float64, otherwise
            1e-5.
        max_iter: largest number of products with Phi^T; default 1000.
        preconditioner: linear function r -> about (I - Phi^T)^-1 r, (B, N) to (B, N); None, the default, for none. It
            changes the number of products and not the answer.

    Raises:
        InputError: a setting is out of range, or the preconditioner returns another shape than it got.

    Source: van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13(2), 1992.

    Examples:
        >>> v, info = foldopt.linear_solve.BiCGSTAB()(lambda v: 3 * v, torch.ones(1, 2))
        >>> v
        tensor([[-0.5000, -0.5000]])
    """

    def __call__(
        self, vjp: VJP, g: Tensor, phi: Phi | None = None, guess: Tensor | None = None
    ) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        tol = self.tolerance(g.dtype)
        target = 0.1 * tol  # the residual of the recurrence drifts from the true one
        v, r = self.start(vjp, g, guess)
        best, smallest = v, relative(r, g)
        iterations = torch.ones(len(g), dtype=torch.long, device=g.device)
        shadow, p, rho = r, r, (r * r).sum(-1)
        active = (smallest > target) & smallest.isfinite()
        for _ in range((self.max_iter - 1) // 2):
            if not active.any():
                break
            Mp = self.preconditioned(p)
            Ap = Mp - vjp(Mp)
            alpha = safe_ratio(rho, (shadow * Ap).sum(-1))
            s = r - alpha[:, None] * Ap
            Ms = self.preconditioned(s)
            As = Ms - vjp(Ms)
            omega = safe_ratio((As * s).sum(-1), (As * As).sum(-1))
            v = torch.where(active[:, None], v + alpha[:, None] * Mp + omega[:, None] * Ms, v)
            r = torch.where(active[:, None], s - omega[:, None] * As, r)
            new_rho = (shadow * r).sum(-1)
            beta = safe_ratio(new_rho, rho) * safe_ratio(alpha, omega)
            p, rho = r + beta[:, None] * (p - omega[:, None] * Ap), new_rho
            iterations = iterations + 2 * active
            size = relative(r, g)
            better = size < smallest
            best, smallest = torch.where(better[:, None], v, best), torch.where(better, size, smallest)
            active = active & (size > target) & size.isfinite() & (rho != 0)
        return best, LinearSolveInfo.of("bicgstab", iterations, relative(g + vjp(best) - best, g), tol)
