"""QPLayer on small programs with integer data against exact arithmetic, and tests of this exact arithmetic."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from experiments.benchmark.exact import (
    complementary,
    dot,
    is_positive_semidefinite,
    maximum,
    null_space,
    rank,
    solve,
    times,
)
from experiments.benchmark.integer_draws import cotangents, draw, draw_infeasible, draw_nonconvex, draw_unbounded
from experiments.benchmark.integer_programs import Program, status
from experiments.benchmark.integer_sweep import (
    RIGHT,
    Answer,
    Sample,
    alone,
    checked,
    expected,
    grouped,
    one_sided,
    samples,
    together,
)
from experiments.benchmark.integer_truth import derivative_of, judged, pieces, slope, truth_of

pytestmark = pytest.mark.slow

HALF = Fraction(1, 2)
EYE = ((1, 0), (0, 1))
NONE = ((0, 0), (0, 0))

# min 1/2 |x|^2, x >= 0
KINK = Program(EYE, (0, 0), lower=(0, 0))
# min x1 + x2, x1 + x2 >= 1, x >= 0
TIE = Program(NONE, (1, 1), ((-1, -1),), (-1,), lower=(0, 0))
# max x1 + x2 at a vertex with three rows
VERTEX = Program(NONE, (-1, -1), ((1, 0), (0, 1), (1, 1)), (1, 1, 2))
# 1/2 (x1 + x2 - 1)^2 in a box: the solutions are the segment from (0, 1) to (1, 0)
SEGMENT = Program(((1, 1), (1, 1)), (-1, -1), lower=(-1, -1), upper=(1, 1))
# the same with x2 free: the solutions are the segment from (-1, 2) to (1, 0)
HALF_FREE = Program(((1, 1), (1, 1)), (-1, -1), lower=(-1, None), upper=(1, None))
# ../shared/cases/equality_as_two_inequalities.py: x = (-1, -1, 1)
PAIRS = Program(
    ((9, -1, -6), (-1, 3, 2), (-6, 2, 6)),
    (13, -3, -8),
    ((-1, 1, 0), (1, 1, -1), (-1, -1, -1), (0, -1, 1), (1, 1, 1), (1, -1, 0), (-1, 1, 1), (1, -1, 0)),
    (0, -3, 1, 3, -1, 3, 2, 0),
)
# min 1/2 |x|^2 - x1, x1 + x2 = 1 twice
TWICE = Program(EYE, (-1, 0), A=((1, 1), (1, 1)), b=(1, 1))
# min 1/2 x1^2, |x2| <= x1: x = 0 is the only solution, but x2 is free on [-t, t] for p = (-t, 0)
WEDGE = Program(((1, 0), (0, 0)), (0, 0), ((-1, 1), (-1, -1)), (0, 0))
# min -x1 with x1 <= 1 twice; x2 has a cost of its own
REPEATED = Program(((0, 0), (0, 1)), (-1, 0), ((1, 0), (1, 0)), (1, 1))


def known(program, g):
    return derivative_of(truth_of(program), g)


@pytest.mark.parametrize(
    ("program", "g", "verdict", "with_rows", "gradient"),
    [
        (KINK, (1, 1), "kink", "kink", None),
        (Program(EYE, (0, -1), lower=(0, 0)), (0, 1), "differentiable", "differentiable", (0, -1)),
        (Program(EYE, (0, -1), lower=(0, 0)), (1, 0), "kink", "kink", None),
        (Program(EYE, (1, -1), lower=(0, 0)), (1, 2), "differentiable", "differentiable", (0, -2)),
        (TIE, (1, 0), "not unique", "not unique", None),
        (TIE, (1, 1), "differentiable", "differentiable", (0, 0)),
        (VERTEX, (3, -2), "differentiable", "dependent rows", (0, 0)),
        (SEGMENT, (1, 0), "not unique", "not unique", None),
        (SEGMENT, (1, 1), "kink", "kink", None),
        (HALF_FREE, (1, 1), "differentiable", "differentiable", (0, -1)),
        (PAIRS, (1, 1, 1), "differentiable", "dependent rows", (0, 0, 0)),
        (TWICE, (1, 0), "differentiable", "dependent rows", (-HALF, HALF)),
        (WEDGE, (1, 0), "kink", "kink", None),
        (WEDGE, (0, 1), "kink", "kink", None),
        (REPEATED, (1, 0), "differentiable", "dependent rows", (0, 0)),
        (REPEATED, (0, 1), "differentiable", "dependent rows", (0, -1)),
        (Program(EYE, (3, 4)), (1, 2), "differentiable", "differentiable", (-1, -2)),
    ],
)
def test_truth_of_programs_done_by_hand(program, g, verdict, with_rows, gradient):
    derivative = known(program, g)
    assert (derivative.verdict, derivative.verdict_rows) == (verdict, with_rows)
    assert derivative.gradient == (None if gradient is None else list(gradient))
    assert judged(truth_of(program), g)[0] == verdict


def test_solutions_done_by_hand():
    for program, x, unique in [
        (KINK, (0, 0), True),
        (VERTEX, (1, 1), True),
        (PAIRS, (-1, -1, 1), True),
        (TWICE, (1, 0), True),
        (WEDGE, (0, 0), True),
    ]:
        truth = truth_of(program)
        assert (tuple(truth.point.x), truth.unique) == (x, unique)
    for program in (TIE, SEGMENT, HALF_FREE):
        truth = truth_of(program)
        assert not truth.unique
        assert sum(truth.point.x) == 1


def test_rows_done_by_hand():
    # The pairs of inequalities of PAIRS are rows 0 and 7 with net multiplier 0, 2 and 4 with net multiplier 1.
    truth = truth_of(PAIRS)
    assert [truth.rows[i].index for i in truth.strong] == [0, 1, 2, 4, 7]
    assert truth.dependent
    # Either of two equal rows can have the multiplier, so moving one of them changes x in one direction only.
    truth = truth_of(REPEATED)
    assert truth.strong == truth.droppable == [0, 1]
    assert known(REPEATED, (1, 0)).multipliers is None
    assert slope(truth, (1, 0), (0, 0), (1, 0)).least == 0
    assert slope(truth, (1, 0), (0, 0), (-1, 0)).least == -1
    # If g is orthogonal to the effect of the rows, g'x still has a derivative with respect to them.
    assert known(REPEATED, (0, 1)).multipliers == [0, 0]
    # At its ends the segment is at bounds that its inner points do not reach.
    truth = truth_of(SEGMENT)
    assert [(truth.rows[i].kind, truth.rows[i].index) for i in truth.touched] == [("upper", 0), ("upper", 1)]


def test_slopes_done_by_hand():
    truth = truth_of(SEGMENT)  # (x1 + x2)(p + d) = 1 - max(d1, d2)
    for d in [(1, 0), (-1, 0), (1, 1), (-1, -1), (-2, 3)]:
        found = slope(truth, (1, 1), d)
        assert found.least == found.greatest == -max(d)
    truth = truth_of(WEDGE)
    assert slope(truth, (0, 1), (0, 1)).least == -1
    found = slope(truth, (0, 1), (-1, 0))
    assert (found.least, found.greatest) == (-1, 1)
    assert slope(truth_of(Program(NONE, (1, 0), lower=(0, None))), (1, 0), (0, 1)) is None  # unbounded nearby


def test_pieces_done_by_hand():
    assert sorted(pieces(truth_of(KINK), (1, 1))) == [[-1, -1], [-1, 0], [0, -1], [0, 0]]
    twice = Program(((1,),), (0,), ((-1,), (-3,)), (0, 0))
    assert sorted(pieces(truth_of(twice), (2,))) == [[-2], [0]]
    assert pieces(truth_of(VERTEX), (1, 0)) == [[0, 0]]


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (Program(EYE, (0, 0), A=((1, 1), (1, 1)), b=(1, 2)), "infeasible"),
        (
            Program(NONE, (-1, 0), ((1, 0), (-1, 0)), (0, -1)),
            "infeasible",
        ),  # infeasible, although the objective would be unbounded
        (Program(NONE, (-1, 0), ((0, 1),), (1,)), "unbounded"),
        (Program(((1, -1), (-1, 1)), (-1, -1)), "unbounded"),
        (Program(((1, 0), (0, -1)), (0, 0), lower=(0, 0), upper=(1, 1)), "nonconvex"),
        (Program(((0, 1), (1, 0)), (0, 0), lower=(0, 0), upper=(1, 1)), "nonconvex"),
        (Program(EYE, (0, 0), ((0, 0),), (-1,)), "infeasible"),
        (TIE, "solved"),
    ],
)
def test_status_of_programs_done_by_hand(program, what):
    assert status(program) == what


@pytest.mark.parametrize(
    ("kind", "what"),
    [(draw, "solved"), (draw_infeasible, "infeasible"), (draw_unbounded, "unbounded"), (draw_nonconvex, "nonconvex")],
)
def test_drawn_programs_are_of_their_kind(kind, what):
    assert {status(kind(seed)) for seed in range(60)} == {what}
    assert kind(7) == kind(7)


def test_all_kinds_of_degeneracy_are_drawn():
    seen = Counter()
    for seed in range(150):
        truth = truth_of(draw(seed))
        for g in cotangents(truth.program, seed):
            derivative = derivative_of(truth, g)
            seen[derivative.verdict, truth.unique] += 1
            seen[derivative.verdict_rows, derivative.multipliers is not None] += 1
    assert min(seen["differentiable", True], seen["kink", True], seen["not unique", False]) > 20
    assert min(seen["differentiable", False], seen["dependent rows", True], seen["dependent rows", False]) > 5


def test_truth_agrees_with_exact_one_sided_differences():
    found = Counter()
    for sample in samples(10_000, 10, 0):
        found.update(checked(sample))
    assert set(found) == {"agrees"}


def test_gradients_of_all_arguments_agree_with_a_program_nearby():
    drawn, step, compared = random.Random(2), 10**9, 0

    def moved(rows, changes):
        pairs = zip(rows, changes, strict=True)
        return tuple(tuple(step * a + b for a, b in zip(row, change, strict=True)) for row, change in pairs)

    for found in samples(20_000, 40, 0):
        program, truth = found.program, found.truth
        if truth.status != "solved" or not truth.unique or truth.dependent or None in program.h:
            continue
        names = ["Q", "p", "G", "h", "A", "b"]
        shapes = [program.Q, [program.p], program.G, [program.h], program.A, [program.b]]
        change = {
            name: [[drawn.randint(-2, 2) for _ in row] for row in rows]
            for name, rows in zip(names, shapes, strict=True)
        }
        change["Q"] = [[dot(a, b) for b in change["Q"]] for a in change["Q"]]  # keeps Q positive semidefinite
        nearby = Program(
            moved(program.Q, change["Q"]),
            *moved([program.p], change["p"]),
            moved(program.G, change["G"]),
            *moved([program.h], change["h"]),
            moved(program.A, change["A"]),
            *moved([program.b], change["b"]),
            program.lower,
            program.upper,
        )
        x = truth_of(nearby).point.x
        for which, g in enumerate(found.g):
            if found.derivatives[which].verdict_rows == "differentiable":
                true = expected(found, which, names)
                slope_ = step * (dot(g, x) - dot(g, truth.point.x))
                predicted = sum(dot(a, b) for name in names for a, b in zip(true[name], change[name], strict=True))
                assert float(slope_) == pytest.approx(float(predicted), abs=1e-5)
                compared += 1
    assert compared > 15
    pushed = Program(((1, 0), (0, 1)), (0, 0), lower=(1, None), upper=(None, -1))
    found = Sample(0, pushed, truth_of(pushed), [(3, 5)], [known(pushed, (3, 5))])
    assert expected(found, 0, ["p", "lower", "upper"]) == {"p": [[0, 0]], "lower": [[3, 0]], "upper": [[0, 5]]}


def test_linear_algebra_is_exact():
    drawn = random.Random(0)
    for _ in range(200):
        m, n = drawn.randint(1, 5), drawn.randint(1, 5)
        rows = [[Fraction(drawn.randint(-3, 3), drawn.randint(1, 3)) for _ in range(n)] for _ in range(m)]
        basis = null_space(rows, n)
        assert len(basis) == n - rank(rows, n)
        assert rank(basis, n) == len(basis)
        assert not any(any(times(rows, vector)) for vector in basis)
        right = times(rows, [drawn.randint(-2, 2) for _ in range(n)])
        assert times(rows, solve(rows, right, n)) == right
        square = [[dot(a, b) for b in rows] for a in rows]
        assert is_positive_semidefinite(square)
        square[0][0] -= dot(rows[0], rows[0]) + 1
        assert not is_positive_semidefinite(square)
    assert solve([[1, 1], [2, 2]], [1, 3], 2) is None


def test_linear_programs_are_exact():
    square = [[1, 0], [-1, 0], [0, 1], [0, -1]]
    assert maximum([2, -3], square, [1, 1, Fraction(1, 3), 2]) == 8
    assert maximum([1, 1], [[1, 0]], [1]) is None
    assert maximum([0, 0], [], []) == 0
    # Beale's program, on which the simplex method with the largest coefficient cycles
    cost = [Fraction(3, 4), -150, Fraction(1, 50), -6]
    rows = [[Fraction(1, 4), -60, Fraction(-1, 25), 9], [HALF, -90, Fraction(-1, 50), 3], [0, 0, 1, 0]]
    signs = [[-int(i == j) for j in range(4)] for i in range(4)]
    assert maximum(cost, [*rows, *signs], [0, 0, 1, 0, 0, 0, 0]) == Fraction(1, 20)


def test_complementary_solutions_are_exact():
    drawn = random.Random(1)
    solved = 0
    for _ in range(100):
        n = drawn.randint(1, 5)
        factor = [[drawn.randint(-2, 2) for _ in range(n)] for _ in range(drawn.randint(0, n))]
        skew = [[drawn.randint(-2, 2) for _ in range(n)] for _ in range(n)]
        M = [
            [sum(row[i] * row[j] for row in factor) + skew[i][j] - skew[j][i] for j in range(n)] for i in range(n)
        ]  # positive semidefinite
        q = [Fraction(drawn.randint(-3, 3), drawn.randint(1, 3)) for _ in range(n)]
        z = complementary(M, q)
        if z is not None:
            w = [a + b for a, b in zip(times(M, z), q, strict=True)]
            assert min(*z, *w, 0) == 0
            assert dot(z, w) == 0
            solved += 1
        else:  # no z >= 0 with M z + q >= 0: some y >= 0 has M'y <= 0 and q'y < 0
            transposed = [list(column) for column in zip(*M, strict=True)]
            signs = [[-int(i == j) for j in range(n)] for i in range(n)]
            fall = [-value for value in q]
            assert maximum(fall, [*transposed, *signs, fall], [*([0] * (2 * n)), 1]) == 1
    assert solved > 30


FOUND = samples(0, 120, 10)


def refuted(answers: list[Answer]) -> list[str]:
    """Return the wrong answers; refusing a gradient that exists counts as wrong."""
    return [str(answer) for answer in answers if not answer.as_true]


@pytest.mark.parametrize("asked", ["p", "right-hand sides"])
def test_verdicts_and_gradients_of_single_programs(asked):
    answers = [answer for sample in FOUND for answer in alone(sample, asked)]
    assert refuted(answers) == []
    assert sum(answer.said == RIGHT for answer in answers) > 60


@pytest.mark.parametrize("asked", ["p", "right-hand sides"])
def test_verdicts_and_gradients_in_batches(asked):
    assert refuted([answer for group in grouped(FOUND) for answer in together(group, asked)]) == []


def test_one_sided_policy_returns_the_gradient_of_a_smooth_piece():
    kinks = [
        (sample, which)
        for sample in FOUND
        for which, derivative in enumerate(sample.derivatives)
        if derivative.verdict == "kink" and sample.truth.unique and not derivative.isolated
    ]
    assert len(kinks) > 10
    assert {one_sided(sample, which) for sample, which in kinks} == {"the gradient of a smooth piece"}
