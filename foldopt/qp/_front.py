"""Finds the first points of programs, which are then polished: by foldopt's interior point or any other solver."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from foldopt.qp._interior_point import interior_point
from foldopt.qp._operations import rescaled
from foldopt.qp._program import Program, Units
from foldopt.qp.matrix import SparseMatrix
from foldopt.solvers.qp_solvers import QPSolver


def nearby(program: Program, tol: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Return points (x, y) near solutions of equilibrated programs, NaN in samples where none was found.

    Dense programs are solved as one batch by foldopt's interior point, to a relative KKT residual of `tol`. Sparse ones
    are solved one after the other by the solvers that ``QPSolver()`` tries.
    """
    if isinstance(program.H, SparseMatrix):
        return one_by_one(_default(), program)
    found = interior_point(program, tol=tol)
    return found.x, found.y


class Front:
    """A solver that the user chose, together with starting points for the samples of a batch.

    solver: a solver chosen by name gets the equilibrated programs, a function gets the user's own programs. start:
    (B, n) in the user's units, used by solvers that accept a starting point; None: there is none.
    """

    def __init__(self, solver: QPSolver, start: Tensor | None = None) -> None:
        self.solver, self.start = solver, start

    def at(self, samples: Tensor) -> Front:
        """Return the same solver with the starting points of some samples."""
        return Front(self.solver, None if self.start is None else self.start[samples])

    def __call__(self, scaled: Program, units: Units, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return points (x, y) for some samples, in equilibrated units; NaN where none was found.

        scaled: the equilibrated programs of these samples. units: their units. samples: their indices in the batch.
        """
        d, e, c = units
        start = None if self.start is None else self.start[samples]
        if not callable(self.solver.solver):
            return one_by_one(self.solver, scaled, None if start is None else start / d)
        own = Program(
            rescaled(scaled.H, 1 / (c * d), 1 / d),
            scaled.q / (c * d),
            rescaled(scaled.C, 1 / e, 1 / d),
            scaled.lower / e,
            scaled.upper / e,
        )
        x, y = one_by_one(self.solver, own, start)
        return x / d, y * c / e


def one_by_one(solver: QPSolver, program: Program, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Call a solver for each program; return the points (x, y), NaN where it has no answer."""
    x, y = torch.full_like(program.q, torch.nan), torch.full_like(program.lower, torch.nan)
    for i in range(len(x)):
        H, C = (_array(M, i) for M in (program.H, program.C))
        q, low, high = (part[i].cpu().numpy() for part in (program.q, program.lower, program.upper))
        begin = None if start is None or not start[i].isfinite().all() else start[i].cpu().numpy()
        answer = solver(H, q, C, low, high, begin)
        if answer is not None:
            x[i], y[i] = (torch.as_tensor(part, device=x.device) for part in (answer.x, answer.y))
    return x, y


def _array(M: Tensor | SparseMatrix, sample: int) -> Any:
    return M.to_scipy(sample) if isinstance(M, SparseMatrix) else M[sample].cpu().numpy()


@cache
def _default() -> QPSolver:
    return QPSolver()
