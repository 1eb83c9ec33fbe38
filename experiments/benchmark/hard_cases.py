"""Small quadratic programs on which layers give wrong answers or fail with unintended errors, with right answers.

The programs are min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b. The right answer is the solution and the gradient of
sum(x) with respect to p, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64
INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """A program and its right answer: x and the gradient, or a refusal.

    Attributes:
        name: What is special about the program.
        Q, p, G, h, A, b: The program; None for no rows.
        x: The solution.
        gradient: The gradient of sum(x) with respect to p.
        refusal: "infeasible", "unbounded", "nonconvex", "not unique" or "kink" if there is no solution or no gradient.
        unit: Unit in which errors of x are measured; None for max(1, |x|).
    """

    name: str
    Q: Tensor
    p: Tensor
    G: Tensor | None = None
    h: Tensor | None = None
    A: Tensor | None = None
    b: Tensor | None = None
    x: Tensor | None = None
    gradient: Tensor | None = None
    refusal: str = ""
    unit: Tensor | None = None


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _m(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def cases() -> list[Case]:
    """Return all cases."""
    groups = (_equalities, _networks, _no_solution, _bounds, _penalties, _units, _degenerate, _arguments)
    return [case for group in groups for case in group()]


P3 = _t(0.1, 0.2, 0.3)
ON_SIMPLEX = _t(13, 10, 7) / 30  # nearest point of the simplex to -P3
NOWHERE = torch.zeros(3, dtype=F64)


def _equalities() -> Iterator[Case]:
    """Yield programs whose equalities are linearly dependent."""
    positive = -_eye(3), NOWHERE
    ones = torch.ones(1, 3, dtype=F64)
    yield Case(
        "an equality given twice",
        *(_eye(3), P3),
        *positive,
        A=ones.expand(2, 3),
        b=_t(1, 1),
        x=ON_SIMPLEX,
        gradient=NOWHERE,
    )
    yield Case(
        "an equality times two",
        *(_eye(2), _t(-2, -1)),
        *(-_eye(2), _t(0, 0)),
        A=_m((1, 2), (2, 4)),
        b=_t(1, 2),
        x=_t(1, 0),
        gradient=_t(0, 0),
    )
    yield Case("an equality of zeros", *(_eye(3), P3), *positive, A=0 * ones, b=_t(0), x=NOWHERE, gradient=NOWHERE)
    yield Case(
        "an inequality of zeros",
        *(_eye(2), _t(-2, 1)),
        *(_m((-1, 0), (0, -1), (0, 0)), _t(0, 0, 0)),
        x=_t(2, 0),
        gradient=_t(-1, 0),
    )
    yield Case(
        "three equalities in two variables",
        *(_eye(2), _t(-2, -1)),
        *(-_eye(2), _t(0, 0)),
        A=_m((1, 1), (1, 0), (0, 1)),
        b=_t(3, 1, 2),
        x=_t(1, 2),
        gradient=_t(0, 0),
    )
    for k in (1.0, 10.0, 0.1):
        yield Case(
            f"x1 = {k:g} x2 at the corner of x >= 0",
            *(_eye(2), _t(1, 1)),
            *(-_eye(2), _t(0, 0)),
            A=_m((1, -k)),
            b=_t(0),
            x=_t(0, 0),
            gradient=_t(0, 0),
        )
    yield Case(
        "an equality as two inequalities",
        *(_eye(3), P3),
        *(_m((1, 1, 0), (-1, -1, 0)), _t(1, -1)),
        x=_t(0.55, 0.45, -0.3),
        gradient=_t(0, 0, -1),
    )
    yield Case(
        "two equalities as inequalities, a vertex",
        _m((9, -1, -6), (-1, 3, 2), (-6, 2, 6)),
        _t(13, -3, -8),
        _m((-1, 1, 0), (1, 1, -1), (-1, -1, -1), (0, -1, 1), (1, 1, 1), (1, -1, 0), (-1, 1, 1), (1, -1, 0)),
        _t(0, -3, 1, 3, -1, 3, 2, 0),
        x=_t(-1, -1, 1),
        gradient=NOWHERE,
    )


def _networks() -> Iterator[Case]:
    """Yield assignment, transport and a shortest path, with a redundant equality in each."""

    def marginals(k: int, m: int) -> Tensor:
        left, right = torch.ones(1, m, dtype=F64), torch.ones(1, k, dtype=F64)
        return torch.cat([torch.kron(_eye(k), left), torch.kron(right, _eye(m))])

    cost = _t(4, 1, 3, 2, 0, 5, 3, 2, 2)  # the second-best assignment costs 6, the best one 5
    best = _t(0, 1, 0, 1, 0, 0, 0, 0, 1)
    for ridge in (0.0, 0.01):
        yield Case(
            f"assignment, ridge {ridge:g}",
            *(ridge * _eye(9), cost, -_eye(9), torch.zeros(9, dtype=F64)),
            *(marginals(3, 3), torch.ones(6, dtype=F64)),
            x=best,
            gradient=0 * best,
        )
    cost, best = _t(1, 4, 5, 3, 2, 6), _t(2, 0, 1, 0, 3, 1)  # the unused routes have reduced costs 3 and 1
    for ridge in (0.0, 0.01):
        yield Case(
            f"transport, ridge {ridge:g}",
            *(ridge * _eye(6), cost, -_eye(6), torch.zeros(6, dtype=F64)),
            *(marginals(2, 3), _t(3, 4, 2, 3, 2)),
            x=best,
            gradient=0 * best,
        )
    arcs = [((i, j), (i + di, j + dj)) for i in range(3) for j in range(3) for di, dj in ((0, 1), (1, 0))]
    arcs = [(s, t) for s, t in arcs if max(t) < 3]
    balance, sent = torch.zeros(9, len(arcs), dtype=F64), torch.zeros(9, dtype=F64)
    for column, ((si, sj), (ti, tj)) in enumerate(arcs):
        balance[3 * si + sj, column], balance[3 * ti + tj, column] = 1, -1
    sent[0], sent[-1] = 1, -1
    path = [((0, 0), (0, 1)), ((0, 1), (0, 2)), ((0, 2), (1, 2)), ((1, 2), (2, 2))]
    best = torch.tensor([float(arc in path) for arc in arcs], dtype=F64)
    yield Case(
        "shortest path, all nodes",
        *(torch.zeros(12, 12, dtype=F64), 2 - best, -_eye(12), torch.zeros(12, dtype=F64)),
        *(balance, sent),
        x=best,
        gradient=0 * best,
    )


def _no_solution() -> Iterator[Case]:
    """Yield programs that have no solution, more than one, or no derivative."""
    eye, zero = _eye(2), torch.zeros(2, 2, dtype=F64)
    box = torch.cat([_eye(3), -_eye(3)]), torch.ones(6, dtype=F64)
    indefinite = torch.diag(_t(1, -1, 1))
    yield Case(
        "equalities that contradict",
        *(_eye(3), P3, -_eye(3), NOWHERE, torch.ones(2, 3, dtype=F64), _t(1, 2)),
        refusal="infeasible",
    )
    yield Case("x >= 1 and x <= 0", eye, _t(1, 1), _m((-1, 0), (1, 0)), _t(-1, 0), refusal="infeasible")
    yield Case("indefinite Q in a box", indefinite, _t(0.3, 0.1, 0.1), *box, refusal="nonconvex")
    yield Case("indefinite Q, one row", indefinite, _t(0.3, 0.1, 0.1), _eye(3)[:1], _t(1), refusal="nonconvex")
    yield Case("concave, x <= 1", -eye, _t(0.3, 0.1), eye, _t(1, 1), refusal="nonconvex")
    yield Case("LP that is unbounded", zero, _t(-1, 0), _m((0, 1)), _t(1), refusal="unbounded")
    yield Case(
        "LP that is unbounded, with equality",
        *(torch.zeros(3, 3, dtype=F64), _t(-1, -2, 1), _m((-1, -1, 0)), _t(0), _m((0, 0, 1)), _t(1)),
        refusal="unbounded",
    )
    yield Case(
        "LP with a variable that costs nothing",
        *(zero, _t(1, 0), _m((-1, 0), (0, -1), (0, 1)), _t(0, 0, 1)),
        refusal="not unique",
    )
    yield Case("kink: a bound with multiplier 0", eye, _t(0, -1), -eye, _t(0, 0), refusal="kink")


def _bounds() -> Iterator[Case]:
    """Yield an LP and a QP with upper bounds that are never active."""
    for big in (1e6, 1e10, 1e20, INFINITY):
        rows = torch.cat([-_eye(3), _eye(3)]), torch.cat([NOWHERE, torch.full((3,), big, dtype=F64)])
        one = torch.ones(1, 3, dtype=F64), _t(1)
        yield Case(
            f"LP, unused bounds of {big:g}",
            *(torch.zeros(3, 3, dtype=F64), _t(0, 0.2, 2), *rows, *one),
            x=_t(1, 0, 0),
            gradient=NOWHERE,
        )
        yield Case(
            f"QP, unused bounds of {big:g}",
            *(_eye(3), _t(-1, 0.5, -2), *rows),
            x=_t(1, 0, 2),
            gradient=_t(-1, 0, -1),
        )


def _penalties() -> Iterator[Case]:
    """Yield soft constraints with linear penalties that are larger than necessary."""
    rows = _m((0.6, -1, 0), (0.8, 0, -1), (0, -1, 0), (0, 0, -1)), _t(0.5, 0.5, 0, 0)
    for penalty in (1e2, 1e4, 1e6, 1e8, 1e10):
        yield Case(
            f"soft rows, penalty {penalty:.0e}",
            *(torch.diag(_t(1, 0, 0)), _t(-1.2, penalty, penalty), *rows),
            x=_t(0.625, 0, 0),
            gradient=NOWHERE,
        )


def _units() -> Iterator[Case]:
    """Yield well-conditioned programs in badly scaled units of rows, cost and variables."""
    for scale in (1e-10, 1e-5, 1e5):
        yield Case(
            f"rows times {scale:.0e}",
            *(_eye(4), _t(-1, -0.5, 0, 0.3)),
            *(scale * _m((1, 0, 0, 0), (0, 1, 1, 0)), scale * _t(0.1, 0.2)),
            x=_t(0.1, 0.35, -0.15, -0.3),
            gradient=_t(0, 0, 0, -1),
        )
    for cost in (1e-12, 1e-6, 1e6, 1e12):
        yield Case(
            f"cost times {cost:.0e}",
            *(cost * _eye(3), cost * _t(-1, 0.5, -2), -_eye(3), NOWHERE),
            x=_t(1, 0, 2),
            gradient=_t(-1, 0, -1) / cost,
        )
    for a, e in ((1e3, 1e-7), (1e5, 1e-4), (1e9, 0.5)):
        yield Case(
            f"x1 = {a:.0e} beside x2 = 0",
            *(_eye(2), _t(-a, e)),
            *(_m((0, -1), (0, 1), (1, 0)), _t(0, 10, 2 * a)),
            x=_t(a, 0),
            gradient=_t(-1, 0),
            unit=_t(a, 100 * e),
        )


def _degenerate() -> Iterator[Case]:
    """Yield vertices with more active rows than variables, and weakly active rows that do not affect the derivative."""
    zero = torch.zeros(2, 2, dtype=F64)
    yield Case(
        "LP, three rows through a vertex",
        *(zero, _t(-1, -1), _m((1, 0), (0, 1), (1, 1)), _t(1, 1, 2)),
        x=_t(1, 1),
        gradient=_t(0, 0),
    )
    yield Case(
        "a weak row that follows from strong ones",
        *(_eye(2), _t(1, 1), _m((-1, 0), (0, -1), (-1, -1)), _t(0, 0, 0)),
        x=_t(0, 0),
        gradient=_t(0, 0),
    )
    row, y = _t(1, 2, 2, 4, 0) / 5, torch.full((5,), 3.0, dtype=F64)
    others = torch.randn(399, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    yield Case(
        "5 variables, 400 rows",
        *(_eye(5), -y),
        torch.cat([row[None], torch.nn.functional.normalize(others)]),
        torch.cat([_t(1), torch.full((399,), 9.0, dtype=F64)]),
        x=y - row * (row @ y - 1),
        gradient=row * row.sum() - 1,
    )


def _arguments() -> Iterator[Case]:
    """Yield programs whose arguments are missing, empty or of integer dtype."""
    plane, x, gradient = (_m((1, 1, 0)), _t(1)), _t(0.55, 0.45, -0.3), _t(0, 0, -1)
    empty = torch.Tensor()
    yield Case("no inequalities (None)", _eye(3), P3, None, None, *plane, x=x, gradient=gradient)
    yield Case("no inequalities (empty)", _eye(3), P3, empty, empty, *plane, x=x, gradient=gradient)
    yield Case(
        "integer Q",
        *(torch.diag(torch.tensor([2, 2, 2])), _t(1, -3, 0.5), -_eye(3), NOWHERE),
        x=_t(0, 1.5, 0),
        gradient=_t(0, -0.5, 0),
    )
