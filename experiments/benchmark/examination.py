"""The answers of libraries to problems of the collection, and their judgement by differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.benchmark import differences
from experiments.benchmark.collection import Vector, arguments, read
from experiments.benchmark.differences import Difference
from experiments.benchmark.libraries import LIBRARIES, Answer, ask, warm_up
from experiments.benchmark.truth import Along, Truth, weights

OBJECTIVE, ROWS = 1e-6, 1e-8  # largest relative error of the objective, and violation of a row or bound, if solved
NONE = ("jump", "infeasible")  # kinds of differences that show that the solution is not unique or does not exist
ABSENT = ("kink", *NONE)  # kinds of differences that show that there is no derivative


@dataclass(frozen=True)
class Observation:
    """An answer without x; instead the objective of x and its largest violations of a row and of a bound."""

    answer: Answer
    objective: float = np.nan
    row: float = np.nan
    bound: float = np.nan


@dataclass(frozen=True)
class Finding:
    """The judged answer of a library to a problem, with the derivative with respect to one argument.

    Attributes:
        library: The library.
        problem: The problem.
        argument: The argument.
        n: Number of variables.
        said: "answered", "refused" or "raw", see `Answer`.
        solution: "solved", "wrong", or "" if there is no solution.
        verdict: The layer's verdict on the derivative, if it has one.
        derivative: "confirmed", "close", "contradicted" or "unresolved" for a gradient; the same after the reason for a
            refusal, such as "kink confirmed"; "not compared" without differences to judge by.
        objective: Objective at x.
        objective_error: Its relative error.
        row_violation: Largest violation of a row.
        bound_violation: Largest violation of a bound.
        seconds_forward: Seconds of the forward pass.
        seconds_backward: Seconds of the backward pass.
        peak_bytes: Growth of the memory in use.
        predicted: The derivative along the direction with the worst judgement.
        left: The difference from the left along this direction.
        right: The difference from the right along this direction.
        uncertainty: The uncertainty of these differences.
        error: The library's error message.
    """

    library: str
    problem: str
    argument: str
    n: int
    said: str
    solution: str
    verdict: str
    derivative: str
    objective: float
    objective_error: float
    row_violation: float
    bound_violation: float
    seconds_forward: float
    seconds_backward: float
    peak_bytes: float
    predicted: float = np.nan
    left: float = np.nan
    right: float = np.nan
    uncertainty: float = np.nan
    error: str = ""


def examine(folder: Path, library: str, name: str, argument: str) -> Observation:
    """Let `library` solve the problem `name` and compute the gradient of w'x with respect to `argument`."""
    warm_up(library)
    problem = read(folder, name)
    answer = ask(LIBRARIES[library], arguments(problem), argument, weights(name, problem.n))
    if answer.x is None:
        return Observation(answer)
    return Observation(replace(answer, x=None), problem.objective(answer.x), *problem.violations(answer.x))


def finding(
    library: str, problem: str, argument: str, n: int, optimum: float, seen: Observation, truth: Truth | None
) -> Finding:
    """Judge an answer; optimum: the right objective; truth: None for problems whose derivatives are not compared."""
    answer = seen.answer
    error = abs(seen.objective - optimum) / max(1.0, abs(optimum))
    solved = error <= OBJECTIVE and max(seen.row, seen.bound) <= ROWS
    blank = Finding(
        library=library,
        problem=problem,
        argument=argument,
        n=n,
        said=answer.said,
        solution="" if np.isnan(seen.objective) else "solved" if solved else "wrong",
        verdict=answer.verdict,
        derivative="not compared",
        objective=seen.objective,
        objective_error=error,
        row_violation=seen.row,
        bound_violation=seen.bound,
        seconds_forward=answer.seconds_forward,
        seconds_backward=answer.seconds_backward,
        peak_bytes=answer.peak_bytes,
        error=answer.error,
    )
    if answer.said == "raw" or truth is None or np.isnan(truth.reach):
        return blank
    along = truth.along.get(argument, ())
    if answer.gradient is None:
        return _refusal(blank, truth, along)
    return _gradient(blank, answer.gradient, truth, along)


def _gradient(blank: Finding, gradient: Vector, truth: Truth, along: tuple[Along, ...]) -> Finding:
    """Judge a gradient by the direction with the worst result."""
    if truth.gap > 0:
        return replace(blank, derivative="contradicted (not unique)")
    found = []
    for one in along:
        terms = gradient * one.direction
        predicted, extent = float(terms.sum()), max(float(np.abs(terms).sum()), differences.SMALL * truth.reach)
        said = differences.judge(predicted, one.difference, extent)
        if one.difference.kind in ABSENT:
            said += f" ({one.difference.kind})"
        found.append(_with(blank, said, one.difference, predicted))
    ranks = ("contradicted", "unresolved", "close", "confirmed")
    return min(found, key=lambda one: ranks.index(one.derivative.split(" ")[0]))


def _refusal(blank: Finding, truth: Truth, along: tuple[Along, ...]) -> Finding:
    """Judge a refusal: do differences confirm its reason, or any reason if it names none?"""
    reason = blank.verdict or "refused"
    if truth.gap > 0:
        return replace(blank, derivative=f"{reason} confirmed")
    shown = along
    if reason == "not unique":
        if truth.gap == 0:
            return replace(blank, derivative=f"{reason} contradicted")
        shown = truth.along["p"]  # a jump in p, or a p nearby without a solution, shows that the solution is not unique
    kinds = NONE if reason == "not unique" else ABSENT
    for one in shown:
        if one.difference.kind in kinds:
            return _with(blank, f"{reason} confirmed", one.difference)
    unknown = reason == "not unique" or any(one.difference.kind == "unresolved" for one in shown)
    return _with(blank, f"{reason} {'unresolved' if unknown else 'contradicted'}", shown[0].difference)


def _with(blank: Finding, said: str, difference: Difference, predicted: float = np.nan) -> Finding:
    return replace(
        blank,
        derivative=said,
        predicted=predicted,
        left=difference.left,
        right=difference.right,
        uncertainty=difference.uncertainty,
    )
