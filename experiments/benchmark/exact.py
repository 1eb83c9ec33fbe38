"""Linear algebra, linear programs and convex quadratic programs in exact rational arithmetic, for a few variables.

Everything is computed with Python's integers and fractions, never with floats. Pivoting is fraction-free: a tableau of
integers stands for this tableau divided by the last pivot, and the divisions in `_pivot` leave no remainder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import gcd, lcm

Number = int | Fraction
Vector = Sequence[Number]
Matrix = Sequence[Vector]


def dot(a: Vector, b: Vector) -> Number:
    """Return a'b."""
    return sum((x * y for x, y in zip(a, b, strict=True) if x and y), 0)


def times(rows: Matrix, x: Vector) -> list[Number]:
    """Return the product of a matrix, given by its rows, with a vector."""
    return [dot(row, x) for row in rows]


def combination(weights: Vector, rows: Matrix, n: int) -> list[Number]:
    """Return the sum of weights[i] * rows[i], a vector of length n."""
    total: list[Number] = [0] * n
    for weight, row in zip(weights, rows, strict=True):
        if weight:
            total = [entry + weight * value for entry, value in zip(total, row, strict=True)]
    return total


def integers(values: Iterable[Number]) -> list[int]:
    """Return the smallest positive multiple of a vector whose entries are all integers."""
    listed = list(values)
    common = lcm(*(Fraction(value).denominator for value in listed))
    scaled = [int(value * common) for value in listed]
    divisor = gcd(*scaled)
    return [value // divisor for value in scaled] if divisor else scaled


def _pivot(tableau: list[list[int]], row: int, column: int, last: int) -> int:
    """Pivot a tableau of integers in place, and return the pivot, the divisor of the new tableau."""
    source = tableau[row]
    pivot = source[column]
    for i, target in enumerate(tableau):
        if i != row:
            factor = target[column]
            if factor:
                tableau[i] = [(t * pivot - factor * s) // last for t, s in zip(target, source, strict=True)]
            elif pivot != last:
                tableau[i] = [t * pivot // last for t in target]
    return pivot


def _reduced(rows: Matrix, columns: int) -> tuple[list[list[int]], list[int], int]:
    """Return the reduced echelon form times the last pivot, the columns of the pivots, and the last pivot."""
    tableau = [integers(row) for row in rows]
    pivots: list[int] = []
    last = 1
    for column in range(columns):
        found = next((i for i in range(len(pivots), len(tableau)) if tableau[i][column]), None)
        if found is not None:
            place = len(pivots)
            tableau[place], tableau[found] = tableau[found], tableau[place]
            last = _pivot(tableau, place, column, last)
            pivots.append(column)
    return tableau, pivots, last


def rank(rows: Matrix, n: int) -> int:
    """Return the rank of a matrix with n columns."""
    return len(_reduced(rows, n)[1])


def null_space(rows: Matrix, n: int) -> list[list[int]]:
    """Return an integer basis of {x : rows x = 0}."""
    tableau, pivots, last = _reduced(rows, n)
    basis = []
    for free in (j for j in range(n) if j not in pivots):
        vector = [0] * n
        vector[free] = last
        for i, column in enumerate(pivots):
            vector[column] = -tableau[i][free]
        basis.append(integers(vector))
    return basis


def solve(rows: Matrix, right: Vector, n: int) -> list[Number] | None:
    """Return the solution x of rows x = right whose free variables are zero; None if there is no solution."""
    tableau, pivots, last = _reduced([[*row, value] for row, value in zip(rows, right, strict=True)], n)
    if any(row[n] for row in tableau[len(pivots) :]):
        return None
    x: list[Number] = [0] * n
    for i, column in enumerate(pivots):
        x[column] = Fraction(tableau[i][n], last)
    return x


def is_positive_semidefinite(Q: Matrix) -> bool:
    """Return whether a symmetric matrix has no negative eigenvalue, by symmetric elimination."""
    rest = [[Fraction(value) for value in row] for row in Q]
    while rest:
        n = len(rest)
        if any(rest[i][i] < 0 for i in range(n)):
            return False
        place = next((i for i in range(n) if rest[i][i] > 0), None)
        if place is None:
            return not any(any(row) for row in rest)
        others = [i for i in range(n) if i != place]
        rest = [[rest[i][j] - rest[i][place] * rest[place][j] / rest[place][place] for j in others] for i in others]
    return True


def maximum(cost: Vector, rows: Matrix, right: Vector) -> Number | None:
    """Return max cost'z over {z : rows z <= right} for right >= 0, so that z = 0 is feasible; None if unbounded.

    This is the primal simplex method with Bland's rule, which cannot cycle.
    """
    n, m = len(cost), len(rows)
    objective = integers([*cost, 1])  # the appended 1 becomes the factor by which the cost was scaled
    scale = objective.pop()
    tableau = []
    for i, (row, value) in enumerate(zip(rows, right, strict=True)):
        assert value >= 0, "z = 0 is not feasible"
        *entries, last = integers([*row, value])
        slack = [0] * m
        slack[i] = 1
        tableau.append([*entries, *(-entry for entry in entries), *slack, last])
    tableau.append([*objective, *(-entry for entry in objective), *([0] * (m + 1))])
    basis = [2 * n + i for i in range(m)]
    last = 1
    while True:
        column = next((j for j in range(2 * n + m) if tableau[m][j] > 0), None)
        if column is None:
            return Fraction(-tableau[m][-1], last * scale)
        place = None
        for i in range(m):
            if tableau[i][column] > 0:
                if place is None:
                    place = i
                    continue
                here, best = tableau[i][-1] * tableau[place][column], tableau[place][-1] * tableau[i][column]
                if here < best or (here == best and basis[i] < basis[place]):
                    place = i
        if place is None:
            return None
        last = _pivot(tableau, place, column, last)
        basis[place] = column


def complementary(M: Matrix, q: Vector) -> list[Number] | None:
    """Return z >= 0 with w = M z + q >= 0 and w'z = 0 for a positive semidefinite M; None if there is no such z.

    This is Lemke's method. Ties of the ratio test are broken lexicographically, so that it cannot cycle.
    """
    size = len(q)
    if all(value >= 0 for value in q):
        return [0] * size
    tableau = []  # columns: w, z, the artificial variable, q
    for i, (row, value) in enumerate(zip(M, q, strict=True)):
        unit = [0] * size
        unit[i] = 1
        common = lcm(*(Fraction(entry).denominator for entry in [*row, value]))  # w is in units of 1 / common
        tableau.append([*unit, *(int(-common * entry) for entry in row), -common, int(common * value)])
    artificial = 2 * size
    basis = list(range(size))
    place = 0
    for i in range(1, size):
        here, best = tableau[i][-1] * -tableau[place][artificial], tableau[place][-1] * -tableau[i][artificial]
        if here < best or (here == best and i > place):
            place = i
    tableau[place] = [-entry for entry in tableau[place]]
    last = _pivot(tableau, place, artificial, 1)
    basis[place], entering = artificial, basis[place] + size
    while True:
        candidates = [i for i in range(size) if tableau[i][entering] > 0]
        if not candidates:
            return None
        smallest = _lexicographically_smallest(tableau, candidates, entering, size)
        if artificial in [basis[i] for i in candidates]:
            home = basis.index(artificial)
            if tableau[home][-1] * tableau[smallest][entering] == tableau[smallest][-1] * tableau[home][entering]:
                smallest = home
        last = _pivot(tableau, smallest, entering, last)
        leaving, basis[smallest] = basis[smallest], entering
        if leaving == artificial:
            z: list[Number] = [0] * size
            for i, variable in enumerate(basis):
                if size <= variable < 2 * size:
                    z[variable - size] = Fraction(tableau[i][-1], last)
            return z
        entering = leaving + size if leaving < size else leaving - size


def _lexicographically_smallest(tableau: list[list[int]], candidates: list[int], column: int, size: int) -> int:
    """Return the candidate whose right-hand side and entries of w, divided by that in `column`, are first in order."""
    for place in [-1, *range(size)]:
        best = candidates[0]
        for i in candidates[1:]:
            if tableau[i][place] * tableau[best][column] < tableau[best][place] * tableau[i][column]:
                best = i
        candidates = [
            i
            for i in candidates
            if tableau[i][place] * tableau[best][column] == tableau[best][place] * tableau[i][column]
        ]
        if len(candidates) == 1:
            break
    return candidates[0]
