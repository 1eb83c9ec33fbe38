"""Gurobi as a forward black box: one model per problem, kept and solved sample by sample, with multipliers."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.checks import nonfinite_allowed
from foldopt.errors import InfeasibleError, InputError, MissingDependencyError, SolverError, UnboundedError
from foldopt.solvers.interior_point import QuadraticConstraints, Solution

__all__ = [
    "LICENSE_VARIABLES",
    "NO_LICENSE",
    "PARAMETERS",
    "REMEDY",
    "SIZE_LIMIT",
    "GlobalSolution",
    "GurobiNonconvexQP",
    "GurobiQCQP",
]

PARAMETERS = {
    "OutputFlag": 0,
    "Threads": 1,
    "QCPDual": 1,
    "FeasibilityTol": 1e-9,
    "OptimalityTol": 1e-9,
    "BarConvTol": 1e-10,
    "BarQCPConvTol": 1e-10,
}
SIZE_LIMIT = 10010
NO_LICENSE = (10009, 10022, 10023, 10028)  # none found or free, licence server not reached, refused by it
LICENSE_VARIABLES = {
    "GRB_WLSACCESSID": "WLSAccessID",
    "GRB_WLSSECRET": "WLSSecret",
    "GRB_LICENSEID": "LicenseID",
    "GRB_TOKENSERVER": "TokenServer",
}
REMEDY = (
    "Name a licence file in GRB_LICENSE_FILE, a web licence in GRB_WLSACCESSID, GRB_WLSSECRET and GRB_LICENSEID, or a "
    "token server in GRB_TOKENSERVER; where it is lent to so many processes, run fewer at a time. Or do without: our "
    "exact solvers need none (run.py: backend.forward=exact)."
)


class GurobiQCQP:
    """Minimize q'x subject to Ax = b, Gx <= h and 0.5 x'Q_j x + r_j'x <= s_j with Gurobi, for a batch of q.

    The constraints are fixed: the model is built at the first call, and later calls change only its objective. The
    variables are free; bounds are rows of G. Tensors are on the CPU.

    Args:
        n: number of variables.
        A: (p, n); None, the default, for no equalities.
        b: (p,); given together with A.
        G: (m, n); None, the default, for no linear inequalities.
        h: (m,); given together with G.
        quadratic: the tuple (Q, r, s) of the quadratic constraints: Q (k, n, n) positive semidefinite, r (k, n), s
            (k,); default None.
        parameters: Gurobi parameters, which override `PARAMETERS` (tight tolerances, one thread, no output); default
            none.

    Raises:
        InputError: shapes do not fit.

    Examples:
        >>> G, h = torch.cat([torch.eye(2), -torch.eye(2)]), torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> solver = foldopt.solvers.gurobi.GurobiQCQP(2, G=G, h=h)
        >>> solver(torch.tensor([[-1.0, 2.0]])).x
        tensor([[1., 0.]], dtype=torch.float64)
    """

    def __init__(
        self,
        n: int,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        *,
        quadratic: QuadraticConstraints | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> None:
        empty = torch.zeros(0, n), torch.zeros(0)
        self.n = n
        self.equalities: tuple[Tensor, Any] = empty if A is None else (A, b)
        self.inequalities: tuple[Tensor, Any] = empty if G is None else (G, h)
        self.quadratic = quadratic or (torch.zeros(0, n, n), *empty)
        for name, (matrix, vector) in (("A, b", self.equalities), ("G, h", self.inequalities)):
            if vector is None or tuple(matrix.shape) != (len(vector), n):
                raise InputError(f"{name} do not fit: expected shapes (p, {n}) and (p,), got {tuple(matrix.shape)}.")
        self.parameters = {**PARAMETERS, **(parameters or {})}
        self._model: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __call__(self, q: Tensor) -> Solution:
        """Return the solutions for a batch of objectives.

        Args:
            q: (B, n).

        Returns:
            The solutions, float64 on the device of q; `residual` is not measured (NaN). Inside a layer, which certifies
            every sample itself, samples that Gurobi did not solve are NaN with ok = False instead of an error.

        Raises:
            InputError: q is not (B, n).
            InfeasibleError: the samples listed have no feasible point.
            UnboundedError: the samples listed are unbounded.
            SolverError: Gurobi failed otherwise, gave no licence, or has no multipliers.
            MissingDependencyError: gurobipy is not installed.
        """
        if q.dim() != 2 or q.shape[1] != self.n:
            raise InputError(f"q has shape {tuple(q.shape)}, expected (B, {self.n}).")
        gp = _gurobipy()
        model, x, equal, below, quadratic = self._model = self._model or self._build(gp)
        rows: list[tuple[Any, ...]] = []
        failed: dict[int, list[int]] = {}
        sizes = self.n, len(self.equalities[1]), len(self.quadratic[2]) + len(self.inequalities[1])
        for index, objective in enumerate(q.detach().double().cpu().numpy()):
            model.setObjective(objective @ x)
            try:
                model.optimize()
            except gp.GurobiError as error:
                raise _explained(error, self) from error
            if model.Status not in (gp.GRB.OPTIMAL, gp.GRB.SUBOPTIMAL):
                failed.setdefault(model.Status, []).append(index)
                rows.append((*([torch.nan] * size for size in sizes), 0))
                continue
            try:
                duals = (
                    [-constraint.QCPi for constraint in quadratic],
                    (-below.Pi).tolist() if below is not None else [],
                )
                nu = (-equal.Pi).tolist() if equal is not None else []
            except gp.GurobiError as error:
                raise SolverError(
                    f"Gurobi has no multipliers for sample {index} ({error}): its tolerances are too loose for them. "
                    f"Leave BarQCPConvTol and the others of `parameters` at the defaults, {PARAMETERS}."
                ) from error
            rows.append((x.X.tolist(), nu, [max(dual, 0.0) for dual in (*duals[0], *duals[1])], model.BarIterCount))
        _report(failed, gp)
        like: dict[str, Any] = {"dtype": torch.float64, "device": q.device}
        solutions, nus, lams, iterations = zip(*rows, strict=True) if rows else ((), (), (), ())
        B = len(q)
        x, nu, lam = (
            torch.tensor(part, **like).reshape(B, size)
            for part, size in zip((solutions, nus, lams), sizes, strict=True)
        )
        return Solution(
            x,
            nu,
            lam,
            torch.tensor(iterations, dtype=torch.long, device=q.device),
            x.isfinite().all(1),
            torch.full((B,), torch.nan, **like),
        )

    def _build(self, gp: Any) -> tuple[Any, ...]:
        model = _model(gp, self)
        x = model.addMVar(self.n, lb=-gp.GRB.INFINITY)
        A, b, G, h = (t.double().numpy() for t in (*self.equalities, *self.inequalities))
        equal = model.addConstr(A @ x == b) if len(b) else None
        below = model.addConstr(G @ x <= h) if len(h) else None
        quadratic = [
            model.addConstr(x @ (0.5 * Q.double().numpy()) @ x + r.double().numpy() @ x <= float(s))
            for Q, r, s in zip(*self.quadratic, strict=True)
        ]
        model.update()
        return model, x, equal, below, quadratic


class GlobalSolution(NamedTuple):
    """The result of a global solver, float64.

    Attributes:
        x: best point, (B, n).
        value: its objective, (B,).
        bound: number that no feasible point is below, (B,).
        timed_out: (B,) bool, whether the time limit stopped the search; x is then the best point so far.

    Examples:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> solution = foldopt.solvers.gurobi.GlobalSolution(one[:, None], one, one, one > 1)
        >>> solution.value - solution.bound
        tensor([0.], dtype=torch.float64)
    """

    x: Tensor
    value: Tensor
    bound: Tensor
    timed_out: Tensor


class GurobiNonconvexQP:
    """Minimize 0.5 x'Hx + q'x subject to Ax = b, 0 <= x <= 1 to global optimality with Gurobi, for a batch of q.

    Tensors are on the CPU.

    Args:
        H: (n, n), symmetric, of any signs.
        A: (p, n).
        b: (p,).
        time_limit: seconds per sample.
        parameters: Gurobi parameters, which override a relative gap of 1e-6, one thread and no output; default none.

    Examples:
        >>> H, A, b = -torch.eye(2), torch.zeros(0, 2), torch.zeros(0)
        >>> solver = foldopt.solvers.gurobi.GurobiNonconvexQP(H, A, b, time_limit=10)
        >>> solver(torch.zeros(1, 2)).value
        tensor([-1.], dtype=torch.float64)
    """

    def __init__(
        self, H: Tensor, A: Tensor, b: Tensor, time_limit: float, *, parameters: dict[str, Any] | None = None
    ) -> None:
        self.n = len(H)
        self.H, self.A, self.b = H, A, b
        own = {"NonConvex": 2, "MIPGap": 1e-6, "MIPGapAbs": 1e-9, "TimeLimit": time_limit}
        self.parameters = {**{k: v for k, v in PARAMETERS.items() if k != "QCPDual"}, **own, **(parameters or {})}
        self._model: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def __call__(self, q: Tensor) -> GlobalSolution:
        """Return the solutions for a batch of objectives.

        Args:
            q: (B, n).

        Returns:
            The solutions, on the device of q. Inside a layer, which certifies every sample itself, samples that Gurobi
            did not solve are NaN instead of an error.

        Raises:
            InputError: q is not (B, n).
            InfeasibleError: the samples listed have no feasible point.
            SolverError: Gurobi failed otherwise, found no point within the time limit, or gave no licence.
            MissingDependencyError: gurobipy is not installed.
        """
        if q.dim() != 2 or q.shape[1] != self.n:
            raise InputError(f"q has shape {tuple(q.shape)}, expected (B, {self.n}).")
        gp = _gurobipy()
        model, x, quadratic = self._model = self._model or self._build(gp)
        rows: list[tuple[Any, ...]] = []
        failed: dict[int, list[int]] = {}
        for index, linear in enumerate(q.detach().double().cpu().numpy()):
            model.setObjective(quadratic + linear @ x)
            model.reset()
            try:
                model.optimize()
            except gp.GurobiError as error:
                raise _explained(error, self) from error
            if model.SolCount == 0 or model.Status not in (gp.GRB.OPTIMAL, gp.GRB.SUBOPTIMAL, gp.GRB.TIME_LIMIT):
                failed.setdefault(model.Status, []).append(index)
                rows.append(([torch.nan] * self.n, torch.nan, torch.nan, model.Status == gp.GRB.TIME_LIMIT))
                continue
            rows.append((x.X.tolist(), model.ObjVal, model.ObjBound, model.Status == gp.GRB.TIME_LIMIT))
        _report(failed, gp)
        found, values, bounds, late = zip(*rows, strict=True) if rows else ((), (), (), ())
        like: dict[str, Any] = {"dtype": torch.float64, "device": q.device}
        return GlobalSolution(
            torch.tensor(found, **like).reshape(len(q), self.n),
            torch.tensor(values, **like),
            torch.tensor(bounds, **like),
            torch.tensor(late, dtype=torch.bool, device=q.device),
        )

    def _build(self, gp: Any) -> tuple[Any, ...]:
        model = _model(gp, self)
        x = model.addMVar(self.n, lb=0.0, ub=1.0)
        A, b, H = (t.double().numpy() for t in (self.A, self.b, self.H))
        if len(b):
            model.addConstr(A @ x == b)
        model.update()
        return model, x, x @ (0.5 * H) @ x


def _model(gp: Any, problem: GurobiQCQP | GurobiNonconvexQP) -> Any:
    """Return a new Gurobi model with the problem's parameters."""
    try:
        model = gp.Model(env=_environment(os.getpid()))
    except gp.GurobiError as error:
        raise _explained(error, problem) from error
    for name, value in problem.parameters.items():
        model.setParam(name, value)
    return model


@functools.cache
def _environment(process: int) -> Any:
    """Return the Gurobi environment of a process; all its models share one, because a licence may count environments.

    The licence is that of gurobi.lic, where Gurobi finds it, or that of LICENSE_VARIABLES.
    """
    named: dict[str, Any] = {
        LICENSE_VARIABLES[name]: value for name, value in os.environ.items() if name in LICENSE_VARIABLES
    }
    if "LicenseID" in named:
        if not named["LicenseID"].isdecimal():
            raise InputError(f"GRB_LICENSEID={named['LicenseID']!r}: expected a whole number.")
        named["LicenseID"] = int(named["LicenseID"])
    return _gurobipy().Env(params={"OutputFlag": 0, **named})


def _gurobipy() -> Any:
    """Return the package gurobipy, or raise MissingDependencyError."""
    try:
        import gurobipy
    except ImportError as error:
        raise MissingDependencyError(
            "gurobipy is not installed; install it with: pip install 'foldopt[gurobi]'"
        ) from error
    return gurobipy


def _explained(error: Exception, problem: GurobiQCQP | GurobiNonconvexQP) -> SolverError:
    """Return the error that says what an error of Gurobi means."""
    code = getattr(error, "errno", None)
    if code == SIZE_LIMIT:
        return SolverError(
            f"the Gurobi licence does not cover a model of {problem.n} variables (the pip licence: 2000, or 200 with "
            f"quadratic terms). {REMEDY}"
        )
    if code in NO_LICENSE:
        return SolverError(f"Gurobi gave no licence: {error} (code {code}). {REMEDY}")
    return SolverError(f"Gurobi cannot solve: {error} (code {code}).")


def _report(failed: dict[int, list[int]], gp: Any) -> None:
    """Raise the error of the samples that were not solved; inside a layer, only if someone interrupted Gurobi."""
    if failed and (gp.GRB.INTERRUPTED in failed or not nonfinite_allowed()):
        raise _failure(failed, gp)


def _failure(failed: dict[int, list[int]], gp: Any) -> SolverError:
    """Return the error of the samples that were not solved, grouped by status."""
    names = {getattr(gp.GRB.Status, name): name for name in dir(gp.GRB.Status) if name.isupper()}
    indices = sorted(index for group in failed.values() for index in group)
    what = ", ".join(f"{names.get(status, status)} at {group[:10]}" for status, group in failed.items())
    message = f"Gurobi did not solve {len(indices)} samples: {what}."
    kinds = set(failed)
    if gp.GRB.INTERRUPTED in kinds:
        return SolverError(message + " Someone stopped it; call again.", indices)
    if kinds <= {gp.GRB.INFEASIBLE}:
        return InfeasibleError(message + " The constraints admit no point; relax them.", indices)
    if kinds <= {gp.GRB.UNBOUNDED, gp.GRB.INF_OR_UNBD}:
        return UnboundedError(message + " Add bounds, or check the objective.", indices)
    return SolverError(message + " Rescale the problem or loosen parameters=.", indices)
