"""Batched solvers of the adjoint equation v = Phi^T v + g (paper eqs. 25-26).

A linear solver is a frozen dataclass called as ``solver(vjp, g, jacobian=None) -> (v, info)`` where

- ``vjp`` maps v of shape (B, N) to Phi^T v of shape (B, N), row by row independent,
- ``g`` of shape (B, N) is the incoming cotangent,
- ``jacobian``, if given, returns Phi in closed form, shape (B, N, N).

Every sample stops on its own: `LinearSolveInfo` holds, per sample, the number of products with Phi^T it took, the
relative residual ||g + Phi^T v - v|| / ||g|| *measured at the returned v*, and whether that is below tolerance.
No solver raises on a sample that fails; the policy is the caller's (`foldopt.fold(on_failure=...)`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from foldopt.errors import InputError

VJP = Callable[[Tensor], Tensor]
Jacobian = Callable[[], Tensor]


class LinearSolveInfo(NamedTuple):
    """What a linear solver did, per sample (all tensors of shape (B,))."""

    method: str
    iterations: Tensor
    residual: Tensor
    ok: Tensor
    fallback: Tensor

    @classmethod
    def measure(
        cls, method: str, g: Tensor, v: Tensor, phi_v: Tensor, iterations: Tensor, tol: float
    ) -> LinearSolveInfo:
        """Return the certificate of `v`, given phi_v = Phi^T v."""
        residual = _relative(g + phi_v - v, g)
        return cls(method, iterations, residual, residual <= tol, torch.zeros_like(residual, dtype=torch.bool))

    @classmethod
    def joined(cls, parts: Sequence[LinearSolveInfo]) -> LinearSolveInfo:
        """Return the certificates of several calls in a row."""
        tensors = (torch.cat(t) for t in zip(*(p[1:] for p in parts), strict=True))
        return cls(parts[0].method, *tensors)


class LinearSolver(Protocol):
    """The protocol of a solver of v = Phi^T v + g."""

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        ...


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1)


def _relative(r: Tensor, g: Tensor) -> Tensor:
    scale = _norm(g)
    return _norm(r) / torch.where(scale > 0, scale, torch.ones_like(scale))


def _safe_ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b is not zero, else 0: the sample is then left where it is and its residual tells."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


@dataclass(frozen=True)
class _Iterative:
    """Shared settings: relative tolerance (None: 1e-10 in float64, 1e-5 in float32) and cap of products with Phi^T."""

    tol: float | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 < self.tol < 1:
            raise InputError(f"{type(self).__name__}(tol={self.tol}): tol is a relative residual, take one in (0, 1).")
        if self.max_iter < 1:
            raise InputError(f"{type(self).__name__}(max_iter={self.max_iter}): at least one iteration is needed.")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the relative tolerance that holds for `dtype`."""
        if self.tol is not None:
            return self.tol
        return 1e-10 if dtype == torch.float64 else 1e-5


@dataclass(frozen=True)
class LFPI(_Iterative):
    """Linear fixed-point iteration v <- Phi^T v + g (eq. 25): the backward pass of unrolling, for fidelity to it.

    Converges at rate -log rho(Phi) (Theorem 1) where rho(Phi) < 1 and diverges elsewhere. A sample whose residual has
    grown past `divergence` times ||g|| is given up and reported as not ok.
    """

    divergence: float = 1e8

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        tol = self.tolerance(g.dtype)
        v, iterations = g, torch.zeros(len(g), dtype=torch.long, device=g.device)
        residual = torch.full_like(g[:, 0], torch.inf) if g.numel() else g.sum(-1)
        active = torch.ones_like(iterations, dtype=torch.bool)
        for _ in range(self.max_iter):
            new = vjp(v) + g
            iterations = iterations + active
            residual = torch.where(active, _relative(new - v, g), residual)
            active = active & (residual > tol) & (residual < self.divergence)
            if not active.any():
                break
            v = torch.where(active[:, None], new, v)
        else:
            residual = torch.where(active, _relative(vjp(v) + g - v, g), residual)
        return v, LinearSolveInfo("lfpi", iterations, residual, residual <= tol, torch.zeros_like(active))


@dataclass(frozen=True)
class GMRES(_Iterative):
    """Restarted GMRES on (I - Phi^T) v = g, batched Arnoldi with reorthogonalization and Givens rotations.

    Starts from v = g, so a step with Phi = 0 (SQP at a KKT point) costs a single product. A sample that breaks down
    (its Krylov space is exhausted) is frozen without disturbing the others. Saad and Schultz, SIAM J. Sci. Stat.
    Comput. 7(3), 1986.
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise InputError(f"GMRES(restart={self.restart}): the Krylov space needs at least one vector.")

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        tol = self.tolerance(g.dtype)
        iterations = torch.ones(len(g), dtype=torch.long, device=g.device)
        v = g
        residual = vjp(v)
        relative = _relative(residual, g)
        spent = 1
        while True:
            active = (relative > tol) & relative.isfinite()
            cap = min(self.restart, g.shape[1], self.max_iter - spent - 1)
            if cap < 1 or not active.any():
                break
            correction, steps = self._cycle(vjp, residual, active, tol * _norm(g), cap)
            candidate = v + correction
            new_residual = g + vjp(candidate) - candidate
            new_relative = _relative(new_residual, g)
            iterations = iterations + torch.where(active, steps + 1, 0)
            spent += int(steps.max()) + 1
            better = active & (new_relative < relative)
            v = torch.where(better[:, None], candidate, v)
            residual = torch.where(better[:, None], new_residual, residual)
            stalled = not (active & (new_relative < 0.5 * relative)).any()
            relative = torch.where(better, new_relative, relative)
            if stalled:
                break
        return v, LinearSolveInfo("gmres", iterations, relative, relative <= tol, torch.zeros_like(active))

    @staticmethod
    def _cycle(vjp: VJP, r: Tensor, active: Tensor, target: Tensor, cap: int) -> tuple[Tensor, Tensor]:
        """One Arnoldi cycle from residual r (B, N): the correction (B, N) and the steps each sample took (B,)."""
        batch, n = r.shape
        beta = torch.where(active, _norm(r), torch.zeros_like(r[:, 0]))
        basis = r.new_zeros(batch, cap + 1, n)
        basis[:, 0] = _safe_ratio(r, beta[:, None].expand_as(r))
        R = r.new_zeros(batch, cap, cap)
        rotations: list[tuple[Tensor, Tensor]] = []
        rhs = r.new_zeros(batch, cap + 1)
        rhs[:, 0] = beta
        steps = torch.zeros(batch, dtype=torch.long, device=r.device)
        running = active.clone()
        for j in range(cap):
            w = basis[:, j] - vjp(basis[:, j])
            size = _norm(w)
            seen = basis[:, : j + 1]
            column = torch.zeros_like(rhs[:, : j + 1])
            for _ in range(2):
                overlap = torch.einsum("bkn,bn->bk", seen, w)
                w = w - torch.einsum("bkn,bk->bn", seen, overlap)
                column = column + overlap
            height = _norm(w)
            broken = height <= 10 * torch.finfo(r.dtype).eps * size
            height = torch.where(broken, torch.zeros_like(height), height)
            basis[:, j + 1] = _safe_ratio(w, height[:, None].expand_as(w))
            entries = list(column.unbind(1))
            for k, (c, s) in enumerate(rotations):
                entries[k], entries[k + 1] = c * entries[k] + s * entries[k + 1], c * entries[k + 1] - s * entries[k]
            diagonal = torch.hypot(entries[j], height)
            c, s = _safe_ratio(entries[j], diagonal), _safe_ratio(height, diagonal)
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
        return torch.einsum("bkn,bk->bn", basis[:, :used], y[:, :, 0]), steps


@dataclass(frozen=True)
class BiCGSTAB(_Iterative):
    """BiCGSTAB on (I - Phi^T) v = g from v = g: short recurrences, memory of a few vectors.

    van der Vorst, SIAM J. Sci. Stat. Comput. 13(2), 1992. A sample that breaks down keeps its best iterate and is
    reported as not ok unless its residual is below tolerance.
    """

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        tol = self.tolerance(g.dtype)
        target = 0.1 * tol  # the recurrence's residual drifts from the true one, which is what counts
        v = g
        r = vjp(v)
        best, best_relative = v, _relative(r, g)
        iterations = torch.ones(len(g), dtype=torch.long, device=g.device)
        shadow, p, rho = r, r, (r * r).sum(-1)
        active = (best_relative > target) & best_relative.isfinite()
        for _ in range((self.max_iter - 1) // 2):
            if not active.any():
                break
            Ap = p - vjp(p)
            alpha = _safe_ratio(rho, (shadow * Ap).sum(-1))
            s = r - alpha[:, None] * Ap
            As = s - vjp(s)
            omega = _safe_ratio((As * s).sum(-1), (As * As).sum(-1))
            v = torch.where(active[:, None], v + alpha[:, None] * p + omega[:, None] * s, v)
            r = torch.where(active[:, None], s - omega[:, None] * As, r)
            new_rho = (shadow * r).sum(-1)
            beta = _safe_ratio(new_rho, rho) * _safe_ratio(alpha, omega)
            p, rho = r + beta[:, None] * (p - omega[:, None] * Ap), new_rho
            iterations = iterations + 2 * active
            relative = _relative(r, g)
            better = relative < best_relative
            best, best_relative = torch.where(better[:, None], v, best), torch.where(better, relative, best_relative)
            active = active & (relative > target) & relative.isfinite() & (rho != 0)
        return best, LinearSolveInfo.measure("bicgstab", g, best, vjp(best), iterations, tol)


@dataclass(frozen=True)
class Direct:
    """LU factorization of I - Phi, with Phi in closed form or assembled from N products with Phi^T.

    Right at any spectral radius. A singular sample is reported as not ok (residual inf).

    tol: largest relative residual that counts as solved; None: 1e-8 in float64, 1e-4 in float32.
    """

    tol: float | None = None

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 < self.tol < 1:
            raise InputError(f"Direct(tol={self.tol}): tol is a relative residual, take one in (0, 1).")

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        n = g.shape[1]
        eye = torch.eye(n, dtype=g.dtype, device=g.device)
        phi = jacobian() if jacobian is not None else torch.stack([vjp(e.expand_as(g)) for e in eye], dim=1)
        v, _ = torch.linalg.solve_ex((eye - phi).mT, g[:, :, None])
        v = v[:, :, 0]
        tol = self.tol or (1e-8 if g.dtype == torch.float64 else 1e-4)
        products = torch.full((len(g),), 0 if jacobian is not None else n, device=g.device)
        info = LinearSolveInfo.measure("direct", g, v, torch.einsum("bij,bi->bj", phi, v), products, tol)
        return v, info._replace(residual=info.residual.nan_to_num(nan=torch.inf))


@dataclass(frozen=True)
class Auto:
    """The default: a closed-form Phi is factored; else GMRES, then a direct solve for the samples it left unsolved.

    GMRES needs at most N products with Phi^T where assembling Phi takes N, and usually 1 to 4; so it goes first even
    for small states. `info.fallback` marks the samples that the direct solve took over.
    """

    iterative: ClassVar[GMRES] = GMRES(max_iter=200)
    direct: ClassVar[Direct] = Direct()

    def __call__(self, vjp: VJP, g: Tensor, jacobian: Jacobian | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the module's docstring."""
        if jacobian is not None:
            return self.direct(vjp, g, jacobian)
        v, info = self.iterative(vjp, g)
        if info.ok.all():
            return v, info
        v_direct, info_direct = self.direct(vjp, g)
        take = ~info.ok & (info_direct.residual < info.residual)
        return torch.where(take[:, None], v_direct, v), LinearSolveInfo(
            "gmres+direct",
            info.iterations + torch.where(take, info_direct.iterations, 0),
            torch.where(take, info_direct.residual, info.residual),
            torch.where(take, info_direct.ok, info.ok),
            take,
        )


SOLVERS: dict[str, Callable[[], LinearSolver]] = {
    "auto": Auto,
    "direct": Direct,
    "gmres": GMRES,
    "bicgstab": BiCGSTAB,
    "lfpi": LFPI,
}


def linear_solver(choice: str | LinearSolver) -> LinearSolver:
    """Return the solver named `choice`, or `choice` itself if it is one.

    Raises InputError for an unknown name.
    """
    if not isinstance(choice, str):
        if not callable(choice):
            raise InputError(
                f"linear_solver={choice!r} is not callable; pass a name of {sorted(SOLVERS)} or an instance."
            )
        return choice
    if choice not in SOLVERS:
        raise InputError(f"linear_solver={choice!r} is unknown; choose one of {sorted(SOLVERS)}.")
    return SOLVERS[choice]()
