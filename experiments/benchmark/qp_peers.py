"""Answers of the libraries that differentiate quadratic programs to the hard cases, and their judgement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.hard_cases import F64, Case, cases
from experiments.benchmark.refusals import reason
from foldopt import QPLayer
from foldopt.errors import FoldoptError

CLOSE = 1e-4  # largest error of a right x, in the unit of the case
CLOSE_GRADIENT = 1e-3  # largest error of a right gradient, relative to its largest entry, or to 1 if that is 0
Solve = Callable[[Tensor, Case], Tensor]


class RefusedError(Exception):
    """A library reports by a status, not by an exception, that it has no answer."""


@dataclass(frozen=True)
class Setting:
    """A library at one setting.

    Attributes:
        title: Its title in tables.
        package: The package whose version is shown, "" for foldopt.
        refuses: Beginnings of the errors that it raises on purpose; other exceptions are raw.
    """

    title: str
    package: str
    refuses: tuple[str, ...]

    def is_refusal(self, error: Exception) -> bool:
        """Whether the library raises `error` on purpose, to say that it has no answer."""
        said = f"{type(error).__name__}: {error}"
        return isinstance(error, FoldoptError) or said.startswith((*self.refuses, "RefusedError"))

    def installed(self) -> bool:
        """Whether its package is installed."""
        if not self.package:
            return True
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    def named(self) -> str:
        """Return its title, with the version if its package is installed."""
        name, _, setting = self.title.partition(", ")
        version = f" {importlib.metadata.version(self.package)}" if self.package and self.installed() else ""
        return f"{name}{version}" + (f", {setting}" if setting else "")


@dataclass(frozen=True)
class Contender(Setting):
    """A library at one setting for the hard cases; solve: (p, case) -> x, (n,)."""

    solve: Solve


def _rows(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return G, h, A, b in float64, with empty tensors in place of None."""
    n = len(case.p)
    none = torch.zeros(0, n, dtype=F64), torch.zeros(0, dtype=F64)
    G, h = none if case.G is None or case.h is None or not case.G.numel() else (case.G, case.h)
    A, b = none if case.A is None or case.b is None else (case.A, case.b)
    return G, h, A, b


def _foldopt(p: Tensor, case: Case) -> Tensor:
    return QPLayer()(case.Q, p[None], case.G, case.h, case.A, case.b)[0]


def _qpth(**options: Any) -> Solve:
    def solve(p: Tensor, case: Case) -> Tensor:
        from qpth.qp import QPFunction

        empty = torch.Tensor()  # the library's documented way to have no constraints
        given = (empty if value is None else value for value in (case.G, case.h, case.A, case.b))
        return QPFunction(verbose=-1, **options)(case.Q, p[None], *given)[0]

    return solve


def _proxsuite(**options: Any) -> Solve:
    def solve(p: Tensor, case: Case) -> Tensor:
        from proxsuite.torch.qplayer import QPFunction

        G, h, A, b = (value[None] for value in _rows(case))
        return QPFunction(**options)(case.Q[None], p[None], A, b, G, torch.full_like(h, -1e20), h)[0][0]

    return solve


def _dqp(**options: Any) -> Solve:
    def solve(p: Tensor, case: Case) -> Tensor:
        from dqp import dQP

        G, h, A, b = _rows(case)
        if not len(h):  # the library's way to have no inequalities
            G, h = torch.zeros(1, len(p), dtype=F64), torch.ones(1, dtype=F64)
        layer = dQP.dQP_layer(settings=dQP.build_settings(**options))
        return layer(case.Q, p, G, h, *((A, b) if len(b) else (None, None)))[0].reshape(-1)

    return solve


def _moreau(tolerance: float | None = None) -> Solve:
    def solve(p: Tensor, case: Case) -> Tensor:
        import moreau
        from moreau.torch import Solver

        G, h, A, b = _rows(case)
        rows, right, n = torch.cat([A, G]), torch.cat([b, h]), len(p)
        solver = Solver(
            *(n, len(right)),
            *(torch.arange(0, n * n + 1, n), torch.arange(n).repeat(n)),
            *(torch.arange(0, len(right) * n + 1, n), torch.arange(n).repeat(len(right))),
            cones=moreau.Cones(num_zero_cones=len(b), num_nonneg_cones=len(h)),
            settings=moreau_settings(tolerance),
        )
        return moreau_solution(solver, case.Q.reshape(-1).to(F64), rows.reshape(-1), p, right)

    return solve


def moreau_settings(tolerance: float | None) -> Any:
    """Return moreau's default settings, or those of its interior point with a tolerance and exact derivatives."""
    import moreau

    if tolerance is None:
        return moreau.Settings(device="cpu", enable_grad=True)
    tight = moreau.IPMSettings(tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance, diff_method="exact")
    return moreau.Settings(device="cpu", enable_grad=True, solver="ipm", ipm_settings=tight)


def moreau_solution(solver: Any, *values: Tensor) -> Tensor:
    """Return x of moreau's `solver` for the values of P, A, q and b. Raises RefusedError unless it is solved."""
    solution = solver.solve(*values)
    if str(solver.info.status) != "Solved":
        raise RefusedError(f"status {solver.info.status}")
    return solution.x


def _cvxpylayers(**options: Any) -> Solve:
    def solve(p: Tensor, case: Case) -> Tensor:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        G, h, A, b = (value.numpy() for value in _rows(case))
        x, linear = cp.Variable(len(p)), cp.Parameter(len(p))
        cost = linear @ x
        if case.Q.any():
            cost += cp.quad_form(x, case.Q.numpy()) / 2
        constraints = [*([G @ x <= h] if len(h) else []), *([A @ x == b] if len(b) else [])]
        layer = CvxpyLayer(cp.Problem(cp.Minimize(cost), constraints), [linear], [x])
        return layer(p, solver_args=options)[0]

    return solve


OF_CVXPY = ("SolverError", "DCPError", "ValueError: Problem must be DPP")
OF_QPSOLVERS = ("Exception", "ProblemError", "SolverError", "ParamError", "SolverNotFound")
OF_QPTH = ("RuntimeError: Q is not SPD",)
CONTENDERS: Mapping[str, Contender] = {
    "foldopt": Contender("foldopt", "", (), _foldopt),
    "moreau": Contender("moreau", "moreau", (), _moreau()),
    "moreau_tight": Contender("moreau, 1e-11", "moreau", (), _moreau(tolerance=1e-11)),
    "dqp": Contender("libdqp", "libdqp", OF_QPSOLVERS, _dqp()),
    "dqp_tight": Contender("libdqp, piqp 1e-11", "libdqp", OF_QPSOLVERS, _dqp(qp_solver="piqp", eps_abs=1e-11)),
    "proxsuite": Contender("proxsuite", "proxsuite", (), _proxsuite()),
    "proxsuite_tight": Contender(
        "proxsuite, 1e-12",
        "proxsuite",
        (),
        _proxsuite(eps=1e-12, eps_backward=1e-10, rho_backward=1e-9, mu_backward=1e-9),
    ),
    "qpth": Contender("qpth", "qpth", OF_QPTH, _qpth()),
    "qpth_tight": Contender("qpth, 100 steps", "qpth", OF_QPTH, _qpth(eps=1e-14, maxIter=100)),
    "cvxpylayers": Contender("cvxpylayers", "cvxpylayers", OF_CVXPY, _cvxpylayers()),
    "cvxpylayers_clarabel": Contender(
        "cvxpylayers, Clarabel", "cvxpylayers", OF_CVXPY, _cvxpylayers(solve_method="Clarabel")
    ),
}


@cache
def _by_name() -> dict[str, Case]:
    return {case.name: case for case in cases()}


def answer(contender: str, name: str) -> str:
    """Return the judgement of `contender` on the case `name`."""
    return judged(CONTENDERS[contender], _by_name()[name])


def judged(contender: Contender, case: Case) -> str:
    """Judge the answer of `contender` to `case`: "right", "wrong: ...", "refused: ..." or "raw: ...".

    If the right answer is a refusal, foldopt has to name the reason, while any refusal of another library is right.
    """
    p = case.p.clone().requires_grad_()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            x = contender.solve(p, case)
            (gradient,) = torch.autograd.grad(x.sum(), p)
    except FoldoptError as error:
        return _refused(case, reason(error) == case.refusal, f"{type(error).__name__}: {error}")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return _refused(case, True, said) if contender.is_refusal(error) else f"raw: {said}"
    x, gradient = x.detach().reshape(-1), gradient.reshape(-1)
    if not (x.isfinite().all() and gradient.isfinite().all()):
        return _refused(case, True, "NaN")
    if case.refusal:
        return f"wrong: answers, though {case.refusal}"
    off, gradient_off = errors(case, x, gradient)
    if not off <= CLOSE:
        return f"wrong: x by {off:.0e}"
    return "right" if gradient_off <= CLOSE_GRADIENT else f"wrong: gradient by {gradient_off:.0e}"


def errors(case: Case, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Return the errors of x, in the case's unit, and of the gradient, relative to its size."""
    if case.x is None or case.gradient is None:
        raise ValueError(f"the case {case.name!r} has no right answer to compare with.")
    unit = case.unit if case.unit is not None else case.x.abs().clamp(min=1)
    largest = float(case.gradient.abs().max()) or 1.0
    return float(((x - case.x) / unit).abs().max()), float((gradient - case.gradient).abs().max()) / largest


def _refused(case: Case, cause: bool, said: str) -> str:
    """Return "right" if the case calls for a refusal and the reason is right, else the error."""
    return "right" if case.refusal and cause else f"refused: {said}"
