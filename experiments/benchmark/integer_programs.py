"""Small random quadratic programs with integer data, and exactly what is true of their derivatives.

    minimize 1/2 x'Qx + p'x  subject to  Gx <= h, Ax = b, lower <= x <= upper

Integer data make degeneracy common: dependent and repeated rows, ties, active rows without a multiplier, equalities
that are written as two inequalities, solutions that are not unique. Nothing here uses foldopt or floats.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
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
    rank,
    solve,
    times,
)

Status = Literal["solved", "infeasible", "unbounded", "nonconvex"]
Verdict = Literal["differentiable", "kink", "not unique", "dependent rows"]
Kind = Literal["G", "A", "lower", "upper"]
Bound = int | None  # None: no bound
STEP = Fraction(1, 10**9)  # of one-sided differences; the solutions are piecewise linear, so that they are exact


@dataclass(frozen=True)
class Program:
    """minimize 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, lower <= x <= upper, in integers; None is no bound."""

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
        """Return what programs of one batch have in common: numbers of variables and rows, and which bounds exist."""
        return self.n, len(self.G), len(self.A), self.lower is not None, self.upper is not None

    def rows(self) -> list[Row]:
        """Return all rows that bound something, in the form a'x <= c."""
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
    """A row a'x <= c, or a'x = c; row `index` of the argument `kind` (a lower bound has its sign changed)."""

    kind: Kind
    index: int
    a: tuple[int, ...]
    c: int
    equality: bool = False


@dataclass(frozen=True)
class Point:
    """A solution with multipliers of all rows (of equalities of either sign), for the cost p and right-hand sides c."""

    x: list[Number]
    y: list[Number]


def optimum(program: Program, p: Vector, c: Vector) -> Point | None:
    """Solve the program with other p and right-hand sides; return None where it is infeasible or unbounded.

    The optimality conditions of what Lemke's method returns are checked, which proves it optimal.
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
    """Check the optimality conditions, which are sufficient as Q is positive semidefinite."""
    rows = program.rows()
    pull = combination(point.y, [row.a for row in rows], program.n)
    stationary = all(dot(q, point.x) + a + b == 0 for q, a, b in zip(program.Q, p, pull, strict=True))
    slack = [value - dot(row.a, point.x) for row, value in zip(rows, c, strict=True)]
    return stationary and all(
        s == 0 if row.equality else s >= 0 and y >= 0 and s * y == 0
        for row, s, y in zip(rows, slack, point.y, strict=True)
    )


def status(program: Program) -> Status:
    """Say which kind of program it is; "unbounded" means feasible with a ray along which the objective falls."""
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


def spread_of(program: Program, p: Vector, c: Vector, point: Point, g: Vector) -> tuple[Number | None, Number | None]:
    """Return by how much g'x can fall and rise among all solutions, from the one at hand; None is without limit.

    The solutions of a convex quadratic program have Qx and p'x in common, which describes them without multipliers.
    """
    rows = program.rows()
    level = [[*q] for q in (*program.Q, p)] + [row.a for row in rows if row.equality]
    basis = null_space(level, program.n)
    inequalities = [(row.a, value) for row, value in zip(rows, c, strict=True) if not row.equality]
    seen = [[dot(a, direction) for direction in basis] for a, _ in inequalities]
    room = [value - dot(a, point.x) for a, value in inequalities]
    rise = [dot(g, direction) for direction in basis]
    return maximum([-value for value in rise], seen, room), maximum(rise, seen, room)


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


# Variables, inequalities, equalities.
SHAPES = [(n, m, k) for n in range(1, 6) for m in (0, 3, 6, 9) for k in (0, 0, 1, 2, 3) if k <= n]


def draw(seed: int) -> Program:
    """Draw a program that has a solution by construction: x, multipliers and slacks are drawn, p and c follow."""
    return _Draft(seed).program()


def draw_infeasible(seed: int) -> Program:
    """Draw a program and replace one row by a combination of others that contradicts them."""
    draft = _Draft(seed, rows=1)
    drawn = draft.random
    program = draft.program()
    replaced: Kind = "G" if program.G and (not program.A or drawn.random() < 0.7) else "A"
    last = len(program.G if replaced == "G" else program.A) - 1
    rows = [row for row in program.rows() if (row.kind, row.index) != (replaced, last)]
    if replaced == "A":
        rows = [row for row in rows if row.equality]
    picked = drawn.sample(rows, min(len(rows), drawn.randint(1, 3)))
    weights = [drawn.randint(1, 2) * (drawn.choice((1, -1)) if row.equality else 1) for row in picked]
    a = _ints(-value for value in combination(weights, [row.a for row in picked], program.n))
    c = -sum(weight * row.c for weight, row in zip(weights, picked, strict=True)) - drawn.randint(1, 2)
    if replaced == "A":
        return replace(program, A=(*program.A[:-1], a), b=(*program.b[:-1], c))
    return replace(program, G=(*program.G[:-1], a), h=(*program.h[:-1], c))


def draw_unbounded(seed: int) -> Program:
    """Draw a feasible program and turn its rows so that they leave a ray on which the cost falls."""
    draft = _Draft(seed)
    drawn, n = draft.random, draft.n
    ray = [0] * n
    while not any(ray):
        ray = [drawn.choice((-1, 0, 0, 1)) for _ in range(n)]
    flat, A = _across(draft.factor, ray), _across(draft.equalities(), ray)
    G = [row if dot(row, ray) <= 0 else [-value for value in row] for row in draft.random_rows(draft.m)]
    p = [0] * n
    while dot(p, ray) >= 0:
        p = [drawn.randint(-3, 3) for _ in range(n)]
    x = draft.x
    lower = [None if r < 0 or drawn.random() < 0.5 else a - drawn.randint(0, 2) for r, a in zip(ray, x, strict=True)]
    upper = [None if r > 0 or drawn.random() < 0.5 else a + drawn.randint(0, 2) for r, a in zip(ray, x, strict=True)]
    return Program(
        _gram(flat, n),
        _ints(p),
        tuple(map(_ints, G)),
        tuple(int(dot(row, x)) + drawn.randint(0, 2) for row in G),
        tuple(A),
        _ints(times(A, x)),
        tuple(lower) if draft.bounded else None,
        tuple(upper) if draft.bounded else None,
    )


def draw_nonconvex(seed: int) -> Program:
    """Draw a program with a solution and subtract squares from its cost until Q has a negative eigenvalue."""
    program = draw(seed)
    drawn = random.Random(seed)
    Q = [list(row) for row in program.Q]
    while is_positive_semidefinite(Q):
        u = [drawn.randint(-1, 1) for _ in range(program.n)]
        Q = [[value - u[i] * u[j] for j, value in enumerate(row)] for i, row in enumerate(Q)]
    return replace(program, Q=tuple(map(_ints, Q)))


def cotangents(program: Program, seed: int) -> list[tuple[int, ...]]:
    """Return two integer vectors g: one drawn, and a unit vector, the cost, a row of Q or of the constraints."""
    drawn = random.Random(-1 - seed)
    n = program.n
    first = (0,) * n
    while not any(first):
        first = tuple(drawn.randint(-3, 3) for _ in range(n))
    choices = [program.p, *program.Q, *(row.a for row in program.rows())]
    choices = [choice for choice in choices if any(choice)]
    units = [tuple(int(i == j) for j in range(n)) for i in range(n)]
    return [first, drawn.choice([drawn.choice(choices) if choices else first, drawn.choice(units)])]


class _Draft:
    """Draws the parts of a program around a solution x."""

    def __init__(self, seed: int, rows: int = 0) -> None:
        self.random = random.Random(seed)
        drawn = self.random
        self.n, self.m, self.k = drawn.choice([shape for shape in SHAPES if shape[1] + shape[2] >= rows])
        self.bounded = drawn.random() < 0.5
        self.x = [drawn.randint(-2, 2) for _ in range(self.n)]
        self.redundancy = drawn.choice((0, 0, 0.5, 1))  # of rows that depend on others
        self.factor = self.random_rows(drawn.choice((0, self.n, self.n, self.n + 1, drawn.randint(0, self.n))))

    def random_rows(self, count: int) -> list[list[int]]:
        """Return rows of small integers, many of them 0; none is a row of zeros unless rows may be redundant."""
        largest = self.random.choice((1, 2, 2, 3))
        entries = [*range(-largest, largest + 1), 0]
        rows = [[self.random.choice(entries) for _ in range(self.n)] for _ in range(count)]
        return [row if any(row) or self.redundancy else [1] * self.n for row in rows]

    def equalities(self) -> list[list[int]]:
        """Return equality rows, some of which depend on those before them."""
        rows: list[list[int]] = []
        for row in self.random_rows(self.k):
            rows.append(
                self.dependent(rows, (-2, -1, 0, 1, 2))
                if rows and self.random.random() < 0.4 * self.redundancy
                else row
            )
        return rows

    def dependent(self, rows: Sequence[Sequence[int]], weights: Sequence[int]) -> list[int]:
        """Return a combination of one or two rows."""
        picked = [self.random.choice(rows) for _ in range(self.random.choice((1, 1, 2)))]
        return list(_ints(combination([self.random.choice(weights) for _ in picked], picked, self.n)))

    def program(self) -> Program:
        """Return the program whose solution is x with the drawn multipliers."""
        drawn, n, x = self.random, self.n, self.x
        tight = drawn.choice((0.2, 0.35, 0.7))  # share of active rows
        multiplier = drawn.choice(((0, 0, 0, 1), (0, 0, 1, 2), (1, 1, 2)))
        A = self.equalities()
        pull = combination([drawn.choice((-2, -1, 0, 1, 2)) for _ in A], A, n)
        G: list[list[int]] = []
        h: list[Bound] = []
        active = [list(row) for row in A]
        for row in self.random_rows(self.m):
            kind = drawn.random() / self.redundancy if self.redundancy else 1
            if active and kind < 0.15:  # the same row again, in other units
                row = [drawn.choice((1, 1, 2, 10)) * value for value in drawn.choice(active)]
            elif active and kind < 0.3:  # an equality as two inequalities
                row = [-value for value in drawn.choice(active)]
            elif active and kind < 0.4:
                row = self.dependent(active, (1, 2))
            elif kind < 0.43:
                row = [0] * n
            elif n > 1 and drawn.random() < 0.15:
                i, j = drawn.sample(range(n), 2)
                row = [int(q == i) - int(q == j) for q in range(n)]
            slack = 0 if drawn.random() < tight else drawn.randint(1, 3)
            unit = drawn.choice((1, 1, 1, 1, 3, 100))
            row = [unit * value for value in row]
            if slack == 0:
                active.append(row)
                weight = drawn.choice(multiplier)
                pull = [value + weight * a for value, a in zip(pull, row, strict=True)]
            G.append(row)
            h.append(int(dot(row, x)) + unit * slack if slack == 0 or drawn.random() < 0.9 else None)
        lower: list[Bound] = [None] * n
        upper: list[Bound] = [None] * n
        for j in range(n if self.bounded else 0):
            for bounds, sign in ((lower, -1), (upper, 1)):
                kind = drawn.random()
                if kind < tight / 2:
                    bounds[j] = x[j]
                    pull[j] += sign * drawn.choice(multiplier)
                elif kind < 0.7:
                    bounds[j] = x[j] + sign * drawn.randint(1, 3)
        Q = _gram(self.factor, n)
        return Program(
            Q,
            _ints(-a - b for a, b in zip(times(Q, x), pull, strict=True)),
            tuple(map(_ints, G)),
            tuple(h),
            tuple(map(_ints, A)),
            _ints(times(A, x)),
            tuple(lower) if self.bounded else None,
            tuple(upper) if self.bounded else None,
        )


def _across(rows: Sequence[Sequence[int]], ray: Sequence[int]) -> list[tuple[int, ...]]:
    """Return multiples of the rows' parts across a ray, on which the product with the ray is 0."""
    length = dot(ray, ray)
    return [_ints(length * value - dot(row, ray) * r for value, r in zip(row, ray, strict=True)) for row in rows]


def _gram(factor: Sequence[Sequence[int]], n: int) -> tuple[tuple[int, ...], ...]:
    """Return R'R for the rows of R."""
    return tuple(tuple(sum(row[i] * row[j] for row in factor) for j in range(n)) for i in range(n))


def _ints(values: Iterable[Number]) -> tuple[int, ...]:
    """Return whole numbers as integers."""
    return tuple(int(value) for value in values)
