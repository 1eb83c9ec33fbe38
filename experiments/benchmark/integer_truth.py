"""Exactly what is true of the derivatives of a small quadratic program with integer data.

What is true of g'x for an integer vector g. Let X be the set of solutions, and let every active row be of one kind:
strong: an equality, or a row with a positive multiplier in some optimal multiplier (then it is active on all of X);
touched: any other row that is active somewhere on X (it has the multiplier 0 in every optimal multiplier).
C holds the rows in the form Cx <= c, C_S and C_T those that are strong and touched.

1. g'x is not unique if it takes several values on X.
2. Else g'x has a derivative with respect to p if and only if a solution (v, w) of

       Qv + C_S'w = g,   C_S v = 0,   C_T v = 0

   exists. The gradient is then -v. If there is none, g'x has a kink in p. The third equation is about all of X, not
   only about the rows that are active at the solution at hand: where x is not unique, the smallest change of p moves
   it to an end of X, where other rows are active.
3. With respect to the right-hand sides as well, w must be 0 at every strong inequality that has the multiplier 0 in
   some optimal multiplier. The gradient is then (-v, w), and 0 for touched rows.

Why. Along p + t d the solutions for small t > 0 are x + t z with x in X and multipliers y + t r, and the rows with
multipliers are strong or touched. Then g'z = v'Qz + w'C_S z = -d'v - r'Cv + w'C_S z. Here C_S z = 0, because a
multiplier that is positive in the strong rows bounds their slack by O(t^2), and r'Cv = 0 by the equations on v. Hence
g'z = -d'v. On the other hand let g'z = -u'd in all directions d. Taking d = -C_i for a strong or a touched row i
changes no solution (z = 0), so that C_i u = 0; d = -Qz for any z with C_S z = 0 that moves into the touched rows'
interior gives g'z = u'Qz, and such z span all with C_S z = 0 (otherwise a touched row would be strong). So u solves the
equations. `judged` does not rely on this: it solves nearby programs exactly and compares.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Literal

from experiments.benchmark.exact import Number, Vector, dot, maximum, null_space, rank, solve, times
from experiments.benchmark.integer_programs import Point, Program, Row, Status, optimum, spread_of, status

Verdict = Literal["differentiable", "kink", "not unique", "dependent rows"]
STEP = Fraction(1, 10**9)  # of one-sided differences; the solutions are piecewise linear, so that they are exact


@dataclass(frozen=True)
class Truth:
    """What is true of a program's solutions.

    point: a solution with multipliers. unique: whether it is the only solution. unique_multipliers: whether those are.
    strong, touched: the rows of these kinds (positions in `rows`); droppable: strong inequalities that have the
    multiplier 0 in some optimal multiplier; dependent: whether the strong rows are linearly dependent.
    lines: directions along which X holds whole lines. bounded: whether X is bounded; where it is not, programs with a
    p nearby are unbounded, and derivatives are those in the directions that leave it bounded.
    """

    program: Program
    status: Status
    point: Point = field(default_factory=lambda: Point([], []))
    rows: list[Row] = field(default_factory=list)
    unique: bool = True
    unique_multipliers: bool = True
    strong: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    droppable: list[int] = field(default_factory=list)
    dependent: bool = False
    dependent_equalities: bool = False
    lines: list[list[int]] = field(default_factory=list)
    bounded: bool = True

    def part(self, which: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the rows of these positions, as a matrix."""
        return [self.rows[i].a for i in which]


@dataclass(frozen=True)
class Derivative:
    """What is true of the derivatives of g'x.

    verdict: with respect to p. gradient: with respect to p, where it exists; up to a combination of `lines`.
    verdict_rows: with respect to the right-hand sides as well: "dependent rows" where p's exists and the strong rows
    are dependent. multipliers: the gradient with respect to c of all rows, where it exists, also then.
    isolated: g'x is unique at p, but the strong rows alone do not determine it (nearby programs can have several g'x).
    """

    verdict: Verdict
    verdict_rows: Verdict
    gradient: list[Number] | None = None
    multipliers: list[Number] | None = None
    isolated: bool = False


def truth_of(program: Program) -> Truth:
    """Find out all that is true of a program's solutions, exactly."""
    what = status(program)
    if what != "solved":
        return Truth(program, what)
    n, rows = program.n, program.rows()
    point = optimum(program, program.p, [row.c for row in rows])
    assert point is not None
    slack = [row.c - dot(row.a, point.x) for row in rows]
    active = [i for i, value in enumerate(slack) if value == 0]
    strong, droppable = _supported(rows, active, point)
    C_S = [rows[i].a for i in strong]
    others = [i for i in range(len(rows)) if i not in strong]
    basis = null_space([*program.Q, *C_S], n)
    # X - x = {sum t_k basis_k : seen t <= slack}
    seen = [[dot(rows[i].a, direction) for direction in basis] for i in others]
    room = [slack[i] for i in others]
    touched = [i for i, row in zip(others, seen, strict=True) if maximum(row, seen, room) == slack[i]]
    axes = [[sign * (j == k) for j in range(len(basis))] for k in range(len(basis)) for sign in (1, -1)]
    ends = [maximum(axis, seen, room) for axis in axes]
    equalities = [row.a for row in rows if row.equality]
    return Truth(
        program=program,
        status=what,
        point=point,
        rows=rows,
        unique=all(end == 0 for end in ends),
        unique_multipliers=rank([rows[i].a for i in strong], n) == len(strong),
        strong=strong,
        touched=touched,
        droppable=droppable,
        dependent=rank(C_S, n) < len(C_S),
        dependent_equalities=rank(equalities, n) < len(equalities),
        lines=null_space([*program.Q, *C_S, *(rows[i].a for i in touched)], n),
        bounded=all(end is not None for end in ends),
    )


def _supported(rows: list[Row], active: list[int], point: Point) -> tuple[list[int], list[int]]:
    """Return the strong rows, and the strong inequalities that have the multiplier 0 in some optimal multiplier.

    The optimal multipliers are y + sum t_k basis_k with positive entries at inequalities: one linear program per row.
    """
    y = [point.y[i] for i in active]
    basis = null_space(list(zip(*(rows[i].a for i in active), strict=True)), len(active)) if active else []
    moves = list(zip(*basis, strict=True)) if basis else [()] * len(active)
    signed = [k for k, i in enumerate(active) if not rows[i].equality]
    limits, room = [[-value for value in moves[k]] for k in signed], [y[k] for k in signed]
    strong, droppable = [], []
    for k, i in enumerate(active):
        if rows[i].equality:
            strong.append(i)
        elif y[k] > 0 or maximum(moves[k], limits, room) != 0:
            strong.append(i)
            if maximum([-value for value in moves[k]], limits, room) == y[k]:
                droppable.append(i)
    return strong, droppable


def derivative_of(truth: Truth, g: Vector) -> Derivative:
    """Return what is true of the derivatives of g'x at a program that has a solution."""
    n, Q = truth.program.n, truth.program.Q
    C_S, C_T = truth.part(truth.strong), truth.part(truth.touched)
    k = len(C_S)
    smooth = [[*Q[j], *(a[j] for a in C_S)] for j in range(n)] + [[*a, *([0] * k)] for a in C_S]
    right = [*g, *([0] * k)]
    flat = [[*a, *([0] * k)] for a in C_T]
    if not _constant(truth, g):
        return Derivative("not unique", "not unique")
    found = solve([*smooth, *flat], [*right, *([0] * len(flat))], n + k)
    if found is None:
        return Derivative("kink", "kink", isolated=solve(smooth, right, n + k) is None)
    gradient = [-value for value in found[:n]]
    if not truth.dependent:
        return Derivative("differentiable", "differentiable", gradient, _spread(truth, found[n:]))
    dropped = [[int(j == n + truth.strong.index(i)) for j in range(n + k)] for i in truth.droppable]
    found = solve([*smooth, *flat, *dropped], [*right, *([0] * (len(flat) + len(dropped)))], n + k)
    multipliers = None if found is None else _spread(truth, found[n:])
    return Derivative("differentiable", "dependent rows", gradient, multipliers)


def pieces(truth: Truth, g: Vector) -> list[list[Number]]:
    """Return the gradients of g'x with respect to p on the smooth pieces that meet at a program with one solution.

    On a piece some of the touched rows stay active and the others leave. There are such p nearby if a z exists that
    keeps the strong rows and those that stay, and moves into the interior of the others.
    """
    n, Q = truth.program.n, truth.program.Q
    found: list[list[Number]] = []
    for size in range(min(n, len(truth.touched)) + 1):
        for stay in combinations(truth.touched, size):
            C, leave = truth.part([*truth.strong, *stay]), truth.part([i for i in truth.touched if i not in stay])
            basis = null_space(C, n)
            seen = [[dot(a, direction) for direction in basis] for a in leave]
            inner = [[*row, 1] for row in seen if any(row)]  # C z + t <= 0, t <= 1; rows of zeros stay, too
            height = [*([0] * len(basis)), 1]
            if maximum(height, [*inner, height], [*([0] * len(inner)), 1]) == 0 or null_space([*Q, *C], n):
                continue
            k = len(C)
            smooth = [[*Q[j], *(a[j] for a in C)] for j in range(n)] + [[*a, *([0] * k)] for a in C]
            solution = solve(smooth, [*g, *([0] * k)], n + k)
            assert solution is not None
            gradient = [-value for value in solution[:n]]
            if gradient not in found:
                found.append(gradient)
    return found


def _spread(truth: Truth, w: Vector) -> list[Number]:
    """Return w of the strong rows as a vector over all rows."""
    full: list[Number] = [0] * len(truth.rows)
    for i, value in zip(truth.strong, w, strict=True):
        full[i] = value
    return full


def _constant(truth: Truth, g: Vector) -> bool:
    """Say whether g'x takes one value on the solutions."""
    program, point = truth.program, truth.point
    return spread_of(program, program.p, [row.c for row in truth.rows], point, g) == (0, 0)


@dataclass(frozen=True)
class Slope:
    """The one-sided derivative of g'x in one direction: least and greatest, as solutions may not be unique there."""

    least: Number | None
    greatest: Number | None


def slope(truth: Truth, g: Vector, d: Vector, e: Vector | None = None) -> Slope | None:
    """Return the one-sided derivative along p + t d, c + t e by solving a program nearby; None if it has no solution.

    g'x must be unique at t = 0.
    """
    program = truth.program
    p = [a / STEP + b for a, b in zip(program.p, d, strict=True)]
    c = [row.c / STEP + (e[i] if e else 0) for i, row in enumerate(truth.rows)]
    point = optimum(program, p, c)  # in units of STEP: its solutions are x / STEP
    if point is None:
        return None
    fall, rise = spread_of(program, p, c, point, g)
    change = dot(g, point.x) - dot(g, truth.point.x) / STEP
    return Slope(None if fall is None else change - fall, None if rise is None else change + rise)


def judged(truth: Truth, g: Vector, seed: int = 0, rows: bool = False) -> tuple[Verdict, list[list[Number]]]:
    """Judge the derivative of g'x by one-sided differences of nearby programs alone.

    Return the verdict and, where it is "differentiable", the directions and slopes it rests on, as rows [*d, slope] (or
    [*d, *e, slope] if the right-hand sides move as well). It is "differentiable" if one linear function agrees with
    all of them; directions in which no program nearby has a solution do not count.
    """
    program, n, m = truth.program, truth.program.n, len(truth.rows)
    c = [row.c for row in truth.rows]
    if spread_of(program, program.p, c, truth.point, g) != (0, 0):
        return "not unique", []
    drawn = random.Random(seed)
    units = [[int(i == j) for j in range(n)] for i in range(n)]
    ways: list[list[Number]] = [list(d) for d in (*units, *program.Q, *(row.a for row in truth.rows)) if any(d)]
    ways += [[drawn.randint(-3, 3) for _ in range(n)] for _ in range(3)]
    changes = [[*(sign * value for value in way), *([0] * m)] for way in ways for sign in (1, -1)]
    if rows:
        changes += [[*([0] * n), *(sign * (i == j) for j in range(m))] for i in range(m) for sign in (1, -1)]
        changes += [[drawn.randint(-2, 2) for _ in range(n + m)] for _ in range(3)]
        changes += [[*(-value for value in times(program.Q, d)), *(dot(row.a, d) for row in truth.rows)] for d in units]
    table = []
    for change in changes:
        found = slope(truth, g, change[:n], change[n:])
        if found is None:
            continue
        if found.least is None or found.least != found.greatest:
            return "kink", []
        table.append([*change, found.least] if rows else [*change[:n], found.least])
    width = n + m if rows else n
    fits = solve([row[:width] for row in table], [row[width] for row in table], width) is not None
    return ("differentiable", table) if fits else ("kink", [])
