"""Derivatives of the solution of a quadratic program by differences, with a solver that is independent of foldopt.

The solution is a piecewise affine function of p, b, h and the bounds. A one-sided difference is therefore exact, except
for the solver's error, up to the step at which the active set changes. A difference counts if several steps agree on
it; otherwise it is unresolved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from experiments.benchmark.collection import Arguments, Vector

Solver = Callable[[Arguments], Vector | None]
STEPS: Vector = 10.0 ** np.arange(-8.5, -1.4, 0.5)
FINER: Vector = 10.0 ** np.arange(-12, -8.4, 0.5)  # for active sets that change within the steps above
NOISE: Vector = np.array(
    [1e-12, 2e-12, 3e-12, 4e-12, 5e-12]
)  # steps at which the distance from a straight line is the solver's error
WINDOW = 3  # number of consecutive steps that must agree on a difference
CONTINUOUS = 1e-5  # a discontinuity is at least this large relative to the scale
AGREEMENT = 1e-4  # relative; a deviation of more than ten times this is a contradiction
SMALL = 1e-3  # derivatives below this part of |weights|'|x| are resolved to `AGREEMENT` times that part


@dataclass(frozen=True)
class Difference:
    """The derivatives of w'x along a direction from the left and from the right.

    Attributes:
        kind: "smooth" (both sides agree), "kink" (they differ), "jump" (w'x is discontinuous, as the solution is not
            unique), "infeasible" (one side has no solution) or "unresolved".
        left: The derivative from the left.
        right: The derivative from the right.
        uncertainty: The sum of the uncertainties of both.
    """

    kind: str
    left: float = np.nan
    right: float = np.nan
    uncertainty: float = np.nan

    @property
    def value(self) -> float:
        """The mean of both derivatives."""
        return 0.5 * (self.left + self.right)


@dataclass(frozen=True)
class Plateau:
    """A slope on which several steps agree, with its uncertainty, its extrapolated value at step 0, and its scale."""

    slope: float
    error: float
    start: float
    scale: float


def difference(solver: Solver, args: Arguments, name: str, direction: Vector, weights: Vector) -> Difference:
    """Return the derivative of weights'x along `direction` of the argument `name`."""
    here = solver(args)
    if here is None:
        return Difference("unresolved")

    def solutions(steps: Vector) -> Iterator[Vector | None]:
        return (solver(replace(args, **{name: getattr(args, name) + step * direction})) for step in steps)

    sides = []
    for sign in (-1.0, 1.0):
        along = solutions(sign * STEPS)
        nearest = [next(along) for _ in range(WINDOW)]
        if all(x is None for x in nearest):
            return Difference("infeasible")
        near = np.array([np.nan if x is None else float(weights @ x) for x in solutions(sign * NOISE)])
        noise = float(np.abs(np.diff(near, 2)).max())
        found = plateau(STEPS, (x for part in (nearest, along) for x in part), here, weights, noise)
        found = found or plateau(FINER, solutions(sign * FINER), here, weights, noise)
        if found is None:
            return Difference("unresolved")
        sides.append(replace(found, slope=sign * found.slope))
    left, right = sides
    error, scale = left.error + right.error, max(left.scale, right.scale)
    if abs(left.start - right.start) > CONTINUOUS * scale:
        return Difference("jump", left.slope, right.slope, error)
    apart = abs(left.slope - right.slope) > 10 * error + 10 * AGREEMENT * max(abs(left.slope), abs(right.slope))
    return Difference("kink" if apart else "smooth", left.slope, right.slope, error)


def plateau(
    steps: Vector, along: Iterable[Vector | None], here: Vector, weights: Vector, noise: float
) -> Plateau | None:
    """Return the slope of weights'x on which several consecutive steps agree; None if there is no such slope.

    The smallest steps whose slope leads back to the solution `here` are preferred; otherwise the smallest steps that
    agree are taken.

    Args:
        steps: Steps of increasing size.
        along: The solutions at `steps`, which are consumed only as far as needed.
        here: The solution at step 0.
        weights: The weights of the solution.
        noise: Error of weights'x.
    """
    first, value, reach = None, float(weights @ here), float(np.abs(weights) @ np.abs(here))
    slopes: list[float] = []
    extents: list[float] = []
    values: list[float] = []
    before: Vector | None = None
    for number, x in enumerate(along):
        values.append(np.nan if x is None else float(weights @ x))
        if number:
            width = float(steps[number] - steps[number - 1])
            slopes.append((values[number] - values[number - 1]) / width)
            terms = np.nan if x is None or before is None else float(np.abs(weights) @ np.abs(x - before))
            extents.append(terms / width)
        before = x
        if len(slopes) < WINDOW:
            continue
        part = slopes[-WINDOW:]
        scale = max(float(np.median(extents[-WINDOW:])), SMALL * reach)
        step = float(steps[number - 1])  # the step of the last slope, which has the smallest error of the solver
        error = float(np.ptp(part)) + 3 * noise / step
        if error <= AGREEMENT * scale:
            found = Plateau(part[-1], error, values[number - 1] - part[-1] * step, scale)
            first = first or found
            if abs(found.start - value) <= CONTINUOUS * scale:
                return found
    return first


def gap(solver: Solver, args: Arguments, weights: Vector, unit: float) -> float:
    """Return the range of weights'x over all solutions: 0 if the solution is unique along `weights`.

    Adding -t weights or +t weights to the cost selects the solution with the largest or the smallest value for any
    small t > 0. The result is NaN if the difference of these values neither stays constant as t falls nor falls below
    1e-6 of |weights|'|x|. It is inf if weights'x has no largest or no smallest value. unit: The unit of t.
    """
    if _recedes(args, weights):
        return float("inf")
    found, reach = [], 0.0
    for step in 10.0 ** np.arange(-9.0, -1.5):
        ends = [solver(replace(args, p=args.p + sign * step * unit * weights)) for sign in (-1, 1)]
        if ends[0] is not None and ends[1] is not None:
            found.append(float(weights @ (ends[0] - ends[1])))
            reach = reach or float(np.abs(weights) @ np.abs(ends[0]))
        if len(found) == WINDOW:
            break
    if len(found) < WINDOW:
        return float("nan")
    if found[0] <= 1e-6 * reach:
        return 0.0
    return found[0] if found[0] >= 0.5 * found[-1] else float("nan")


def _recedes(args: Arguments, weights: Vector) -> bool:
    """Return whether weights'x changes along a ray of solutions: a linear program over all rays d with |d| <= 1."""
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
    """Judge a derivative by differences.

    Args:
        predicted: The derivative.
        truth: The differences.
        extent: Sum of the sizes of the terms of `predicted`; errors below 1e-9 of it are rounding errors.

    Returns:
        "confirmed", "close" (right to 1e-3 but not to 1e-4), "contradicted" or "unresolved".
    """
    if truth.kind == "unresolved":
        return "unresolved"
    if truth.kind != "smooth":
        return "contradicted"
    wrong = abs(predicted - truth.value)
    size = max(abs(predicted), abs(truth.value), 1e-6 * extent)
    if not wrong <= 10 * truth.uncertainty + 10 * AGREEMENT * size:
        return "contradicted"
    return "confirmed" if wrong <= 3 * truth.uncertainty + AGREEMENT * size else "close"
