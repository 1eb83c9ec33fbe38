"""What QPLayer answers to a problem of the collection, and what differences say of its derivatives and refusals."""

from __future__ import annotations

import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from experiments.benchmark import differences
from experiments.benchmark.collection import Arguments, Problem, Vector, arguments, read, scales, typical
from experiments.benchmark.differences import Difference
from foldopt import QPLayer
from foldopt.errors import FoldoptError

F64 = torch.float64
WITH_RESPECT_TO = ("p", "b", "h", "lower", "upper")
DIRECTIONS = 2
OBJECTIVE, ROWS = 1e-6, 1e-8  # what counts as solved: relative error of the objective, violation of any row or bound
REFUSALS = {"KinkError": "kink", "NotUniqueError": "not unique", "DependentRowsError": "dependent rows"}


@dataclass(frozen=True)
class Answer:
    """What the layer answers: a solution, a gradient, or the error that stopped it.

    said: "answered", "refused" (an error of foldopt's own) or "raw" (any other exception).
    """

    said: str
    x: Vector | None = None
    gradient: Vector | None = None
    status: str = ""
    verdict: str = ""
    error: str = ""
    seconds_forward: float = np.nan
    seconds_backward: float = np.nan


@dataclass(frozen=True)
class Finding:
    """One problem and one argument: what the layer answered, and how it was judged.

    solution: "solved", "wrong", or the cause of the refusal. derivative: "confirmed", "contradicted", "unresolved", or
    for a refusal "kink confirmed", "not unique contradicted" and so on; "" where there is none to judge. left, right,
    uncertainty: the differences on which it is judged, along the direction that fares worst.
    """

    problem: str
    n: int
    equalities: int
    inequalities: int
    bounds: int
    argument: str
    solution: str
    verdict: str
    derivative: str
    objective_error: float
    row_violation: float
    bound_violation: float
    seconds_forward: float
    seconds_backward: float
    predicted: float = np.nan
    left: float = np.nan
    right: float = np.nan
    uncertainty: float = np.nan
    error: str = ""


def ask(args: Arguments, name: str, weights: Vector) -> Answer:
    """Return what QPLayer answers, and the gradient of weights'x with respect to the argument `name`."""
    given = {key: _tensor(value) for key, value in vars(args).items()}
    given["p"] = given["p"][None]
    given[name] = given[name].requires_grad_()
    layer, x, forward, start = QPLayer(), None, np.nan, time.perf_counter()

    def verdict() -> str:
        verdicts = getattr(getattr(layer, "last", None), "verdict", None)
        return str(verdicts[0]) if verdicts else ""

    try:
        rows = (given[key] for key in ("Q", "p", "G", "h", "A", "b"))
        solved = layer(*rows, lower=given["lower"], upper=given["upper"])
        forward, x = time.perf_counter() - start, solved[0].detach().numpy()
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad((solved[0] * _tensor(weights)).sum(), given[name])
    except FoldoptError as error:
        kind = type(error).__name__
        return Answer("refused", x, None, kind, verdict() or REFUSALS.get(kind, ""), f"{kind}: {error}", forward)
    except Exception as error:  # an exception of another library is what the table is to show
        return Answer("raw", x, None, type(error).__name__, "", f"{type(error).__name__}: {error}", forward)
    backward = time.perf_counter() - start
    flat = gradient.reshape(-1).numpy()
    return Answer("answered", x, flat, "solved", verdict(), "", forward, backward)


def _tensor(value: object) -> Tensor:
    dense = value.toarray() if hasattr(value, "toarray") else value
    return torch.as_tensor(np.asarray(dense), dtype=F64).clone()


@cache
def _warm_up() -> None:
    """Solve and differentiate a small program, so that no problem is charged for what torch loads at first."""
    eye, none = sp.csc_matrix(np.eye(2)), sp.csr_matrix((0, 2))
    bounds = np.zeros(2), np.ones(2)
    ask(Arguments(eye, np.array([1.0, -0.5]), none, np.zeros(0), none, np.zeros(0), *bounds), "p", np.ones(2))


def examine(folder: Path, name: str) -> list[dict[str, object]]:
    """Return what the layer answers to the problem `name`, as a `Finding` for each of its arguments."""
    _warm_up()
    problem = read(folder, name)
    args = arguments(problem)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    weights = rng.standard_normal(problem.n)
    return [asdict(finding) for finding in findings(problem, args, weights, rng)]


def findings(problem: Problem, args: Arguments, weights: Vector, rng: np.random.Generator) -> list[Finding]:
    """Return the findings of all arguments that have entries."""
    truth = differences.solve(args)
    reference = truth if truth is not None else np.ones(problem.n)
    sizes = scales(args, reference, WITH_RESPECT_TO)
    finite = {"lower": np.isfinite(args.lower), "upper": np.isfinite(args.upper)}
    found = []
    for name in WITH_RESPECT_TO:
        if not finite.get(name, np.ones(len(getattr(args, name)), bool)).any():
            continue
        answer = ask(args, name, weights)
        blank = _blank(problem, args, name, answer)
        directions = [rng.standard_normal(len(sizes[name])) * sizes[name] for _ in range(DIRECTIONS)]
        found.append(_judged(blank, answer, args, name, directions, weights, reference))
    return found


def _blank(problem: Problem, args: Arguments, name: str, answer: Answer) -> Finding:
    """Return the finding with what concerns the solution, and the derivative not judged yet."""
    bounds = int(np.isfinite(args.lower).sum() + np.isfinite(args.upper).sum())
    error, row, bound = np.nan, np.nan, np.nan
    solution = "raw" if answer.said == "raw" else answer.status
    if answer.x is not None:
        error, (row, bound) = problem.objective_error(answer.x), problem.violations(answer.x)
        solution = "solved" if error <= OBJECTIVE and max(row, bound) <= ROWS else "wrong"
    return Finding(
        *(problem.name, problem.n, len(args.b), len(args.h), bounds, name, solution, answer.verdict, ""),
        *(error, row, bound, answer.seconds_forward, answer.seconds_backward),
        error=answer.error[:300],
    )


def _judged(
    blank: Finding,
    answer: Answer,
    args: Arguments,
    name: str,
    directions: list[Vector],
    weights: Vector,
    x: Vector,
) -> Finding:
    if answer.said == "raw":
        return replace(blank, derivative="raw exception")
    if answer.x is None:
        return blank
    reach = float(np.abs(weights) @ np.abs(x))
    unit = typical(scales(args, x, ["p"])["p"])
    if answer.gradient is None and answer.verdict in ("kink", "not unique", "dependent rows"):
        return _refusal(blank, args, name, directions, weights, reach, unit)
    if answer.gradient is None:
        return replace(blank, derivative="refused")
    gap = differences.gap(args, weights, unit)
    if gap > 0:
        return _with(blank, "contradicted (not unique)", gap, Difference(""))
    worst = blank
    for direction in directions:
        terms = answer.gradient * direction
        predicted, extent = float(terms.sum()), float(np.abs(terms).sum())
        truth = differences.difference(args, name, direction, weights, max(extent, 1e-3 * reach))
        said = differences.judge(predicted, truth, max(extent, 1e-3 * reach))
        if truth.kind not in ("smooth", "unresolved"):
            said = f"{said} ({truth.kind})"
        if said != "confirmed" or worst is blank:
            worst = _with(blank, said, predicted, truth)
        if said.startswith("contradicted"):
            break
    return worst


def _refusal(
    blank: Finding, args: Arguments, name: str, directions: list[Vector], weights: Vector, reach: float, unit: float
) -> Finding:
    """Return whether differences see the reason for which the layer gave no derivative."""
    verdict = blank.verdict
    if verdict == "not unique":
        gap = differences.gap(args, weights, unit)
        said = "unresolved" if np.isnan(gap) else "confirmed" if gap > 0 else "contradicted"
        return _with(blank, f"{verdict} {said}", gap, Difference(""))
    seen = [differences.difference(args, name, direction, weights, 1e-3 * reach) for direction in directions]
    for truth in seen:
        if truth.kind not in ("smooth", "unresolved"):
            return _with(blank, f"{verdict} confirmed", np.nan, truth)
    said = "unresolved" if any(truth.kind == "unresolved" for truth in seen) else "contradicted"
    return _with(blank, f"{verdict} {said}", np.nan, seen[0])


def _with(blank: Finding, said: str, predicted: float, truth: Difference) -> Finding:
    return replace(
        blank,
        derivative=said,
        predicted=predicted,
        left=truth.left,
        right=truth.right,
        uncertainty=truth.uncertainty,
    )
