"""The default linear solver, and the choice of a solver by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve._base import VJP, LinearSolveInfo, LinearSolver, Product, relative
from foldopt.linear_solve._dense import Direct, LeastSquares, gigabytes, require_room
from foldopt.linear_solve._iteration import LFPI, Anderson
from foldopt.linear_solve._krylov import GMRES, BiCGSTAB
from foldopt.linear_solve._phi import Phi

__all__ = ["SINGULAR", "SOLVERS", "Auto", "linear_solver"]

SINGULAR = (
    "Check that the fixed point is locally unique; choose linear_solver='least_squares', which takes the nearest to a "
    "solution where there is none and the matrix is small; or choose on_failure='nan'|'zero'"
)


@dataclass(frozen=True)
class Auto:
    """The default solver: a closed form if the step has one, otherwise GMRES, then a direct solve for what is left.

    1. *Closed form.* A solution that the step gives is certified by one product. A matrix that it gives is factored. A
       sparse matrix is factored as it is; where it is singular, GMRES with the factors of I - Phi + 1e-8 I finds a
       solution if there is one, and up to N = 2,000 least squares is tried last.
    2. *GMRES.* It needs at most N products with Phi^T and usually 1 to 4, where assembling Phi takes N. So it goes
       first even for small states.
    3. *BiCGSTAB*, only for N above 2,000: it continues where GMRES stopped, before any matrix is assembled.
    4. *Direct.* Phi is assembled and factored, for as many samples at a time as fit into `max_bytes`. If not even one
       fits (N > 11,585 in float64), the samples left are not ok, and `info.remedy` says what to do.
    5. *Least squares.* Where I - Phi is singular, its answer is taken if it solves the equation.

    ``info.fallback`` marks the samples that needed more than the first method.

    Args:
        max_bytes: memory for matrices Phi, in bytes; default 1 GiB. Factoring takes about three times as much.

    Raises:
        InputError: max_bytes is not above 0.

    Examples:
        >>> v, info = foldopt.linear_solve.Auto()(lambda v: 0.5 * v, torch.ones(1, 2))
        >>> v
        tensor([[2., 2.]])
    """

    max_bytes: float = 2**30
    iterative: ClassVar[GMRES] = GMRES(max_iter=200)
    iterative_when_large: ClassVar[BiCGSTAB] = BiCGSTAB(max_iter=2000)
    direct: ClassVar[Direct] = Direct(max_bytes=math.inf)
    least_squares: ClassVar[LeastSquares] = LeastSquares()

    def __post_init__(self) -> None:
        require_room(self, self.max_bytes)

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; arguments and results are described in `foldopt.linear_solve`."""
        phi = phi or Phi.assembled(vjp, g)
        found = None if phi.inverse is None else self._inverted(vjp, g, phi)
        if phi.products:
            found = _then(found, self.iterative, vjp, g, phi) if found else self.iterative(vjp, g, phi)
            if g.shape[1] > self.iterative_when_large.max_iter and not phi.made:
                found = _then(found, self._resumed, vjp, g, *found)
            if phi.nbytes > self.max_bytes and not found[1].ok.all():
                return self._in_parts(vjp, g, *found)
        elif phi.sparse and (found is None or not found[1].ok.all()):
            return self._sparse(g, phi, *_then(found, self.direct, vjp, g, phi))
        return found if found is not None and found[1].ok.all() else self._dense(vjp, g, phi, found)

    def _dense(
        self, vjp: VJP, g: Tensor, phi: Phi, found: tuple[Tensor, LinearSolveInfo] | None
    ) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the samples that are left by a direct solve, then by least squares."""
        v, info = _then(found, self.direct, vjp, g, phi)
        return (v, info) if info.ok.all() else self._singular(g, v, info, phi)

    def _sparse(self, g: Tensor, phi: Phi, v: Tensor, info: LinearSolveInfo) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the samples that are left, where a sparse I - Phi is singular or nearly so."""
        rows = (~info.ok).nonzero()[:, 0]
        if len(rows):
            part = phi.at(rows)
            solver = GMRES(max_iter=self.iterative.max_iter, preconditioner=part.shifted)
            v_part, new = _then((v[rows], info.at(rows)), solver, part.product, g[rows])
            v, info = v.index_copy(0, rows, v_part), info.put(rows, new)
        rows = (~info.ok).nonzero()[:, 0]
        n = g.shape[1]
        room = self.max_bytes // (n * n * g.element_size()) if n <= self.iterative_when_large.max_iter else 0
        if len(rows) and not room:
            return v, info._replace(remedy=f"The update's sparse Phi, {n} x {n}, makes I - Phi singular. {SINGULAR}")
        for some in rows.split(int(min(room, len(rows)))) if len(rows) else ():
            v_part, new = self._singular(g[some], v[some], info.at(some), phi.at(some))
            v, info = v.index_copy(0, some, v_part), info.put(some, new)
        return v, info

    def _resumed(self, vjp: VJP, g: Tensor, v: Tensor, info: LinearSolveInfo) -> tuple[Tensor, LinearSolveInfo]:
        """Continue from v for the samples that are left; the others cost no iterations."""
        left = ~info.ok[:, None]
        return self.iterative_when_large(vjp, torch.where(left, g, 0), guess=torch.where(left, v, 0))

    def _in_parts(self, vjp: VJP, g: Tensor, v: Tensor, info: LinearSolveInfo) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the samples that are left with matrices, for as many samples at a time as fit into memory."""
        n = g.shape[1]
        one = n * n * g.element_size()
        if one > self.max_bytes:
            return v, info._replace(remedy=self._remedy(n, one))
        for rows in (~info.ok).nonzero()[:, 0].split(int(self.max_bytes // one)):
            part = functools.partial(_product_of_rows, vjp, torch.zeros_like(g), rows)
            v_part, new = self._dense(part, g[rows], Phi.assembled(part, g[rows]), (v[rows], info.at(rows)))
            v, info = v.index_copy(0, rows, v_part), info.put(rows, new)
        return v, info

    def _remedy(self, n: int, nbytes: int) -> str:
        """Return the remedy for states whose matrix is too large."""
        return (
            f"Phi of a state of N = {n} numbers takes {gigabytes(nbytes)}, too much for linear_solver='auto' to "
            f"assemble, and {self.iterative.max_iter} products in GMRES and {self.iterative_when_large.max_iter} in "
            "BiCGSTAB were not enough. Choose linear_solver=BiCGSTAB(max_iter=20000) or GMRES(max_iter=20000, "
            "restart=300) from foldopt.linear_solve, with a preconditioner if there is one; give the update a closed "
            "form (`inverse`); check that I - Phi is not singular; or choose on_failure='nan'|'zero'"
        )

    def _inverted(self, vjp: VJP, g: Tensor, phi: Phi) -> tuple[Tensor, LinearSolveInfo] | None:
        """Return the step's own solution, certified by one product, or None if it has none."""
        v = phi.inverted(g)
        if v is None:
            return None
        left = g + (vjp.answer(v) if isinstance(vjp, Product) else vjp(v)) - v
        residual = relative(left, g) if phi.weights is None else relative(phi.weights * left, phi.weights * g)
        residual = residual.nan_to_num(nan=torch.inf)
        products = torch.ones(len(g), dtype=torch.long, device=g.device)
        return v, LinearSolveInfo.of("closed form", products, residual, self.direct.tolerance(g.dtype))

    def _singular(self, g: Tensor, v: Tensor, info: LinearSolveInfo, phi: Phi) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the samples that are left by least squares, and take the answers that solve the equation."""
        rows = (~info.ok).nonzero()[:, 0]
        v_left, new = self.least_squares.on_matrix(g[rows], phi.at(rows))
        solved = new.residual <= self.least_squares.tolerance(g.dtype)
        take = (~info.ok).masked_scatter(~info.ok, solved)
        if not take.any():
            return v, info
        return v.masked_scatter(take[:, None], v_left[solved]), LinearSolveInfo(
            f"{info.method}+least_squares",
            info.iterations,
            info.residual.masked_scatter(take, new.residual[solved]),
            info.ok | take,
            info.fallback | take,
        )


def _product_of_rows(vjp: VJP, zeros: Tensor, rows: Tensor, v: Tensor) -> Tensor:
    """Return Phi^T v of some samples, (R, N)."""
    return vjp(zeros.index_copy(0, rows, v))[rows]


def _then(
    found: tuple[Tensor, LinearSolveInfo] | None,
    solver: Callable[..., tuple[Tensor, LinearSolveInfo]],
    *args: Any,
) -> tuple[Tensor, LinearSolveInfo]:
    """Return what was found, improved by a further solver if samples are left."""
    if found is None:
        return solver(*args)
    v, info = found
    if info.ok.all():
        return found
    v_new, new = solver(*args)
    return _improved(v, info, v_new, new, f"{info.method}+{new.method}")


def _improved(
    v: Tensor, info: LinearSolveInfo, v_new: Tensor, new: LinearSolveInfo, method: str
) -> tuple[Tensor, LinearSolveInfo]:
    """Take the new answer for the samples that are left and have a smaller residual with it."""
    take = ~info.ok & (new.residual < info.residual)
    return torch.where(take[:, None], v_new, v), LinearSolveInfo(
        method,
        info.iterations + torch.where(take, new.iterations, 0),
        torch.where(take, new.residual, info.residual),
        torch.where(take, new.ok, info.ok),
        info.fallback | take,
    )


SOLVERS: dict[str, Callable[[], LinearSolver]] = {
    "auto": Auto,
    "direct": Direct,
    "least_squares": LeastSquares,
    "gmres": GMRES,
    "bicgstab": BiCGSTAB,
    "anderson": Anderson,
    "lfpi": LFPI,
}


def linear_solver(choice: str | LinearSolver) -> LinearSolver:
    """Return the linear solver of a name, with default settings; a solver is returned as it is.

    Args:
        choice: a key of `SOLVERS` or a linear solver.

    Returns:
        The linear solver.

    Raises:
        InputError: the name is unknown, or the object cannot be called.

    Examples:
        >>> foldopt.linear_solve.linear_solver("gmres")
        GMRES(tol=None, max_iter=1000, preconditioner=None, restart=50)
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
