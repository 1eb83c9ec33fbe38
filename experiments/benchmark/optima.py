"""Check of the published optima of the collection by piqp and Clarabel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.benchmark.collection import arguments, read
from experiments.benchmark.reference import CLARABEL, PIQP, solved

LOOSER = {"tol_feas": 1e-9, "tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "equilibrate_enable": False}
SETTINGS = {"piqp": PIQP[1:], "Clarabel": (CLARABEL, CLARABEL | LOOSER)}
AGREED, OFF = 1e-8, 1e-6  # relative: largest difference of solvers that agree, smallest error of a misprint


def recomputed(folder: Path, name: str) -> dict[str, float]:
    """Return the optimum of the problem `name` by each solver, NaN if it does not reach its tolerance."""
    problem = read(folder, name)
    args = arguments(problem)
    values = {}
    for solver, settings in SETTINGS.items():
        answers = (solved(args, each) for each in settings)
        values[solver] = next((problem.objective(one.x) for one in answers if one.found and one.x is not None), np.nan)
    return values


def corrected(published: float, found: Mapping[str, float]) -> float:
    """Return the published optimum, or that of the solvers if they agree on another one."""
    values = list(found.values())
    if not values:
        return published
    size = max(1.0, abs(values[0]))
    agree = np.ptp(values) <= AGREED * size
    return values[0] if agree and abs(published - values[0]) > OFF * size else published
