"""Small quadratic programs with integer data, and their exact solutions in rational arithmetic.

    minimize 1/2 x'Qx + p'x  subject to  Gx <= h, Ax = b, lower <= x <= upper

Degeneracy is common with integer data: dependent and repeated rows, ties, active rows with zero multipliers, equalities
written as two inequalities, and solutions that are not unique. Nothing here uses foldopt or floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.benchmark.exact import (
    Number,
    Vector,
    combination,
    complementary,
    dot,
    is_positive_semidefinite,
    maximum,
    null_space,
)

Status = Literal["solved", "infeasible", "unbounded", "nonconvex"]
Kind = Literal["G", "A", "lower", "upper"]
Bound = int | None  # None: no bound


@dataclass(frozen=True)
class Program:
    """min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, lower <= x <= upper, with integer data; None: no bound."""

    Q: tuple[tuple[int, ...], ...]
    p: tuple[int, ...]
    G: tuple[tuple[int, ...], ...] = ()
    h: tuple[Bound, ...] = ()
    A: tuple[tuple[int, ...], ...] = ()
    b: tuple[int, ...] = ()
    lower: tuple[Bound, ...] | None = None
    upper: tuple[Bound, ...] | None = None

    @property
    def n(self) -> int:
        """Return the number of variables."""
        return len(self.p)

    @property
    def shape(self) -> tuple[int, int, int, bool, bool]:
        """Return what programs of a batch have in common: the numbers of variables and rows, and which bounds exist."""
        return self.n, len(self.G), len(self.A), self.lower is not None, self.upper is not None

    def rows(self) -> list[Row]:
        """Return all rows with a finite right-hand side, in the form a'x <= c or a'x = c."""
        rows = [Row("A", i, a, c, True) for i, (a, c) in enumerate(zip(self.A, self.b, strict=True))]
        rows += [Row("G", i, a, c) for i, (a, c) in enumerate(zip(self.G, self.h, strict=True)) if c is not None]
        for kind, bounds, sign in (("lower", self.lower, -1), ("upper", self.upper, 1)):
            for j, bound in enumerate(bounds or ()):
                if bound is not None:
                    a = tuple(sign * (i == j) for i in range(self.n))
                    rows.append(Row("lower" if kind == "lower" else "upper", j, a, sign * bound))
        return rows


@dataclass(frozen=True)
class Row:
    """The row a'x <= c, or a'x = c, which is row `index` of the argument `kind`; a lower bound is negated."""

    kind: Kind
    index: int
    a: tuple[int, ...]
    c: int
    equality: bool = False


@dataclass(frozen=True)
class Point:
    """A solution x with multipliers y of all rows; those of equalities have either sign."""

    x: list[Number]
    y: list[Number]


def optimum(program: Program, p: Vector, c: Vector) -> Point | None:
    """Solve the program with cost p and right-hand sides c in place of its own; None if infeasible or unbounded.

    The optimality conditions of the result of Lemke's method are checked, which proves that it is optimal.
    """
    n, rows = program.n, program.rows()
    # x = s - t with s, t >= 0; an equality is two inequalities.
    double = [(i, 1) for i in range(len(rows))] + [(i, -1) for i, row in enumerate(rows) if row.equality]
    C = [[sign * value for value in rows[i].a] for i, sign in double]
    M = []
    for sign in (1, -1):
        M += [
            [*(sign * q for q in program.Q[j]), *(-sign * q for q in program.Q[j]), *(sign * a[j] for a in C)]
            for j in range(n)
        ]
    M += [[*(-value for value in a), *a, *([0] * len(C))] for a in C]
    z = complementary(M, [*p, *(-value for value in p), *(sign * c[i] for i, sign in double)])
    if z is None:
        return None
    x = [z[j] - z[n + j] for j in range(n)]
    y: list[Number] = [0] * len(rows)
    for (i, sign), value in zip(double, z[2 * n :], strict=True):
        y[i] += sign * value
    assert is_optimal(program, p, c, Point(x, y))
    return Point(x, y)


def is_optimal(program: Program, p: Vector, c: Vector, point: Point) -> bool:
    """Return whether the optimality conditions hold; they are sufficient, as Q is positive semidefinite."""
    rows = program.rows()
    pull = combination(point.y, [row.a for row in rows], program.n)
    stationary = all(dot(q, point.x) + a + b == 0 for q, a, b in zip(program.Q, p, pull, strict=True))
    slack = [value - dot(row.a, point.x) for row, value in zip(rows, c, strict=True)]
    return stationary and all(
        s == 0 if row.equality else s >= 0 and y >= 0 and s * y == 0
        for row, s, y in zip(rows, slack, point.y, strict=True)
    )


def status(program: Program) -> Status:
    """Return the kind of program; "unbounded" is feasible with a ray along which the objective falls."""
    if not is_positive_semidefinite(program.Q):
        return "nonconvex"
    n, rows = program.n, program.rows()
    # Rows of the cone {(x, t) : Cx <= c t, t >= 0}: it has a point with t = 1 if and only if the program is feasible.
    cone = [[*row.a, -row.c] for row in rows] + [[*(-a for a in row.a), row.c] for row in rows if row.equality]
    height = [*([0] * n), 1]
    if maximum(height, [*cone, [*([0] * n), -1], height], [*([0] * (len(cone) + 1)), 1]) == 0:
        return "infeasible"
    ray = [row[:n] for row in cone] + [list(q) for q in program.Q] + [[-value for value in q] for q in program.Q]
    fall = [-value for value in program.p]
    return "unbounded" if maximum(fall, [*ray, fall], [*([0] * len(ray)), 1]) != 0 else "solved"


def spread_of(program: Program, p: Vector, c: Vector, point: Point, g: Vector) -> tuple[Number | None, Number | None]:
    """Return by how much g'x can fall and rise from `point` to any other solution; None for no limit.

    All solutions of a convex quadratic program have the same Qx and p'x, which describes them without multipliers.
    """
    rows = program.rows()
    level = [[*q] for q in (*program.Q, p)] + [row.a for row in rows if row.equality]
    basis = null_space(level, program.n)
    inequalities = [(row.a, value) for row, value in zip(rows, c, strict=True) if not row.equality]
    seen = [[dot(a, direction) for direction in basis] for a, _ in inequalities]
    room = [value - dot(a, point.x) for a, value in inequalities]
    rise = [dot(g, direction) for direction in basis]
    return maximum([-value for value in rise], seen, room), maximum(rise, seen, room)
