"""Derivatives of the solution of a quadratic program by differences, from a solver that is not foldopt's.

The solution is a piecewise affine function of p, b, h and of the bounds, so a one-sided difference is exact until the
active set changes, and below that step only the solver's error disturbs it. A difference counts where it does not
depend on the step; where there is no such range of steps it is not resolved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse as sp
import scipy.sparse.linalg as spl

from experiments.benchmark.collection import Arguments, Vector, typical

TOLERANCES = (1e-12, 1e-10, 1e-8)
STEPS: Vector = np.array([10.0 ** float(power) for power in np.arange(-1.5, -8.6, -0.5)], dtype=np.float64)
NOISE: Vector = np.array([1e-12, 2e-12, 3e-12, 4e-12, 5e-12])  # their distance from a line is the solver's error
RATIOS = (1.0, 1e2, 1e-2, 1e4, 1e-4, 1e6, 1e-6)  # of what a row carries to its slack, above which it is tried as active
WINDOW = 3  # steps in a row on which a difference has to be the same
CONTINUOUS = 1e-5  # what is less than this of the scale is no jump
AGREEMENT = 1e-4  # relative; what is larger than ten times that contradicts


def solve(args: Arguments) -> Vector | None:
    """Return the solution by piqp at a tolerance of 1e-12, sharpened; None where it is not found.

    Where piqp does not reach 1e-12, a looser one will do if the sharpened solution is good to 1e-10.
    """
    for tolerance in TOLERANCES:
        found = _piqp(args, tolerance)
        if not found.found or found.x is None:
            continue
        with np.errstate(all="ignore"):
            x, error = _sharpened(args, found)
        if tolerance == TOLERANCES[0] or error < 1e-10:
            return x
    return None


def _piqp(args: Arguments, tolerance: float) -> Any:
    import qpsolvers

    some = {
        "G": args.G.tocsc() if len(args.h) else None,
        "h": args.h if len(args.h) else None,
        "A": args.A.tocsc() if len(args.b) else None,
        "b": args.b if len(args.b) else None,
    }
    problem = qpsolvers.Problem(args.Q, args.p, **some, lb=args.lower, ub=args.upper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qpsolvers.solve_problem(problem, solver="piqp", eps_abs=tolerance, eps_rel=tolerance, max_iter=200)


@dataclass(frozen=True)
class _Rows:
    """All inequality rows of a program, and in which units an approximate solution is judged.

    terms: sums of the sizes of the terms of stationarity, one a variable. extent: of the terms of a row. part: what a
    multiplier of 1 is of the terms of stationarity, where it is the most.
    """

    matrix: sp.csr_matrix
    right: Vector
    terms: Vector
    extent: Vector
    part: Vector

    def error(self, args: Arguments, x: Vector, y: Vector, dual: Vector) -> float:
        """Return the largest relative violation of the optimality conditions."""
        stationary = (args.Q @ x + args.p + args.A.T @ y + self.matrix.T @ dual) / self.terms
        equal = (args.A @ x - args.b) / _extent(args.A, args.b, x)
        slack = (self.right - self.matrix @ x) / self.extent
        parts = (stationary, equal, np.minimum(slack, 0), np.minimum(dual, 0) * self.part, dual * self.part * slack)
        return max(float(np.abs(part).max(initial=0.0)) for part in parts)


def _rows(args: Arguments, x: Vector, y: Vector, z: Vector, box: Vector) -> tuple[_Rows, Vector]:
    """Return all inequality rows, G, lower, upper, and their multipliers; box: of the bounds, positive at upper."""
    eye = sp.identity(len(x), format="csr")
    lower, upper = np.isfinite(args.lower), np.isfinite(args.upper)
    rows = sp.csr_matrix(sp.vstack([args.G, -eye[lower], eye[upper]]))
    right = np.concatenate([args.h, -args.lower[lower], args.upper[upper]])
    dual = np.concatenate([z, np.maximum(-box[lower], 0), np.maximum(box[upper], 0)])
    terms = abs(args.Q) @ np.abs(x) + np.abs(args.p) + abs(args.A).T @ np.abs(y) + abs(rows).T @ np.abs(dual)
    terms = np.maximum(terms, 1e-9 * terms.max(initial=1e-300))
    part = (abs(rows) @ sp.diags(1 / terms)).max(axis=1).toarray().ravel() if len(right) else np.zeros(0)
    return _Rows(rows, right, terms, _extent(rows, right, x), part), dual


def _extent(rows: sp.csr_matrix, right: Vector, x: Vector) -> Vector:
    """Return the sums of the sizes of the terms of rows, at least that of one variable of the usual size."""
    size = abs(rows)
    usual = typical(x) * size.max(axis=1).toarray().ravel() if len(right) else np.zeros(0)
    return np.maximum(size @ np.abs(x) + np.abs(right) + usual, 1e-300)


def _sharpened(args: Arguments, found: Any) -> tuple[Vector, float]:
    """Return the solution with its active rows solved as equalities, where that is better, and its error.

    A row is active where its part of the terms of stationarity is above its slack, as a part of the terms of the row;
    where that is hard to tell, more or fewer rows are tried.
    """
    x, y, z = (np.zeros(0) if part is None else np.asarray(part) for part in (found.x, found.y, found.z))
    rows, dual = _rows(args, x, y, z, np.zeros(len(x)) if found.z_box is None else np.asarray(found.z_box))
    best, least = x, rows.error(args, x, y, dual)
    for ratio in RATIOS:
        active = ratio * dual * rows.part > (rows.right - rows.matrix @ x) / rows.extent
        start = np.concatenate([y, dual[active]])
        state = _on_equalities(args, rows.matrix[active], rows.right[active], x, start)
        if state is None:
            continue
        new, (moved, multipliers) = np.zeros(len(dual)), np.split(state, [len(x)])
        new[active] = multipliers[len(y) :]
        error = rows.error(args, moved, multipliers[: len(y)], new)
        if error < least:
            best, least = moved, error
        if least < 1e-14:
            break
    return best, least


def _on_equalities(args: Arguments, rows: sp.csr_matrix, right: Vector, x: Vector, y: Vector) -> Vector | None:
    """Return (x, multipliers) of the program with Ax = b and these rows as equalities, near the given ones."""
    kept = sp.vstack([args.A, rows], format="csr")
    m = kept.shape[0]
    system = sp.bmat([[args.Q, kept.T], [kept, None]], format="csc") if m else sp.csc_matrix(args.Q)
    target, state = np.concatenate([-args.p, args.b, right]), np.concatenate([x, y])
    shift = 1e-9 * np.concatenate([np.ones(len(x)), -np.ones(m)])
    size = 1 / np.sqrt(np.maximum(abs(system).max(axis=1).toarray().ravel(), 1e-300))
    scaled = sp.csc_matrix(sp.diags(size) @ system @ sp.diags(size) + sp.diags(shift))
    try:
        factors = spl.splu(scaled)
    except RuntimeError:  # singular
        return None
    for _ in range(10):
        state = state + size * factors.solve(size * (target - system @ state))
    return state


@dataclass(frozen=True)
class Difference:
    """The derivative of w'x along a direction, from the left and from the right, each with its uncertainty.

    kind: "smooth" (both sides agree), "kink" (they do not), "jump" (w'x is not continuous: the solution is not unique),
    "infeasible" (no solution on a side), or "unresolved".
    """

    kind: str
    left: float = np.nan
    right: float = np.nan
    uncertainty: float = np.nan

    @property
    def value(self) -> float:
        """The mean of both sides."""
        return 0.5 * (self.left + self.right)


def difference(
    args: Arguments,
    name: str,
    direction: Vector,
    weights: Vector,
    scale: float,
    solver: Callable[[Arguments], Vector | None] = solve,
) -> Difference:
    """Return the derivative of weights'x along `direction` of the argument `name`.

    scale: a derivative that is uncertain by less than `AGREEMENT` times this is resolved, however small it is.
    """

    def values(steps: Vector) -> Vector:
        found = (solver(replace(args, **{name: getattr(args, name) + step * direction})) for step in steps)
        return np.array([np.nan if x is None else float(weights @ x) for x in found])

    (here,) = values(np.zeros(1))
    sides = []
    for sign in (-1, 1):
        along, near = values(sign * STEPS), values(sign * NOISE)
        if np.isnan(here) or np.isnan(along[-WINDOW:]).all():
            return Difference("unresolved" if np.isnan(here) else "infeasible")
        slope, error, start = plateau(STEPS, along, here, float(np.abs(np.diff(near, 2)).max()), scale)
        sides.append((sign * slope, error, start))
    (left, left_error, left_start), (right, right_error, right_start) = sides
    error = left_error + right_error
    if np.isnan(error):
        return Difference("unresolved", left, right, error)
    if abs(left_start - right_start) > CONTINUOUS * scale:
        return Difference("jump", left, right, error)
    apart = abs(left - right) > 10 * error + 10 * AGREEMENT * max(abs(left), abs(right))
    return Difference("kink" if apart else "smooth", left, right, error)


def plateau(steps: Vector, values: Vector, here: float, noise: float, scale: float) -> tuple[float, float, float]:
    """Return the slope of `values` where several steps agree on it, its uncertainty, and the value at step 0.

    Of all such ranges it is that of the smallest steps which leads back to `here`, else that of the smallest; NaN where
    there is none. noise: error of the values.
    """
    slopes, ends = np.diff(values) / np.diff(steps), steps[1:]
    found = []
    for start in range(len(ends) - WINDOW, -1, -1):
        part = slopes[start : start + WINDOW]
        middle, error = float(part[0]), float(np.ptp(part)) + 3 * noise / float(ends[start])
        if error <= AGREEMENT * max(abs(middle), scale):
            found.append((middle, error, float(values[start + 1] - middle * ends[start])))
            if abs(found[-1][2] - here) <= CONTINUOUS * scale:
                return found[-1]
    return found[0] if found else (np.nan, np.nan, np.nan)


def gap(args: Arguments, weights: Vector, unit: float) -> float:
    """Return how much weights'x differs over the solutions: 0 where the solution is unique along `weights`.

    A cost of -+t weights, added to the objective, picks the largest and the smallest value, however small t is. NaN
    where the difference between them neither stays as t falls nor falls below 1e-6 of |weights|'|x|, and inf where
    weights'x has no largest or no smallest value. unit: of t.
    """
    if _recedes(args, weights):
        return float("inf")
    found, reach = [], 0.0
    for step in 10.0 ** np.arange(-2.0, -9.5, -1.0):
        ends = [solve(replace(args, p=args.p + sign * step * unit * weights)) for sign in (-1, 1)]
        if ends[0] is not None and ends[1] is not None:
            found.append(float(weights @ (ends[0] - ends[1])))
            reach = float(np.abs(weights) @ np.abs(ends[0]))
    if len(found) < WINDOW:
        return float("nan")
    if found[-1] <= 1e-6 * reach:
        return 0.0
    return found[-1] if found[-1] >= 0.5 * found[-WINDOW] else float("nan")


def _recedes(args: Arguments, weights: Vector) -> bool:
    """Return whether weights'x changes along a ray of solutions, by a linear program over all rays with |d| <= 1."""
    still = sp.vstack([args.Q, args.A], format="csr")
    scale = 1 / np.maximum(abs(still).max(axis=1).toarray().ravel(), 1e-300)
    cost = args.p / max(float(np.abs(args.p).max(initial=0.0)), 1e-300)
    bounds = np.stack([np.where(np.isfinite(args.lower), 0.0, -1.0), np.where(np.isfinite(args.upper), 0.0, 1.0)], 1)
    rows = sp.vstack([args.G, sp.csr_matrix(cost)], format="csr")
    for sign in (1, -1):
        ray = scipy.optimize.linprog(
            sign * weights,
            A_ub=rows,
            b_ub=np.zeros(rows.shape[0]),
            A_eq=sp.diags(scale) @ still,
            b_eq=np.zeros(still.shape[0]),
            bounds=bounds,
            options={"primal_feasibility_tolerance": 1e-10},
        )
        if ray.status == 0 and -ray.fun > 1e-6 * float(np.abs(weights).max()):
            return True
    return False


def judge(predicted: float, truth: Difference, extent: float) -> str:
    """Return what differences say of a derivative: "confirmed", "contradicted" or "unresolved".

    extent: size of the terms that were summed, of which errors of 1e-9 are taken for rounding.
    """
    if truth.kind == "unresolved":
        return "unresolved"
    if truth.kind != "smooth":
        return "contradicted"
    wrong = abs(predicted - truth.value)
    size = max(abs(predicted), abs(truth.value), 1e-6 * extent)
    if not wrong <= 10 * truth.uncertainty + 10 * AGREEMENT * size:
        return "contradicted"
    return "confirmed" if wrong <= 3 * truth.uncertainty + AGREEMENT * size else "unresolved"
