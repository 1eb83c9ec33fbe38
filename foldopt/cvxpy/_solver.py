"""Solvers that CVXPY knows, applied to the canonical form one sample after the other."""

from __future__ import annotations

from typing import Any

import clarabel
import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.reductions.solvers import defines
from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL, dims_to_solver_cones
from cvxpy.reductions.solvers.solver import Solver
from cvxpy.utilities.psd_utils import TriangleKind
from torch import Tensor

from foldopt._conic.form import Data
from foldopt.cvxpy._canonical import Canonical
from foldopt.errors import InputError

SOLVED, INFEASIBLE, UNBOUNDED, NONCONVEX, FAILED = "solved", "infeasible", "unbounded", "nonconvex", "limit reached"
_STATUS = {
    cp.OPTIMAL: SOLVED,
    cp.OPTIMAL_INACCURATE: SOLVED,  # whether it is a solution is measured afterwards
    cp.INFEASIBLE: INFEASIBLE,
    cp.INFEASIBLE_INACCURATE: INFEASIBLE,
    cp.UNBOUNDED: UNBOUNDED,
    cp.UNBOUNDED_INACCURATE: UNBOUNDED,
}
_TIGHT: dict[str, dict[str, Any]] = {
    "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000},
    "OSQP": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000},
}


class ConeSolver:
    """A solver that CVXPY knows, chosen by its name; calling it solves the programs of a batch one after the other.

    options: passed to the solver; they replace the tight tolerances that SCS and OSQP get otherwise. Raises InputError
    if the solver is not installed or does not support the cones of the problem.
    """

    def __init__(self, canonical: Canonical, name: str, options: dict[str, Any]) -> None:
        self.made_of = canonical, name, options
        self.pattern, self.program, self.name = canonical.pattern, canonical.program, name
        conic, quadratic = dict(defines.SOLVER_MAP_CONIC), dict(defines.SOLVER_MAP_QP)
        known = conic | quadratic if self.pattern.linear else conic
        installed = sorted(set(known) & set(cp.installed_solvers()))
        if name not in installed:
            raise InputError(
                f"solver={name!r} is not installed or does not support the cones {self._cones()}; choose one of "
                f"{installed}."
            )
        self.is_qp = name in quadratic and self.pattern.linear
        self.interface = type(known[name])()
        self.options = _TIGHT.get(name, {}) | options
        self.order = np.arange(self.pattern.m)
        if not self.is_qp:
            self._require_conic()
        constraints = self.program.constraints
        equalities = [c for c in constraints if isinstance(c, cp.constraints.Zero)]
        self.ids = [c.id for c in constraints]
        self.dims = self.program.cone_dims
        self.inverse = {
            Solver.EQ_CONSTR: equalities,
            Solver.NEQ_CONSTR: [c for c in constraints if c not in equalities],
            "dims": self.dims,
            self.interface.VAR_ID: self.program.x.id,
            "offset": 0.0,
            "IS_MIP": False,
            "is_mip": False,
            "is_LP": not len(self.pattern.P_rows),
        }

    def __reduce__(self) -> Any:
        return ConeSolver, self.made_of  # CVXPY's constraints get new ids when they are copied, so they are not pickled

    def __call__(self, data: Data, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
        """Return x (B, n) and y (B, m), NaN in samples without a solution, and a status for each sample."""
        x, y = torch.full_like(data.q, torch.nan), torch.full_like(data.b, torch.nan)
        status = []
        for i in range(len(data.q)):
            found_x, found_y, outcome = self.solve(*(part[i].numpy() for part in data))
            status.append(outcome)
            if found_x is not None and found_y is not None:
                x[i], y[i] = torch.from_numpy(found_x), torch.from_numpy(found_y)
        return x, y, status

    def solve(self, P: Any, q: Any, A: Any, b: Any) -> tuple[Any, Any, str]:
        """Solve one program; return x and y, or None for both, and the status."""
        if not all(np.isfinite(part).all() for part in (P, q, A, b)):
            return None, None, "not finite"
        try:
            return self._solved(P, q, A, b)
        except Exception as error:  # any kind of error; it must not affect the other samples
            return None, None, f"{self.name} raised {type(error).__name__}: {error}"

    def _solved(self, P: Any, q: Any, A: Any, b: Any) -> tuple[Any, Any, str]:
        solution = self._by_cvxpy(*self._matrices(P, A), q, b)
        outcome = _STATUS.get(solution.status, FAILED)
        if outcome != SOLVED or not solution.primal_vars:
            return None, None, outcome
        x = np.asarray(next(iter(solution.primal_vars.values())), dtype=float)
        parts = [np.atleast_1d(solution.dual_vars[i]).ravel(order="F") for i in self.ids]
        y = np.zeros(self.pattern.m)
        y[self.order] = np.concatenate(parts) if parts else np.zeros(0)
        return x, y, outcome

    def _by_cvxpy(self, P: Any, A: Any, q: Any, b: Any) -> Any:
        k, m = self.pattern.cones["zero"], self.pattern.m
        data: dict[str, Any] = {"dims": self.dims, "bool_vars_idx": [], "int_vars_idx": []}
        data |= {"lower_bounds": None, "upper_bounds": None, "dir_cones": []}
        if self.is_qp:
            rows = A.tocsr()
            data |= {"P": P, "q": q, "A": rows[:k].tocsc(), "b": b[:k], "F": rows[k:].tocsc(), "G": b[k:]}
            data |= {"n_var": len(q), "n_eq": k, "n_ineq": m - k}
        else:
            data |= {"c": q, "A": A, "b": b, "param_prob": self.program}
            if len(self.pattern.P_rows):
                data["P"] = P
        raw = self.interface.solve_via_data(data, False, False, dict(self.options), {})
        return self.interface.invert(raw, self.inverse)

    def _matrices(self, P: Any, A: Any) -> tuple[Any, Any]:
        p = self.pattern
        found = sp.csc_array((A, p.A_rows, p.A_ptr), (p.m, p.n))
        if (self.order != np.arange(p.m)).any():
            found = found[self.order].tocsc()
        return sp.csc_array((P, p.P_rows, p.P_ptr), (p.n, p.n)), found

    def _require_conic(self) -> None:
        """Raise InputError unless the solver supports the cones, with rows in our order or a permutation of it."""
        if len(self.pattern.P_rows) and not self.interface.supports_quad_obj():
            raise InputError(
                f"solver={self.name!r} does not support quadratic objectives; pass quadratic=False, or another solver."
            )
        unknown = {type(c) for c in self.program.constraints} - set(self.interface.SUPPORTED_CONSTRAINTS)
        if unknown:
            raise InputError(
                f"solver={self.name!r} does not support {', '.join(sorted(kind.__name__ for kind in unknown))} "
                "constraints; choose another solver."
            )
        if self.pattern.cones["exp"] and self.interface.EXP_CONE_ORDER != [0, 1, 2]:
            raise InputError(
                f"solver={self.name!r} orders the rows of exponential cones differently; choose another solver."
            )

        if self.pattern.cones["psd"]:
            if not self.interface.PSD_SQRT2_SCALING:
                raise InputError(f"solver={self.name!r} scales semidefinite cones differently; choose another solver.")
            if self.interface.PSD_TRIANGLE_KIND == TriangleKind.LOWER:
                self.order = _lower_triangles(self.pattern.cones, self.pattern.m)

    def _cones(self) -> str:
        return ", ".join(kind for kind, size in self.pattern.cones.items() if size)


class Clarabel(ConeSolver):
    """Clarabel, called directly: one solver is made, and its data are replaced from sample to sample."""

    def __init__(self, canonical: Canonical, name: str, options: dict[str, Any]) -> None:
        super().__init__(canonical, name, options)
        self.settings = clarabel.DefaultSettings()
        self.settings.verbose, self.settings.max_threads = False, 1
        self.settings.presolve_enable = self.settings.chordal_decomposition_enable = False
        self.settings.input_sparse_dropzeros = False
        for key, value in options.items():
            try:
                setattr(self.settings, key, value)
            except (AttributeError, TypeError) as error:
                raise InputError(
                    f"options={{{key!r}: {value!r}}}: Clarabel has no such setting; see clarabel.DefaultSettings."
                ) from error
        p = self.pattern
        columns = np.repeat(np.arange(p.n), np.diff(p.P_ptr))
        self.upper = p.P_rows <= columns
        self.P_rows = p.P_rows[self.upper]
        self.P_ptr = np.searchsorted(columns[self.upper], np.arange(p.n + 1))
        self.kept: Any = None

    def __reduce__(self) -> Any:
        return Clarabel, self.made_of

    def _solved(self, P: Any, q: Any, A: Any, b: Any) -> tuple[Any, Any, str]:
        p = self.pattern
        if self.kept is None:
            upper = sp.csc_array((P[self.upper], self.P_rows, self.P_ptr), (p.n, p.n))
            rows = sp.csc_array((A, p.A_rows, p.A_ptr), (p.m, p.n))
            self.kept = clarabel.DefaultSolver(upper, q, rows, b, dims_to_solver_cones(self.dims), self.settings)
        else:
            self.kept.update(P=P[self.upper], q=q, A=A, b=b)
        found = self.kept.solve()
        outcome = _STATUS.get(CLARABEL.STATUS_MAP.get(str(found.status), ""), FAILED)
        return (np.array(found.x), np.array(found.z), outcome) if outcome == SOLVED else (None, None, outcome)


def _lower_triangles(cones: dict[str, Any], m: int) -> Any:
    """Return the order of rows (m,) that turns upper triangles by columns into lower triangles by columns."""
    order = np.arange(m)
    at = cones["zero"] + cones["nonneg"] + sum(cones["soc"])
    for n in cones["psd"]:
        columns, rows = np.triu_indices(n)
        size = len(rows)
        order[at : at + size] = at + rows * (rows + 1) // 2 + columns
        at += size
    return order
