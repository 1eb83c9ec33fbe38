"""The engine of `CvxpyLayer`: a solver finds a solution, and a Newton step on the optimality conditions is folded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foldopt._affine import SparseMap
from foldopt._certificates import FoldInfo
from foldopt._conic.form import Data, Form, Program
from foldopt._conic.newton import ConeNewton, ConeState
from foldopt._conic.point import Point
from foldopt._conic.polish import polish
from foldopt._fold import Implicit
from foldopt._layer import FixedPointLayer
from foldopt.cones._interior_point import STATUS as STATUS_OF_CONES
from foldopt.cones._interior_point import solve_cone_program
from foldopt.cvxpy._canonical import Canonical, Input
from foldopt.cvxpy._solver import FAILED, INFEASIBLE, NONCONVEX, SOLVED, UNBOUNDED
from foldopt.errors import InfeasibleError, InputError, LimitError, NonconvexError, SolverError, UnboundedError
from foldopt.qp._engine import STATUS, solve
from foldopt.qp._program import Program as QuadraticProgram
from foldopt.step import Tensors

ACCURATE = 1e-7  # largest relative residual of the optimality conditions that counts as solved
NEAR = 1e-5  # largest estimate of the error of (x, y), relative to them
_CAUSES: tuple[tuple[str, type[SolverError]], ...] = (
    (INFEASIBLE, InfeasibleError),
    (UNBOUNDED, UnboundedError),
    (NONCONVEX, NonconvexError),
    (FAILED, LimitError),
)


class Front(Protocol):
    """A solver of the programs of a batch."""

    @property
    def name(self) -> str:
        """Return its name in messages."""
        ...

    def __call__(self, data: Data, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
        """Return x (B, n) and y (B, m), NaN in samples without a solution, and the status of each sample in words.

        The data and the answer are on the CPU. device: the device of the parameters; a solver may compute there.
        """
        ...


class OwnQP:
    """The engine of `QPLayer`, for programs with linear constraints only, as one dense batch."""

    name = "foldopt's QP engine"

    def __init__(self, form: Form) -> None:
        self.form = form

    def __call__(self, data: Data, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
        """See `Front`."""
        P, q, A, b = self.form.dense(data)
        lower = torch.where(torch.arange(self.form.m) < self.form.zero, b, -torch.inf)
        found = solve(QuadraticProgram(P, q, A, lower, b))
        return found.x, found.y, [STATUS[code] for code in found.status.tolist()]


class OwnInteriorPoint:
    """foldopt's interior point, for linear and second-order cones, as one dense batch on the parameters' device.

    options: ``tol`` and ``max_iter`` of `foldopt.cones.solve_cone_program`. Raises InputError for other options and
    other cones.
    """

    name = "foldopt's interior point"

    def __init__(self, form: Form, options: dict[str, Any]) -> None:
        others = [kind for kind in ("psd", "exp", "pow") if form.cone.dims.get(kind)]
        if others:
            raise InputError(
                f"solver='foldopt' knows linear and second-order cones only, this problem has {others}; choose another."
            )
        unknown = sorted(set(options) - {"tol", "max_iter"})
        if unknown:
            raise InputError(f"options has {unknown}: solver='foldopt' knows 'tol' and 'max_iter' only.")
        self.form, self.options = form, options

    def __call__(self, data: Data, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
        """See `Front`."""
        P, q, A, b = (part.to(device) for part in self.form.dense(data))
        dims = {kind: size for kind, size in self.form.cone.dims.items() if kind in ("zero", "nonneg", "soc")}
        found = solve_cone_program(P, q, A, b, dims, **self.options)
        good = (found.status == STATUS_OF_CONES.index(SOLVED))[:, None]
        x, y = (torch.where(good, part, torch.nan).cpu() for part in (found.x, found.y))
        return x, y, [STATUS_OF_CONES[code] for code in found.status.tolist()]


@dataclass(frozen=True)
class PreviousSolution:
    """The solutions x (B, n) and y (B, m) of the previous call, where a warm start begins."""

    x: Tensor
    y: Tensor
    name: str = "the last solution"

    def __call__(self, data: Data, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
        """See `Front`."""
        return self.x, self.y, [SOLVED] * len(self.x)


class Stack:
    """Concatenates the entries of the parameters, (B, k) or (k,) each, in the order of the columns of M, and a 1.

    ``stack(*params) -> (B, width)``; B is 1 if no parameter has a batch dimension.
    """

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.order = sorted(range(len(inputs)), key=lambda i: inputs[i].column)

    def __call__(self, *params: Tensor) -> Tensor:
        """Return the concatenated entries (B, width)."""
        B = max((len(p) for p in params if p.dim() == 2), default=1)
        one = torch.ones(B, 1, dtype=torch.float64)
        return torch.cat([*(params[i].expand(B, -1) for i in self.order), one], 1)


class ConicEngine(FixedPointLayer):
    """The folded layer ``engine(*params) -> (x, y)`` with x (B, n) and multipliers y (B, m) in the dual cone.

    canonical: the problem. form: its patterns and cone. solvers: see `Front`; each solves the samples that those before
    it did not solve. read: (n,) bool, the entries of x from which outputs are computed. warm_start: start Newton steps
    at the solutions of the previous call, and call the solvers only for samples where these steps fail.
    """

    checks_finite = False  # `foldopt.cvxpy._values` has checked the parameters

    def __init__(
        self,
        canonical: Canonical,
        form: Form,
        solvers: Sequence[Front],
        read: Tensor,
        warm_start: bool,
        degenerate: str,
        on_failure: str,
    ) -> None:
        self.stack, self.map = Stack(canonical.inputs), SparseMap(canonical.M)
        self.form, self.solvers, self.warm_start = form, solvers, warm_start
        self.columns = [(one.column, one.column + len(one.index)) for one in canonical.inputs]
        self.absolute = self.map.transposed.size
        nan = "nan" in (degenerate, on_failure)
        newton = ConeNewton(self.form, self._theta, self._pulled, read, nan, canonical.row_name)
        super().__init__(self._solved, newton, Implicit(degenerate=degenerate), on_failure=on_failure)
        self.newton, self.call = newton, _Call()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "call": _Call()})

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Return the certificates of the polished solutions; `_solved` has applied the policy."""
        residual, status = self.call.found
        return FoldInfo(residual, torch.tensor([s == SOLVED for s in status]), tuple(status))

    def _theta(self, *params: Tensor) -> Tensor:
        return self.map(self.stack(*params))

    def _pulled(self, g: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return the needed params' cotangent for a cotangent g of theta, and the size of its terms, (B, k) each."""
        wanted = [range(*columns) for columns, need in zip(self.columns, needed, strict=True) if need]
        index = torch.tensor([i for part in wanted for i in part], dtype=torch.long)
        return self.map.transposed(g)[:, index], self.absolute(g.abs())[:, index]

    def _solved(self, *params: Tensor) -> ConeState:
        data = self.form.data(self._theta(*params))
        program = Program(self.form, data)
        status = [SOLVED] * len(data.q)
        x, y = torch.full_like(data.q, torch.nan), torch.full_like(data.b, torch.nan)
        left = torch.arange(len(x))
        for front in self._fronts(len(x)):
            found_x, found_y, found = front(data.at(left), self.call.device)
            for i, outcome in zip(left.tolist(), found, strict=True):
                status[i] = outcome
            scale_x, scale_y = program.scale[left].split([self.form.n, self.form.m], 1)
            x[left], y[left] = found_x / scale_x, found_y / scale_y
            x, y, measure, system = polish(program, x, y)
            left = (~(measure.residual <= ACCURATE)).nonzero()[:, 0]
            if not len(left):
                break
        point = Point(program, x, y, measure, system)
        accurate = ((measure.residual <= ACCURATE) & (point.error(measure) <= NEAR)).tolist()
        status = [FAILED if s == SOLVED and not good else s for s, good in zip(status, accurate, strict=True)]
        self._explain(status, measure.residual)
        good = torch.tensor([s == SOLVED for s in status], dtype=torch.bool)[:, None]
        x, y = torch.where(good, x, torch.nan), torch.where(good, y, torch.nan)
        state = program.outside(x, y)
        if good.all():
            self.newton.keep(state, params, point)
        self.call.found, self.call.start = (measure.residual, status), state
        return state

    def _fronts(self, size: int) -> Sequence[Front]:
        """Return the solvers to try, in this order, for a batch of this size."""
        start = self.call.start if self.warm_start else None
        return (
            [PreviousSolution(*start), *self.solvers] if start is not None and len(start[0]) == size else self.solvers
        )

    def _explain(self, status: Sequence[str], residual: Tensor) -> None:
        """Raise or warn about the samples that were not solved, with the cause of each."""
        if self.on_failure in ("nan", "zero") or all(s == SOLVED for s in status):
            return
        said = []
        for cause in sorted(set(status) - {SOLVED}):
            bad = [i for i, s in enumerate(status) if s == cause]
            at = f", relative residual {float(residual[bad[0]]):.1e}" if cause == FAILED else ""
            said.append(f"{cause}{at} at {len(bad)} of {len(status)} samples, first {bad[:10]}")
        message = (
            f"{' and '.join(one.name for one in self.solvers)} found no solution of the CVXPY problem: "
            f"{'; '.join(said)}. Correct these samples, give the solver other options=, choose another solver=, or "
            "choose on_failure='nan' or 'zero'."
        )
        if self.on_failure == "raise":
            error = next((error for cause, error in _CAUSES if cause in status), LimitError)
            raise error(message, [i for i, s in enumerate(status) if s != SOLVED])
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Call(threading.local):
    """Data of the latest call, per thread: residuals and statuses, the solutions, and the parameters' device."""

    found: tuple[Tensor, list[str]]
    device = torch.device("cpu")
    start: ConeState | None = None
