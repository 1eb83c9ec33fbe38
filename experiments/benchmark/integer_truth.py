"""The exact truth about the derivatives of a small quadratic program with integer data.

The derivatives are those of g'x for an integer vector g. Let X be the set of solutions. A row that is active somewhere
on X is either
strong: an equality, or a row that is positive in some optimal multiplier (it is then active on all of X); or
touched: any other such row (it is 0 in every optimal multiplier).
C holds the rows in the form Cx <= c, and C_S and C_T the strong and the touched ones.

1. g'x is not unique if it takes several values on X.
2. Else g'x has a derivative with respect to p if and only if a solution (v, w) of

       Qv + C_S'w = g,   C_S v = 0,   C_T v = 0

   exists. The gradient is then -v. If there is no solution, g'x has a kink in p. The third equation concerns the rows
   touched anywhere on X, not only those active at one solution: if x is not unique, a small change of p moves it to
   an end of X, where other rows are active.
3. For a derivative with respect to the right-hand sides as well, w must also be 0 at every strong inequality that is 0
   in some optimal multiplier. The gradient is then (-v, w), and 0 for touched rows.

Proof of 2. Along p + t d the solutions for small t > 0 are x + t z with x in X, the multipliers are y + t r, and rows
with multipliers are strong or touched. Then g'z = v'Qz + w'C_S z = -d'v - r'Cv + w'C_S z. Here C_S z = 0, because a
multiplier that is positive in the strong rows bounds their slack by O(t^2), and r'Cv = 0 by the equations for v. Hence
g'z = -d'v. Conversely, let g'z = -u'd for all directions d. The direction d = -C_i of a strong or touched row i changes
no solution (z = 0), so that C_i u = 0. For z with C_S z = 0 that points into the interior of the touched rows, d = -Qz
gives g'z = u'Qz. Such z span all z with C_S z = 0 (otherwise a touched row would be strong), so that u solves the
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
STEP = Fraction(1, 10**9)  # of one-sided differences, which are exact as the solutions are piecewise linear


@dataclass(frozen=True)
class Truth:
    """The truth about a program's set of solutions X.

    Attributes:
        program: The program.
        status: Whether it has a solution, or why not; the following fields have meaning only if it does.
        point: A solution with multipliers.
        rows: All rows of the program.
        unique: Whether the solution is unique.
        unique_multipliers: Whether the multipliers are unique.
        strong: The strong rows, as positions in `rows`.
        touched: The touched rows.
        droppable: The strong inequalities that are 0 in some optimal multiplier.
        dependent: Whether the strong rows are linearly dependent.
        dependent_equalities: Whether the equalities are linearly dependent.
        lines: A basis of the directions of lines that lie in X.
        bounded: Whether X is bounded. If not, some programs with a p nearby are unbounded, and derivatives are those
            along the other directions.
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
    """The truth about the derivatives of g'x.

    Attributes:
        verdict: On the derivative with respect to p.
        verdict_rows: On the derivative with respect to p and the right-hand sides. It is "dependent rows" if the
            derivative with respect to p exists and the strong rows are linearly dependent.
        gradient: With respect to p, if it exists, up to a combination of `Truth.lines`.
        multipliers: The gradient with respect to the right-hand sides c of all rows, if it exists, which it can also
            with dependent rows.
        isolated: Whether g'x is unique at p but not determined by the strong rows alone, so that nearby programs can
            have several values of g'x.
    """

    verdict: Verdict
    verdict_rows: Verdict
    gradient: list[Number] | None = None
    multipliers: list[Number] | None = None
    isolated: bool = False


def truth_of(program: Program) -> Truth:
    """Determine the exact truth about a program's solutions."""
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
    """Return the strong rows, and the strong inequalities that are 0 in some optimal multiplier.

    The optimal multipliers are y + sum t_k basis_k with nonnegative entries at inequalities. One linear program per row
    finds whether it can be positive, and whether it can be 0.
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
    """Return the truth about the derivatives of g'x for a program that has a solution."""
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
    """Return the gradients of g'x with respect to p on the smooth pieces that meet at a program with a unique solution.

    On a piece some of the touched rows stay active and the others become inactive. The piece exists if some z keeps the
    strong rows and those that stay active, and points into the interior of the others.
    """
    n, Q = truth.program.n, truth.program.Q
    found: list[list[Number]] = []
    for size in range(min(n, len(truth.touched)) + 1):
        for stay in combinations(truth.touched, size):
            C, leave = truth.part([*truth.strong, *stay]), truth.part([i for i in truth.touched if i not in stay])
            basis = null_space(C, n)
            seen = [[dot(a, direction) for direction in basis] for a in leave]
            inner = [[*row, 1] for row in seen if any(row)]  # C z + t <= 0, t <= 1; rows of zeros always stay active
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
    """Return w, given for the strong rows, as a vector over all rows."""
    full: list[Number] = [0] * len(truth.rows)
    for i, value in zip(truth.strong, w, strict=True):
        full[i] = value
    return full


def _constant(truth: Truth, g: Vector) -> bool:
    """Return whether g'x has the same value at all solutions."""
    program, point = truth.program, truth.point
    return spread_of(program, program.p, [row.c for row in truth.rows], point, g) == (0, 0)


@dataclass(frozen=True)
class Slope:
    """The smallest and largest one-sided derivative of g'x in a direction, where solutions may not be unique."""

    least: Number | None
    greatest: Number | None


def slope(truth: Truth, g: Vector, d: Vector, e: Vector | None = None) -> Slope | None:
    """Return the one-sided derivative along p + t d, c + t e by solving a nearby program; None if that has no solution.

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
    """Judge the derivative of g'x only by one-sided differences of nearby programs.

    The verdict is "differentiable" if one linear function agrees with the slopes in all directions. Directions in which
    nearby programs have no solution do not count.

    Args:
        truth: The truth about the program.
        g: The vector g.
        seed: Seed of the random directions.
        rows: Whether the right-hand sides change, too.

    Returns:
        The verdict and, if it is "differentiable", the directions with their slopes as rows [*d, slope], or
        [*d, *e, slope] if the right-hand sides change.
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
