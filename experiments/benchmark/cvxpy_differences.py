"""Derivatives of a CVXPY problem by extrapolated differences of accurate solutions, without foldopt."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import cvxpy as cp
import numpy as np

from experiments.benchmark.cvxpy_kinds import Kind

TOLERANCES = 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9  # tried in this order until the solver reaches one


def solution(kind: Kind, values: list[np.ndarray]) -> list[np.ndarray]:
    """Return the values of the variables for values of the parameters, as accurately as a solver can.

    Quadratic programs are solved by Clarabel and others by SCS: the error of an interior point's solution is as large
    as the square root of the error of its objective.
    """
    for parameter, value in zip(kind.parameters, values, strict=True):
        parameter.value = value
    interior = not kind.gp and kind.problem.is_qp()
    for tol in TOLERANCES:
        names = ("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_ktratio") if interior else ("eps_abs", "eps_rel")
        options: dict[str, Any] = dict.fromkeys(names, tol) | ({} if interior else {"max_iters": 20_000})
        with warnings.catch_warnings(), contextlib.suppress(cp.SolverError):
            warnings.simplefilter("ignore")
            kind.problem.solve(solver="CLARABEL" if interior else "SCS", gp=kind.gp, **options)
            if kind.problem.status == cp.OPTIMAL:
                return [np.array(variable.value) for variable in kind.variables]
    raise RuntimeError(f"no solver finds a solution of {kind.problem}.")


def directions(kind: Kind, seed: int = 0) -> list[np.ndarray]:
    """Return one random direction for each parameter, symmetric or diagonal where the parameter is."""
    draw = np.random.default_rng(seed)
    found = []
    for parameter, value in zip(kind.parameters, kind.values, strict=True):
        D = draw.normal(size=value.shape)
        if parameter.attributes["symmetric"] or parameter.attributes["PSD"]:
            D = (D + D.T) / 2
        if parameter.attributes["diag"]:
            D = np.diag(np.diag(D))
        found.append(D)
    return found


def weights(kind: Kind) -> list[np.ndarray]:
    """Return the weights of the variables in the weighted sum that is differentiated."""
    return [np.cos(1 + np.arange(v.size)).reshape(v.shape) for v in kind.variables]


def slopes(kind: Kind, step: float = 2e-3) -> list[tuple[float, float]]:
    """Return the derivative of the weighted sum of the variables along each parameter's direction, and its error.

    Central differences at three steps are extrapolated twice (Richardson); the error is the change by the second
    extrapolation.
    """
    found = []
    for number, D in enumerate(directions(kind)):

        def difference(h: float, number: int = number, D: np.ndarray = D) -> float:
            ends = []
            for sign in (1, -1):
                values = [v + sign * h * D if i == number else v for i, v in enumerate(kind.values)]
                parts = zip(solution(kind, values), weights(kind), strict=True)
                ends.append(sum(float((x * w).sum()) for x, w in parts))
            return (ends[0] - ends[1]) / (2 * h)

        first, second, third = (difference(step / 2**k) for k in range(3))
        once = (4 * second - first) / 3, (4 * third - second) / 3
        best = (16 * once[1] - once[0]) / 15
        found.append((best, abs(best - once[1])))
    return found
