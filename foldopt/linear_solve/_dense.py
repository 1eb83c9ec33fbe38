"""Solvers that take Phi as a matrix: by factorization, and by least squares where I - Phi is singular."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, LinearSolveInfo, norm, relative, require_relative
from foldopt.linear_solve._phi import Phi

__all__ = ["WRONG_CLOSED_FORM", "Dense", "Direct", "LeastSquares", "compared", "gigabytes", "require_room"]

WRONG_CLOSED_FORM = (
    "The matrix that the update's method jacobian returns is not the derivative dU/dx of its step there, whose row i "
    "is the gradient of the i-th number of the new state: correct it, or delete the method"
)


@dataclass(frozen=True)
class Dense:
    """Settings of the solvers that take Phi as a matrix.

    Args:
        tol: largest relative residual of a solved sample, in (0, 1); None, the default: 1e-8 in float64, otherwise
            1e-4.
        max_bytes: largest Phi of all samples together that is assembled, in bytes; default 4 GiB. Factoring takes about
            three times as much.

    Raises:
        InputError: a setting is out of range.
    """

    tol: float | None = None
    max_bytes: float = field(default=4 * 2**30, kw_only=True)

    def __post_init__(self) -> None:
        require_relative(self, "tol", self.tol)
        require_room(self, self.max_bytes)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the relative tolerance for a dtype."""
        return self.tol or (1e-8 if dtype == torch.float64 else 1e-4)

    def require_small(self, method: str, phi: Phi, g: Tensor) -> None:
        """Raise InputError, before any memory is allocated, if the dense matrix Phi would be too large."""
        batch, n = g.shape
        nbytes = batch * n * n * g.element_size() if phi.sparse else phi.nbytes
        if nbytes <= self.max_bytes:
            return
        how = "make the sparse Phi dense" if phi.sparse else f"assemble Phi from {n} products"
        raise InputError(
            f"linear_solver={method!r} would {how}: {batch} x {n} x {n} numbers, {gigabytes(nbytes)}, more "
            f"than the {gigabytes(self.max_bytes)} it may take. For a state of N = {n} numbers choose "
            "linear_solver='auto', or BiCGSTAB(max_iter=20000) or GMRES() from foldopt.linear_solve, which need no "
            "matrix; give the update a closed form (`inverse`); or, where there is room for three of "
            f"these, choose {type(self).__name__}(max_bytes=...)."
        )

    def certified(self, method: str, g: Tensor, v: Tensor, phi: Phi) -> LinearSolveInfo:
        """Return the report on an answer v."""
        residual = relative(g + phi.product(v) - v, g).nan_to_num(nan=torch.inf)
        products = torch.full((len(g),), phi.products, device=g.device)
        return LinearSolveInfo.of(method, products, residual, self.tolerance(g.dtype))


def compared(info: LinearSolveInfo, phi: Phi | None, v: Tensor, product: VJP) -> LinearSolveInfo:
    """Return the report on v, (B, N), not ok where the closed form disagrees with the step's own `product`."""
    if phi is None or not (phi.closed_form and phi.made):
        return info
    off = norm(phi.product(v) - product(v))
    wrong = info.ok & (off > torch.finfo(v.dtype).eps ** 0.25 * norm(v))
    if not wrong.any():
        return info
    return info._replace(
        residual=torch.where(wrong, off / norm(v), info.residual), ok=info.ok & ~wrong, remedy=WRONG_CLOSED_FORM
    )


def require_room(owner: object, max_bytes: float) -> None:
    """Raise InputError unless a limit of memory is above 0."""
    if not max_bytes > 0:
        raise InputError(f"{type(owner).__name__}(max_bytes={max_bytes}): expected a number above 0.")


def gigabytes(nbytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{nbytes / 1e9:.1f} GB"


@dataclass(frozen=True)
class Direct(Dense):
    """LU factorization of I - Phi, whatever its spectral radius.

    Phi is the step's closed form if it has one, otherwise it is assembled from N products with Phi^T. A sparse closed
    form is factored as it is, by SuperLU. The factors are kept for further right-hand sides at the same point: a second
    backward pass, the rows of a Jacobian, tangents. A singular sample is reported as not ok.

    Args:
        tol: largest relative residual of a solved sample, in (0, 1); None, the default: 1e-8 in float64, otherwise
            1e-4.
        max_bytes: largest Phi of all samples together that is assembled, in bytes; default 4 GiB. Factoring takes about
            three times as much.

    Raises:
        InputError: a setting is out of range, or, when called, Phi would be larger than `max_bytes`.

    Examples:
        >>> v, info = foldopt.linear_solve.Direct()(lambda v: 3 * v, torch.ones(1, 2))
        >>> v
        tensor([[-0.5000, -0.5000]])
    """

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        phi = phi or Phi.assembled(vjp, g)
        if not phi.sparse:
            self.require_small("direct", phi, g)
        v = phi.solve(g)
        return v, self.certified("direct", g, v, phi)


@dataclass(frozen=True)
class LeastSquares(Dense):
    """The least-squares solution v of least norm of v = Phi^T v + g, by singular values.

    Where I - Phi is regular this is the answer of `Direct`. Where it is singular, ``info.fallback`` marks the sample.
    If the equation has solutions (redundant constraints, or a dual that is not unique and does not matter), the
    derivative is the same for all of them and exact. If it has none, the solution has no derivative, v is a substitute,
    and ``info.residual`` tells how far it is from solving the equation. Both count as ok here, because the caller asked
    for least squares. `Auto` takes only the first kind.

    Args:
        tol: largest relative residual of a solved sample, in (0, 1); None, the default: 1e-8 in float64, otherwise
            1e-4.
        cutoff: singular values of I - Phi below this, relative to the largest, count as zero; None, the default: 1e-10
            in float64, otherwise 1e-5.
        max_bytes: largest Phi of all samples together that is assembled, in bytes; default 4 GiB.

    Raises:
        InputError: a setting is out of range, or, when called, Phi would be larger than `max_bytes`.

    Examples:
        >>> v, info = foldopt.linear_solve.LeastSquares()(lambda v: v, torch.ones(1, 2))
        >>> v, info.fallback
        (tensor([[0., 0.]]), tensor([True]))
    """

    cutoff: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_relative(self, "cutoff", self.cutoff)

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        return self.on_matrix(g, phi or Phi.assembled(vjp, g))

    def on_matrix(self, g: Tensor, phi: Phi) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v with the matrix alone, without products."""
        self.require_small("least_squares", phi, g)
        matrix = phi.matrix().expand(len(g), -1, -1)
        finite = matrix.isfinite().all((1, 2)) & g.isfinite().all(1)
        equations = torch.eye(g.shape[1], dtype=g.dtype, device=g.device) - matrix.mT
        U, S, Vh = torch.linalg.svd(torch.where(finite[:, None, None], equations, 0))
        zero = (self.cutoff or (1e-10 if g.dtype == torch.float64 else 1e-5)) * S[:, :1] >= S
        v = matvec(Vh.mT, matvec(U.mT, g) / torch.where(zero, torch.inf, S))
        v = torch.where(finite[:, None], v, torch.nan)
        info = self.certified("least_squares", g, v, phi)
        singular = finite & zero.any(1)
        return v, info._replace(ok=info.ok | singular, fallback=singular)
