"""The default linear solver, and how a name becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foldopt.errors import InputError
from foldopt.linear_solve.base import VJP, LinearSolveInfo, LinearSolver, relative
from foldopt.linear_solve.dense import Direct, LeastSquares
from foldopt.linear_solve.iteration import LFPI, Anderson
from foldopt.linear_solve.krylov import GMRES, BiCGSTAB
from foldopt.linear_solve.phi import Phi


@dataclass(frozen=True)
class Auto:
    """The default: closed forms where the step has them; else GMRES, then a direct solve for what it left unsolved.

    A closed-form solution costs one product, which certifies it; a closed-form Phi is factored. GMRES needs at most N
    products with Phi^T where assembling Phi takes N, and usually 1 to 4; so it goes first even for small states.
    Samples that are still left, because I - Phi is singular, are solved in the least-squares sense, and that answer is
    taken if it does solve the equation. `info.fallback` marks the samples that needed more than the first means.
    """

    iterative: ClassVar[GMRES] = GMRES(max_iter=200)
    direct: ClassVar[Direct] = Direct()
    least_squares: ClassVar[LeastSquares] = LeastSquares()

    def __call__(self, vjp: VJP, g: Tensor, phi: Phi | None = None) -> tuple[Tensor, LinearSolveInfo]:
        """Solve for v; see the docstring of `foldopt.linear_solve`."""
        phi = phi or Phi.assembled(vjp, g)
        steps: list[tuple[str, LinearSolver]] = (
            [("direct", self.direct)] if phi.closed_form else [("gmres", self.iterative), ("direct", self.direct)]
        )
        found = self._inverted(vjp, g, phi)
        v, info = found or steps.pop(0)[1](vjp, g, phi)
        for name, solver in steps:
            if info.ok.all():
                return v, info
            better, new = solver(vjp, g, phi)
            v, info = _improved(v, info, better, new, f"{info.method}+{name}")
        return (v, info) if info.ok.all() else self._singular(g, v, info, phi)

    def _inverted(self, vjp: VJP, g: Tensor, phi: Phi) -> tuple[Tensor, LinearSolveInfo] | None:
        v = phi.inverted(g)
        if v is None:
            return None
        product = getattr(vjp, "last", vjp)
        residual = relative(g + product(v) - v, g).nan_to_num(nan=torch.inf)
        products = torch.ones(len(g), dtype=torch.long, device=g.device)
        return v, LinearSolveInfo.of("closed form", products, residual, self.direct.tolerance(g.dtype))

    def _singular(self, g: Tensor, v: Tensor, info: LinearSolveInfo, phi: Phi) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the samples that are still left by least squares and take what solves the equation."""
        matrix = phi.matrix()[~info.ok]
        v_left, new = self.least_squares.on_matrix(g[~info.ok], Phi(lambda: matrix))
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


def _improved(
    v: Tensor, info: LinearSolveInfo, v_new: Tensor, new: LinearSolveInfo, method: str
) -> tuple[Tensor, LinearSolveInfo]:
    """Take the new answer for the samples that are left, where its residual is smaller."""
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
