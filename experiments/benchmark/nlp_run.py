"""Puts NLPLayer and general solvers to S2MPJ's problems from the same starts, each in a process with a time limit."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import Bounds, NonlinearConstraint, minimize
from torch import Tensor

import foldopt
from experiments.benchmark import nlp_truth, s2mpj
from experiments.benchmark.apart import in_turn
from experiments.benchmark.nlp_truth import Vector
from experiments.benchmark.s2mpj import Problem
from foldopt.errors import DegenerateError
from foldopt.solvers.ipopt import solve_ipopt
from foldopt.updates.programs import SmoothProgram

LIMIT = 300.0  # seconds for one solver on one problem
LARGEST = 100  # variables
PEERS = "slsqp", "trust-constr", "ipopt"
STEP = 1e-5  # by which differences move x, relative to 1 + |x|
SAME = 1e-4  # relative difference of objectives that are the same
FEASIBLE = 1e-5  # violation relative to 1 + |x|
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """What NLPLayer did with a problem.

    status: of the layer; what follows `published` is known only where it is solved. objective, violation: at x, the
    latter relative to 1 + |x|. published: the optima that the file states, in a text. kind: what x is (`nlp_truth`).
    verdict: of the derivative of a random combination of x with respect to tilt and shift: "given", or the name of the
    error that refused it. error: of that derivative against the KKT system in NumPy, relative. difference: against
    central differences along a random direction, relative.
    """

    problem: str
    n: int
    m: int
    status: str
    objective: float = float("nan")
    violation: float = float("nan")
    published: str = ""
    reached: bool = False
    kind: str = ""
    verdict: str = ""
    error: float = float("nan")
    difference: float = float("nan")
    seconds: float = float("nan")


def solved(name: str, limit: float = LIMIT) -> Finding:
    """Solve and differentiate the problem `name` by `foldopt.NLPLayer`, and compare."""
    warnings.simplefilter("ignore")
    problem = s2mpj.read(name)
    generator = np.random.default_rng(0)
    weight, along = generator.standard_normal(problem.n), [generator.standard_normal(k) for k in (problem.n, problem.m)]
    params = [torch.zeros(1, k, dtype=torch.float64, requires_grad=True) for k in (problem.n, problem.m)]
    published = " or ".join(f"{value:.9g}" for value in problem.optima)
    layer = _layer(problem, torch.from_numpy(problem.x0), limit)
    before = time.perf_counter()
    x = layer(*params)
    at, status = x.detach().numpy()[0], layer.last.status[0] if layer.last else ""
    f, violation = measured(problem, at)
    if status != "solved":
        seconds = time.perf_counter() - before
        return Finding(name, problem.n, problem.m, status, f, violation, published, seconds=seconds)
    try:
        gradient = [
            g.numpy()[0]
            for g in torch.autograd.grad((x[0] * torch.from_numpy(weight)).sum(), params, materialize_grads=True)
        ]
        verdict = "given"
    except DegenerateError as error:
        gradient, verdict = [], type(error).__name__
    seconds = time.perf_counter() - before
    truth = nlp_truth.examined(problem, at, weight, (along[0], along[1]))
    found = Finding(
        *(name, problem.n, problem.m, "solved", f, violation, published, reached(problem, f), truth.kind, verdict),
        seconds=seconds,
    )
    if verdict != "given" or truth.kind != nlp_truth.REGULAR:
        return found
    exact = np.concatenate([truth.tilt, truth.shift])
    error_ = float(np.abs(np.concatenate(gradient) - exact).max() / max(np.abs(exact).max(), 1e-300))
    slope = sum(float(g @ d) for g, d in zip(gradient, along, strict=True))
    difference = _differenced(problem, at, weight, along, truth.moved, slope, limit)
    return Finding(**{**asdict(found), "error": error_, "difference": difference})


def _layer(problem: Problem, start: Tensor, limit: float) -> foldopt.NLPLayer:
    return foldopt.NLPLayer(**problem.functions(), start=start, time_limit=limit, on_failure="nan")


def _differenced(
    problem: Problem, x: Vector, weight: Vector, along: Sequence[Vector], moved: float, slope: float, limit: float
) -> float:
    """Return the relative error of `slope` against a central difference from x; NaN where an end is not solved."""
    size = 1 + float(np.abs(x).max())
    step = STEP * size / max(moved, 1e-2 * size)
    layer, ends = _layer(problem, torch.from_numpy(x), limit), []
    for sign in (1, -1):
        end = layer(*(torch.from_numpy(sign * step * d)[None] for d in along)).numpy()[0]
        if layer.last is None or not layer.last.solved.all():
            return float("nan")
        ends.append(end)
    expected = float(weight @ (ends[0] - ends[1])) / (2 * step)
    return float(abs(slope - expected) / max(abs(expected), float(np.linalg.norm(weight)) * max(moved, 1e-6 * size)))


def measured(problem: Problem, x: Vector) -> tuple[float, float]:
    """Return the objective at x and the worst violation of constraints and bounds, relative to 1 + |x|."""
    rows = problem.rows(x)[0] if problem.m else np.zeros(0)
    outside = [problem.lower - x, x - problem.upper, problem.below - rows, rows - problem.above]
    return problem.cost(x)[0], float(np.concatenate(outside).max(initial=0.0)) / (1 + float(np.abs(x).max()))


def reached(problem: Problem, objective: float) -> bool:
    """Return whether the objective is one of the optima that the file states."""
    return any(abs(objective - value) <= SAME * max(1, abs(value)) for value in problem.optima)


@dataclass(frozen=True)
class Rival:
    """What a general solver found: the objective at its answer, its violation, and how long it took."""

    objective: float
    violation: float
    seconds: float


def rival(name: str, solver: str) -> Rival:
    """Solve the problem `name` by SciPy's "slsqp" or "trust-constr" or by "ipopt", with exact derivatives."""
    warnings.simplefilter("ignore")
    problem = s2mpj.read(name)
    before = time.perf_counter()
    if solver == "ipopt":
        functions = problem.functions()
        program = SmoothProgram(*(functions[k] for k in ("objective", "equalities", "inequalities", "lower", "upper")))
        zeros = [torch.zeros(1, k, dtype=torch.float64) for k in (problem.n, problem.m)]
        x = solve_ipopt(program, torch.from_numpy(problem.x0)[None], *zeros).x.numpy()[0]
    else:
        x = _by_scipy(problem, solver)
    return Rival(*measured(problem, x), time.perf_counter() - before)


def _by_scipy(problem: Problem, method: str) -> Vector:
    constraints: list[Any] = []
    if problem.m:
        constraints.append(
            NonlinearConstraint(
                lambda x: problem.rows(x)[0],
                problem.below,
                problem.above,
                jac=lambda x: problem.rows(x)[1],
                hess=lambda x, y: problem.constraint_functions.hessian(x, y),
            )
        )
    exact = {"hess": lambda x: problem.cost(x)[2]} if method == "trust-constr" else {}
    options = {"maxiter": 1000} if method == "trust-constr" else {"maxiter": 500, "ftol": 1e-12}
    found = minimize(
        lambda x: problem.cost(x)[0],
        problem.x0,
        jac=lambda x: problem.cost(x)[1],
        bounds=Bounds(problem.lower, problem.upper),
        constraints=constraints,
        method=method,
        options=options,
        **exact,
    )
    answer: Vector = np.asarray(found.x, dtype=float)
    return answer


def small(names: Sequence[str], say: Say) -> list[str]:
    """Return the problems of at most `LARGEST` variables with their default parameters."""
    sizes = in_turn(_variables, [(name,) for name in names], LIMIT)
    kept = []
    for name, (n, reason) in zip(names, sizes, strict=True):
        if n is None:
            say(f"{name}: left out, {reason}")
        elif n <= LARGEST:
            kept.append(name)
    return kept


def _variables(name: str) -> int:
    return s2mpj.read(name).n


def examined(names: Sequence[str], say: Say) -> pd.DataFrame:
    """Return the findings of all problems, one row each, with the objective and violation of each peer."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (found, reason) in zip(names, in_turn(solved, [(name,) for name in names], 4 * LIMIT), strict=True):
        seen = found or Finding(name, 0, 0, reason)
        rows[name] = asdict(seen)
        say(f"{name}: {seen.status}, {seen.kind}, {seen.verdict}, error {seen.error:.1e}, {seen.difference:.1e}")
    for peer in PEERS:
        if peer == "ipopt" and importlib.util.find_spec("cyipopt") is None:
            say("ipopt: cyipopt is not installed")
            continue
        answers = in_turn(rival, [(name, peer) for name in names], LIMIT)
        for name, (answer, reason) in zip(names, answers, strict=True):
            seen_by = answer or Rival(float("nan"), float("nan"), float("nan"))
            rows[name].update({f"{peer} {key}": value for key, value in asdict(seen_by).items()})
            say(f"{name}, {peer}: {seen_by.objective:.9g}, {seen_by.violation:.1e} {reason}")
    return pd.DataFrame(list(rows.values()))
