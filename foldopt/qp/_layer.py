"""Quadratic programs as a layer: the engine in front, a Newton step on the KKT conditions folded behind."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo
from foldopt._compat import untransformed
from foldopt._fold import Implicit
from foldopt._layer import FixedPointLayer
from foldopt.errors import InfeasibleError, InputError, LimitError, NonconvexError, SolverError, UnboundedError
from foldopt.linear_solve import LinearSolver
from foldopt.qp._arguments import NAMES, Given, arguments
from foldopt.qp._closest import shifted_to_feasible
from foldopt.qp._duals import Duals
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
from foldopt.qp._structure import Structure
from foldopt.qp._systems import Schur
from foldopt.qp.matrix import SparseMatrix
from foldopt.solvers.qp_solvers import QPSolver
from foldopt.solvers.saddle import Saddle
from foldopt.step import Tensors
from foldopt.updates.newton import KKTNewton, NewtonState, Point

PATTERNS = 4  # of sparse arguments, for which a layer keeps what it has made


class QPLayer(nn.Module):
    """A quadratic program as a layer: min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, lower <= x <= upper.

    ``QPLayer()(Q, p, G, h, A, b, lower=lower, upper=upper) -> x``, with the arguments of qpth's QPFunction in its
    order. Solved in float64 to rounding, whatever the units of rows, variables and objective; the derivative is that of
    one Newton step on the KKT conditions (`KKTNewton`), exact to rounding and certified per sample and cotangent.

    Args:
        degenerate: what happens to samples that are solved but whose x has no derivative that the incoming gradient
            asks for: "raise" (`KinkError`, `NotUniqueError`, `DependentRowsError`), "warn" (and go on as "one_sided"),
            "one_sided" (the derivative of one of the smooth pieces that meet at a kink; of rows that depend on each
            other, some independent ones carry), "least_norm" (rows that depend on each other share: exact for changes
            that keep them consistent), "nan" or "zero" (the gradient of that sample). Where the solution is not unique,
            "one_sided" and "least_norm" take the gradient's part along which it is.
        on_failure: what happens to samples that are infeasible, unbounded, not convex or not solved: "raise" (each
            cause its own error), "warn", or make their gradient "nan" or "zero"; x is NaN there.
        return_duals: return ``(x, duals)``, a `Duals` of multipliers with their derivatives.
        closest_feasible: "l1" or "l2": where no point satisfies the rows, shift h and b by the least violation in that
            norm and solve for these, differentiably; the shifts are in ``layer.shifts``. None refuses such samples.
            Bounds of the variables are kept.
        solver: what finds the first point, which is then polished to rounding: None, the own interior point for dense
            programs, PIQP or HiGHS with Clarabel behind them for sparse ones; the name of a solver that is installed
            (`foldopt.solvers.qp_solvers.installed()`), or a function: see `QPSolver`. options: of a named solver.
            warm_start: let it begin at the solutions of the last call, if that had the same shape; not all can.
        linear_solver: as for `foldopt.fold`; there is nothing to solve, as Phi = 0. dtype: of the computation, float64.

    Every argument may lack the batch dimension; the gradient of one that does is the sum over the batch. Either pair,
    G, h or A, b, may be None or empty; lower and upper are numbers, (n,) or (B, n); where h, lower or upper is infinite
    there is no bound. Q, G and A may be torch sparse tensors (COO, CSR, CSC), scipy sparse matrices or a
    `foldopt.qp.matrix.SparseMatrix`; gradients come on their entries and in their layout, and if one of the three is
    sparse none is made dense. Integers are converted to float64. x comes back in the dtype of the first floating
    argument.

    ``layer.last`` holds per sample: ``status`` ("solved", "infeasible", ...), ``residual`` (worst relative violation of
    the KKT conditions), ``solved``, and after a backward pass ``verdict`` ("differentiable", "kink", "not unique",
    "dependent rows"). ``layer.fold`` is the folded layer of the state (x, y).

    Raises InputError for arguments that do not fit, and the errors of the two policies.
    """

    def __init__(
        self,
        rho: float | None = None,
        *,
        degenerate: str = "raise",
        on_failure: str = "raise",
        return_duals: bool = False,
        closest_feasible: str | None = None,
        solver: str | Callable[..., Any] | None = None,
        options: dict[str, Any] | None = None,
        warm_start: bool = False,
        linear_solver: str | LinearSolver = "auto",
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        super().__init__()
        if dtype not in (None, torch.float64):
            raise InputError(f"dtype={dtype}: QPLayer computes in torch.float64 and answers in the caller's dtype.")
        if rho is not None:
            warnings.warn(
                "QPLayer has no penalty any more: rho changes nothing; leave it out.", DeprecationWarning, stacklevel=2
            )
        if closest_feasible not in (None, "l1", "l2"):
            raise InputError(f"closest_feasible={closest_feasible!r} is unknown; choose None, 'l1' or 'l2'.")
        self.update = KKTNewton(degenerate, "nan" in (degenerate, on_failure))
        self.solver = QPSolver(solver, options) if solver is not None or options is not None else None
        self.warm_start = warm_start
        if warm_start and self.solver is None:
            raise InputError("warm_start=True needs solver=: the layer's own choice of solvers begins from scratch.")
        derivative = Implicit(linear_solver, degenerate)
        self.fold = _QPFold(self.update, derivative, on_failure, self.solver, warm_start)
        self._sparse: list[_QPFold] = []
        self._latest = [self.fold]
        self.return_duals, self.closest_feasible = return_duals, closest_feasible
        self.shifts: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shifts": None, "_sparse": [], "_latest": [self.fold]}

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call."""
        return self._latest[0].last

    def folded(self, *args: Any) -> FixedPointLayer:
        """Return the folded layer that a call with Q, p, G, h, A, b uses: sparse patterns have their own."""
        return self._fold_for(arguments(*args, *[None] * (len(NAMES) - len(args))))

    def _fold_for(self, given: Given) -> _QPFold:
        """Return the folded layer of the arguments' patterns, a new one if there is none; `PATTERNS` are kept."""
        if given.patterns is None:
            return self.fold
        with untransformed():
            for fold in self._sparse:
                if fold.newton.structure is not None and fold.newton.structure.suits(*given.patterns):
                    return fold
            structure = Structure(*given.patterns)
        derivative = self.fold.derivative
        newton = KKTNewton(derivative.degenerate, self.update.nan, structure)
        fold = _QPFold(newton, derivative, self.fold.on_failure, self.solver, self.warm_start)
        self._sparse = [fold, *self._sparse[: PATTERNS - 1]]
        return fold

    def forward(
        self,
        Q: Any,
        p: Tensor,
        G: Any = None,
        h: Tensor | None = None,
        A: Any = None,
        b: Tensor | None = None,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Duals]:
        """Return the solutions x (B, n), or (x, duals); see the class."""
        given = arguments(Q, p, G, h, A, b, lower, upper)
        params, answer, fold = given.params, given.dtype, self._fold_for(given)
        fold.call.curvature = given.curvature
        if self.closest_feasible is not None:
            patterns = (None, None, None) if given.patterns is None else given.patterns[:3]
            params, self.shifts = shifted_to_feasible(params, patterns, self.closest_feasible, QPLayer)
        self._latest[0] = fold
        x, y = fold(*params)
        if not self.return_duals:
            return x.to(answer)
        y = y.to(answer)
        k, m = params[5].shape[-1], params[3].shape[-1]
        bounds = y[:, k + m :] if y.shape[1] > k + m else torch.zeros_like(x, dtype=answer)
        return x.to(answer), Duals(y[:, :k], y[:, k : k + m], bounds)


class _QPFold(FixedPointLayer):
    """The folded layer of (x, y), which knows why a sample has no solution."""

    checks_finite = False  # `arguments` has looked at the parameters
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
        """Return the fast path of small, regular, dense programs with the layer's own solver, where there is one."""
        H, C = program.H, program.C
        if bounded or self.solver is not None or isinstance(H, SparseMatrix) or isinstance(C, SparseMatrix):
            return None
        return Saddle.of(H, C) if program.upper.isfinite().all() else None

    def _begin(self, x: Tensor) -> Tensor | None:
        """Return where a warm start begins: the solutions of the last call if it had the shape of x (B, n)."""
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
        """Hand the step what is known of the solutions; where some sample has none it looks at them by itself."""
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
        """Return the certificates that the engine gave; `_solve` has applied the policy."""
        status, residual = self.call.found
        return FoldInfo(residual, status == GOOD, tuple(STATUS[s] for s in status.tolist()))


class _Call(threading.local):
    """What one call of a layer passes on: samples' status and residual, and the curvature that counts as none."""

    found: tuple[Tensor, Tensor]
    curvature = CURVATURE


def _explain(policy: str, status: Tensor, found: Solution, program: Program, left: Tensor) -> None:
    """Raise or warn about the samples that were not solved, by cause."""
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
        "QPLayer found no solution: " + "; ".join(said) + ". Mend these programs, or choose on_failure='nan'|'zero'."
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
            f"every x violates a row by at least {float(found.violation[at]):.1e} (in units of its largest entry, "
            "equilibrated)"
        ),
    ),
    UNBOUNDED: (
        UnboundedError,
        lambda found, at: f"the objective falls for ever along a ray in {_largest_entries(found.ray[at], 'x')}",
    ),
    NONCONVEX: (NonconvexError, lambda found, at: "Q has negative curvature"),
    NOT_FINITE: (LimitError, lambda found, at: "NaN or inf in its data"),
    LIMIT: (
        LimitError,
        lambda found, at: f"the relative KKT residual stayed at {float(found.residual[at]):.1e}",
    ),
}
