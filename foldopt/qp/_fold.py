"""The folded layer of a quadratic program: the engine solves, a Newton step on the KKT conditions is folded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foldopt._certificates import FoldInfo
from foldopt._fold import Implicit
from foldopt._layer import FixedPointLayer
from foldopt.errors import InfeasibleError, LimitError, NonconvexError, SolverError, UnboundedError
from foldopt.qp._engine import (
    CURVATURE,
    GOOD,
    INFEASIBLE,
    LIMIT,
    NONCONVEX,
    NOT_FINITE,
    STATUS,
    UNBOUNDED,
    Solution,
    solve,
)
from foldopt.qp._front import Front
from foldopt.qp._operations import dense
from foldopt.qp._program import Program
from foldopt.qp._systems import Schur
from foldopt.qp.matrix import SparseMatrix
from foldopt.solvers.qp_solvers import QPSolver
from foldopt.solvers.saddle import Saddle
from foldopt.step import Tensors
from foldopt.updates.newton import KKTNewton, NewtonState, Point


class QPFold(FixedPointLayer):
    """The folded layer of the state (x, y) of a quadratic program; it reports why a sample has no solution."""

    checks_finite = False  # `arguments` has checked the parameters
    derivative: Implicit

    def __init__(
        self,
        update: KKTNewton,
        derivative: Implicit,
        on_failure: str,
        solver: QPSolver | None,
        warm_start: bool,
    ) -> None:
        super().__init__(self._solve, update, derivative, on_failure=on_failure)
        self.newton, self.solver, self.warm_start = update, solver, warm_start
        self.start: Tensor | None = None
        self.call = _Call()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "call": None, "start": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "call": _Call()})

    def _solve(self, *params: Tensor) -> NewtonState:
        program, k = self.newton.program(params), params[5].shape[-1]
        x, d, y = torch.zeros_like(program.q), torch.ones_like(program.q), torch.zeros_like(program.lower)
        status = torch.full((len(x),), GOOD, device=x.device)
        residual = torch.zeros_like(x[:, 0])
        saddle = self._saddle(program, bool(params[6].shape[-1] or params[7].shape[-1]))
        left, found = torch.arange(len(x), device=x.device), None
        if saddle is not None:
            H, C = dense(program.H), dense(program.C)
            d = H.diagonal(dim1=1, dim2=2).rsqrt().contiguous()
            x, y, clear = saddle.minimize(H, program.q, C, program.upper, k)
            left = (~clear).nonzero()[:, 0]
        if len(left):
            front = None if self.solver is None else Front(self.solver, self._begin(x)).at(left)
            found = solve(program if len(left) == len(x) else program.at(left), self.call.curvature, front)
            x[left], y[left], status[left], residual[left] = found.x, found.y, found.status, found.residual
            d[left] = found.units.d
            if (found.status != GOOD).any():
                _explain(self.on_failure, status, found, program, left)
        typical = torch.zeros_like(residual)
        typical[left] = 1
        x = program.snapped_to_bounds(x, d, typical[:, None])
        self._prepare(program, params, x, y, saddle, left, found)
        self.call.found = status, residual
        if self.warm_start:
            self.start = x.detach().clone()
        return x, y

    def _saddle(self, program: Program, bounded: bool) -> Saddle | None:
        """Return the fast path for small, regular, dense programs, or None if these programs do not qualify."""
        H, C = program.H, program.C
        if bounded or self.solver is not None or isinstance(H, SparseMatrix) or isinstance(C, SparseMatrix):
            return None
        return Saddle.of(H, C) if program.upper.isfinite().all() else None

    def _begin(self, x: Tensor) -> Tensor | None:
        """Return the solutions of the last call, where a warm start begins, if they have the shape of x (B, n)."""
        start = self.start
        return start if start is not None and start.shape == x.shape and start.device == x.device else None

    def _prepare(
        self,
        program: Program,
        params: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        saddle: Saddle | None,
        left: Tensor,
        found: Solution | None,
    ) -> None:
        """Pass what is known of the solutions to the step. If a sample has none, the step computes it by itself."""
        point = None
        if found is not None:
            if (found.status != GOOD).any():
                return
            part = program if len(left) == len(x) else program.at(left)
            point = Point.of(
                part, x[left], y[left], self.derivative.degenerate, found.units, found.residual, found.known
            )
        if saddle is not None and len(left) < len(x):
            strong = (y != 0) | program.equality
            strong[left] = False
            point = Point.clear(
                program, Schur.of(saddle, dense(program.H), strong), None if point is None else (left, point)
            )
        if point is not None:
            self.newton.prepare((x, y), params, point, program.H if isinstance(program.H, Tensor) else None)

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Return the certificates of the engine; `_solve` has applied the policy."""
        status, residual = self.call.found
        return FoldInfo(residual, status == GOOD, tuple(STATUS[s] for s in status.tolist()))


class _Call(threading.local):
    """Data of one call, per thread: status and residual of the samples, and the curvature attributed to rounding."""

    found: tuple[Tensor, Tensor]
    curvature = CURVATURE


def _explain(policy: str, status: Tensor, found: Solution, program: Program, left: Tensor) -> None:
    """Raise or warn about the samples that were not solved, with the cause of each."""
    if policy in ("nan", "zero"):
        return
    failed = (status != GOOD).nonzero()[:, 0].tolist()
    place = {int(i): j for j, i in enumerate(left.tolist())}
    said, first = [], None
    for code, (error, describe) in _CAUSES.items():
        indices = (status == code).nonzero()[:, 0].tolist()
        if indices:
            first = first or error
            at = place[indices[0]]
            said.append(
                f"{STATUS[code]} at {len(indices)} of {len(status)} samples, first {indices[:10]}: "
                f"{describe(found, at)} at sample {indices[0]}"
            )
    message = (
        "QPLayer found no solution: "
        + "; ".join(said)
        + ". Correct these programs, or choose on_failure='nan' or 'zero'."
    )
    if policy == "raise":
        raise (first or LimitError)(message, failed)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _largest_entries(values: Tensor, name: str) -> str:
    size, index = values.abs().topk(min(3, len(values)))
    return ", ".join(f"{name}[{i}]" for i, v in zip(index.tolist(), size.tolist(), strict=True) if v > 1e-6 * size[0])


_CAUSES: dict[int, tuple[type[SolverError], Callable[[Solution, int], str]]] = {
    INFEASIBLE: (
        InfeasibleError,
        lambda found, at: (
            f"every x violates some constraint by at least {float(found.violation[at]):.1e} (in the equilibrated units "
            "of its row)"
        ),
    ),
    UNBOUNDED: (
        UnboundedError,
        lambda found, at: f"the objective falls forever along a ray in {_largest_entries(found.ray[at], 'x')}",
    ),
    NONCONVEX: (NonconvexError, lambda found, at: "Q has negative curvature"),
    NOT_FINITE: (LimitError, lambda found, at: "the data hold NaN or inf"),
    LIMIT: (
        LimitError,
        lambda found, at: f"the relative KKT residual is still {float(found.residual[at]):.1e}",
    ),
}
