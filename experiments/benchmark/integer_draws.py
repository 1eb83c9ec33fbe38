"""Draw small quadratic programs with integer data, and integer vectors g whose products g'x are differentiated."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from experiments.benchmark.exact import Number, combination, dot, is_positive_semidefinite, times
from experiments.benchmark.integer_programs import Bound, Kind, Program

# Numbers of variables, inequalities and equalities.
SHAPES = [(n, m, k) for n in range(1, 6) for m in (0, 3, 6, 9) for k in (0, 0, 1, 2, 3) if k <= n]


def draw(seed: int) -> Program:
    """Draw a program that has a solution: x, multipliers and slacks are drawn, and p and c are derived."""
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
    """Draw a feasible program whose rows allow a ray along which the cost falls."""
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
    """Return two integer vectors g: a random one, and a unit vector, p, or a row of Q or of the constraints."""
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
    """Draws the parts of a program with the solution x."""

    def __init__(self, seed: int, rows: int = 0) -> None:
        self.random = random.Random(seed)
        drawn = self.random
        self.n, self.m, self.k = drawn.choice([shape for shape in SHAPES if shape[1] + shape[2] >= rows])
        self.bounded = drawn.random() < 0.5
        self.x = [drawn.randint(-2, 2) for _ in range(self.n)]
        self.redundancy = drawn.choice((0, 0, 0.5, 1))  # scales the probability of rows that depend on others
        self.factor = self.random_rows(drawn.choice((0, self.n, self.n, self.n + 1, drawn.randint(0, self.n))))

    def random_rows(self, count: int) -> list[list[int]]:
        """Return rows of small integers, many of them 0; rows of zeros occur only if rows may be redundant."""
        largest = self.random.choice((1, 2, 2, 3))
        entries = [*range(-largest, largest + 1), 0]
        rows = [[self.random.choice(entries) for _ in range(self.n)] for _ in range(count)]
        return [row if any(row) or self.redundancy else [1] * self.n for row in rows]

    def equalities(self) -> list[list[int]]:
        """Return equality rows, some of which depend linearly on earlier ones."""
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
        tight = drawn.choice((0.2, 0.35, 0.7))  # probability that a row is active
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
    """Return multiples of the rows' components orthogonal to a ray."""
    length = dot(ray, ray)
    return [_ints(length * value - dot(row, ray) * r for value, r in zip(row, ray, strict=True)) for row in rows]


def _gram(factor: Sequence[Sequence[int]], n: int) -> tuple[tuple[int, ...], ...]:
    """Return R'R for the rows of R."""
    return tuple(tuple(sum(row[i] * row[j] for row in factor) for j in range(n)) for i in range(n))


def _ints(values: Iterable[Number]) -> tuple[int, ...]:
    """Return whole numbers as integers."""
    return tuple(int(value) for value in values)
