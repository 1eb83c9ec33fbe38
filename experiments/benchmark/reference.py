"""A solver of quadratic programs that is independent of foldopt: piqp or Clarabel, with active rows as equalities.

Its solutions are checked by the optimality conditions, relative to the terms of each row and variable.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl
from numpy.typing import NDArray

from experiments.benchmark.collection import Arguments, Vector, typical

if TYPE_CHECKING:
    import qpsolvers

PIQP = tuple({"solver": "piqp", "eps_abs": size, "eps_rel": size, "max_iter": 200} for size in (1e-12, 1e-10, 1e-8))
CLARABEL = {
    **{"solver": "clarabel", "tol_feas": 1e-10, "tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "max_iter": 500},
    **{
        "static_regularization_constant": 1e-12,
        "static_regularization_proportional": 0.0,
    },  # its default regularization limits the accuracy to 1e-8
}
RATIOS = (1.0, 1e2, 1e-2, 1e4, 1e-4, 1e6, 1e-6)  # a row is active if ratio * weight > slack; tried in this order
EXACT = 1e-14  # relative violation of the optimality conditions that is rounding
FOLLOWED = 1e-15  # largest violation of a solution on a known active set
GOOD = 1e-10  # largest violation of a solution if piqp does not reach 1e-12
KNOWN = 6  # most active sets that are kept
SHIFT = 1e-9  # shift of the diagonal of the scaled system; iterative refinement removes its effect


class Reference:
    """Solves programs with the matrices of `args` and other p, b, h and finite bounds.

    Factored active sets are kept. If the solution on one of them satisfies the optimality conditions to `FOLLOWED`, it
    is returned without a call of piqp, so that programs close to each other share a factorization. The same bounds must
    be infinite as in `args`.
    """

    def __init__(self, args: Arguments) -> None:
        eye = sp.identity(len(args.p), format="csr")
        self.lower, self.upper = np.isfinite(args.lower), np.isfinite(args.upper)
        self.Q, self.A = args.Q, args.A
        self.rows = sp.csr_matrix(sp.vstack([args.G, -eye[self.lower], eye[self.upper]]))
        self.sizes = abs(self.Q), abs(self.A), abs(self.rows)
        self.known: list[_ActiveSet] = []

    def __call__(self, args: Arguments) -> Vector | None:
        """Return the solution, (n,), or None if none is found.

        If piqp does not reach 1e-12, its looser tolerances are tried, and then Clarabel unless piqp has reported that
        there is no solution. Their result counts if the solution on its active rows is accurate to 1e-10.
        """
        with np.errstate(all="ignore"):
            for active in self.known:
                x, error = self._on(active, args, active.state)
                if error <= FOLLOWED:
                    return x
            none = False
            for settings in (*PIQP, CLARABEL):
                if none and settings is CLARABEL:
                    break
                found = solved(args, settings)
                none |= "INFEASIBLE" in str(getattr(found.extras.get("info"), "status", ""))
                if not found.found or found.x is None:
                    continue
                x, error = self._sharpened(args, found)
                if settings is PIQP[0] or error < GOOD:
                    return x
        return None

    def gradient(self, weights: Vector) -> Vector:
        """Return the derivative of weights'x with respect to p at the last solution, on its active set.

        It is exact if every active inequality has a positive multiplier.

        Raises:
            ValueError: No solution has been accurate to rounding.
        """
        if not self.known:
            raise ValueError("gradient needs a solution whose optimality conditions hold to rounding; there is none.")
        active = self.known[0]
        target = np.concatenate([weights, np.zeros(len(active.state) - len(weights))])
        return -active.solve(target, np.zeros(len(target)))[: len(weights)]

    def _sharpened(self, args: Arguments, found: qpsolvers.Solution) -> tuple[Vector, float]:
        """Solve the active rows as equalities; return the better of this solution and the given one, and its error.

        A row is active if its relative multiplier exceeds its relative slack, see `_conditions`. More and fewer rows
        are tried until the error is rounding.
        """
        x, y, z = (np.zeros(0) if part is None else np.asarray(part) for part in (found.x, found.y, found.z))
        box = np.zeros(len(x)) if found.z_box is None else np.asarray(found.z_box)  # positive at upper bounds
        dual = np.concatenate([z, np.maximum(-box[self.lower], 0), np.maximum(box[self.upper], 0)])
        weight, slack, least = self._conditions(args, x, y, dual)
        best = x
        for ratio in RATIOS:
            mask = ratio * weight > slack
            active = _ActiveSet.of(self.Q, sp.vstack([self.A, self.rows[mask]], format="csr"), mask)
            if active is None:
                continue
            moved, error = self._on(active, args, np.concatenate([x, y, dual[mask]]))
            if error < least:
                best, least = moved, error
            if least < EXACT:
                break
        return best, least

    def _on(self, active: _ActiveSet, args: Arguments, start: Vector) -> tuple[Vector, float]:
        """Return the solution on an active set and its error; keep the set if the error is small."""
        right = self._right(args)
        state = active.solve(np.concatenate([-args.p, args.b, right[active.mask]]), start)
        x, y, dual = state[: len(args.p)], state[len(args.p) :][: len(args.b)], np.zeros(len(right))
        dual[active.mask] = state[len(x) + len(y) :]
        error = self._conditions(args, x, y, dual)[2]
        if error <= FOLLOWED:
            active.state = state
            self.known = [active, *(other for other in self.known if other is not active)][:KNOWN]
        return x, error

    def _right(self, args: Arguments) -> Vector:
        return np.concatenate([args.h, -args.lower[self.lower], args.upper[self.upper]])

    def _conditions(self, args: Arguments, x: Vector, y: Vector, dual: Vector) -> tuple[Vector, Vector, float]:
        """Return the relative multiplier and slack of each inequality, and the largest violation of all conditions.

        Multipliers are relative to the terms of stationarity to which they contribute, slacks to those of their row.
        """
        size_Q, size_A, size_rows = self.sizes
        right = self._right(args)
        terms = size_Q @ np.abs(x) + np.abs(args.p) + size_A.T @ np.abs(y) + size_rows.T @ np.abs(dual)
        terms = np.maximum(terms, 1e-9 * terms.max(initial=1e-300))
        part = (size_rows @ sp.diags(1 / terms)).max(axis=1).toarray().ravel() if len(right) else np.zeros(0)
        weight = dual * part
        slack = (right - self.rows @ x) / _extent(size_rows, right, x)
        stationary = (self.Q @ x + args.p + self.A.T @ y + self.rows.T @ dual) / terms
        equal = (self.A @ x - args.b) / _extent(size_A, args.b, x)
        parts = (stationary, equal, np.minimum(slack, 0), np.minimum(weight, 0), weight * slack)
        worst = max(float(np.abs(part).max(initial=0.0)) for part in parts)
        return weight, slack, worst if np.isfinite(worst) else np.inf


def solved(args: Arguments, settings: Mapping[str, Any]) -> qpsolvers.Solution:
    """Solve by a solver of qpsolvers."""
    import qpsolvers

    rows = {"G": args.G.tocsc(), "h": args.h} if len(args.h) else {}
    equal = {"A": args.A.tocsc(), "b": args.b} if len(args.b) else {}
    problem = qpsolvers.Problem(args.Q, args.p, **rows, **equal, lb=args.lower, ub=args.upper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qpsolvers.solve_problem(problem, **settings)


def _extent(size: sp.csr_matrix, right: Vector, x: Vector) -> Vector:
    """Return the sum of the sizes of each row's terms, at least that of one variable of typical size."""
    usual = typical(x) * size.max(axis=1).toarray().ravel() if len(right) else np.zeros(0)
    return np.maximum(size @ np.abs(x) + np.abs(right) + usual, 1e-300)


@dataclass
class _ActiveSet:
    """The factored optimality conditions with some inequalities as equalities.

    Attributes:
        mask: Which inequalities are equalities.
        system: The matrix of the conditions.
        size: The scale of its rows and columns.
        factors: The factorization of the scaled and shifted matrix.
        state: The last solution (x, multipliers), from which the next one starts.
    """

    mask: NDArray[np.bool_]
    system: sp.csc_matrix
    size: Vector
    factors: spl.SuperLU
    state: Vector

    @classmethod
    def of(cls, Q: sp.csc_matrix, kept: sp.csr_matrix, mask: NDArray[np.bool_]) -> _ActiveSet | None:
        """Factor the conditions with the rows `kept` as equalities; None if they are singular."""
        m, n = kept.shape
        system = sp.bmat([[Q, kept.T], [kept, None]], format="csc") if m else sp.csc_matrix(Q)
        size = 1 / np.sqrt(np.maximum(abs(system).max(axis=1).toarray().ravel(), 1e-300))
        shift = SHIFT * np.concatenate([np.ones(n), -np.ones(m)])
        scaled = sp.csc_matrix(sp.diags(size) @ system @ sp.diags(size) + sp.diags(shift))
        try:
            return cls(mask, system, size, spl.splu(scaled), np.zeros(n + m))
        except RuntimeError:  # singular
            return None

    def solve(self, target: Vector, start: Vector) -> Vector:
        """Solve the system for the right-hand side `target` by iterative refinement from `start`."""
        state = start
        for _ in range(10):
            state = state + self.size * self.factors.solve(self.size * (target - self.system @ state))
        return state
