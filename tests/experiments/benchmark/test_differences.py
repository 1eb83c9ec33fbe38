"""The reference solver of the benchmark, and the differences by which answers are judged."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from experiments.benchmark import reference as references
from experiments.benchmark import truth as truths
from experiments.benchmark.collection import Arguments, arguments, read
from experiments.benchmark.differences import STEPS, Difference, difference, gap, judge, plateau
from experiments.benchmark.reference import Reference
from experiments.benchmark.truth import truth, truth_of
from tests.experiments.benchmark.small_collection import write_small

has_piqp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("qpsolvers", "piqp", "clarabel")),
    reason="qpsolvers with piqp and Clarabel are only in the environment of the peers",
)


def clipped(args):
    """The exact solution of min 1/2 |x|^2 + p'x in a box."""
    return np.clip(-args.p, args.lower, args.upper)


def box(*p):
    n, none, zero = len(p), sp.csr_matrix((0, len(p))), np.zeros(0)
    return Arguments(sp.identity(n, format="csc"), np.array(p), none, zero, none, zero, np.zeros(n), np.ones(n))


@pytest.mark.parametrize(
    ("p", "kind", "left", "right"),
    [
        (-0.3, "smooth", -1, -1),
        (0.3, "smooth", 0, 0),
        (0.0, "kink", -1, 0),
        (-1.0, "kink", 0, -1),
        (-1e-5, "smooth", -1, -1),
    ],
)
def test_differences_find_derivatives_and_kinks(p, kind, left, right):
    found = difference(clipped, box(p), "p", np.ones(1), np.ones(1))
    assert found.kind == kind
    assert (found.left, found.right) == pytest.approx((left, right), abs=1e-6)


def test_differences_find_jumps_and_sides_without_a_solution():
    assert difference(lambda a: np.sign(a.p), box(0.0), "p", np.ones(1), np.ones(1)).kind == "jump"
    for ending in (1, -1):
        found = difference(lambda a, s=ending: a.p if s * a.p[0] <= 0 else None, box(0.0), "p", np.ones(1), np.ones(1))
        assert found.kind == "infeasible"


def test_differences_of_a_noisy_solver_are_not_resolved():
    rng = np.random.default_rng(0)
    noisy = difference(lambda a: -a.p + 1e-3 * rng.standard_normal(1), box(-0.3), "p", np.ones(1), np.ones(1))
    assert noisy.kind == "unresolved"
    waves = (np.array([np.sin(1 / step)]) for step in STEPS)
    assert plateau(STEPS, waves, np.zeros(1), np.ones(1), 0.0) is None
    assert difference(lambda a: None, box(-0.3), "p", np.ones(1), np.ones(1)).kind == "unresolved"


def test_no_more_solutions_are_asked_for_than_a_slope_takes():
    calls = []

    def solver(args):
        calls.append(args.p[0])
        return clipped(args)

    assert difference(solver, box(-0.3), "p", np.ones(1), np.ones(1)).kind == "smooth"
    assert len(calls) < 25
    assert max(abs(np.array(calls) + 0.3)) < 1e-6, "all are near"


def test_a_slope_beyond_a_kink_is_found_where_noise_hides_the_nearest_steps():
    rng = np.random.default_rng(1)
    found = difference(lambda a: -a.p + 1e-10 * rng.standard_normal(1), box(-0.3), "p", np.ones(1), np.ones(1))
    assert found.kind == "smooth"
    assert found.value == pytest.approx(-1, abs=3 * found.uncertainty)
    assert found.uncertainty < 1e-3


def test_a_slope_is_found_between_kinks_that_are_close():
    apart = 2e-9 * 2.0 ** np.arange(30)
    knots = np.concatenate([-apart[::-1], apart])
    slopes = np.random.default_rng(2).uniform(1, 5, len(knots) - 1)
    slopes[len(apart) - 1] = 3.0
    values = np.concatenate([[0.0], np.cumsum(slopes * np.diff(knots))])
    values -= np.interp(0.0, knots, values)
    solver = lambda args: np.interp(args.p, knots, values)  # noqa: E731
    found = difference(solver, box(0.0), "p", np.ones(1), np.ones(1))
    assert found.kind == "smooth"
    assert found.value == pytest.approx(3.0, rel=1e-4)


def test_a_wrong_derivative_is_called_wrong():
    truth = Difference("smooth", 2.0, 2.0, 1e-6)
    assert judge(2.0, truth, 5.0) == "confirmed"
    assert judge(2.0 + 1e-6, truth, 5.0) == "confirmed"
    assert judge(2.01, truth, 5.0) == "contradicted"
    assert judge(-2.0, truth, 5.0) == "contradicted"
    assert judge(0.0, truth, 5.0) == "contradicted"
    assert judge(float("nan"), truth, 5.0) == "contradicted"
    assert judge(2.0005, truth, 5.0) == "close"
    assert judge(1e-15, Difference("smooth", 0.0, 0.0, 0.0), 1.0) == "confirmed", "rounding is no error"
    for kind in ("kink", "jump", "infeasible"):
        assert judge(2.0, Difference(kind, 2.0, 1.0, 1e-6), 5.0) == "contradicted"
    assert judge(2.0, Difference("unresolved"), 5.0) == "unresolved"


@has_piqp
def test_the_reference_is_exact_and_sees_what_is_not_unique():
    args = box(-0.3, 0.2, -2.0)
    x = Reference(args)(args)
    assert np.abs(x - [0.3, 0, 1]).max() < 1e-15
    lp = replace(box(1.0, 0.0), Q=sp.csc_matrix((2, 2)))
    assert gap(Reference(lp), lp, np.array([1.0, 0]), 1.0) == 0
    assert gap(Reference(lp), lp, np.array([0, 2.0]), 1.0) == pytest.approx(2)
    ray = replace(lp, upper=np.array([1, np.inf]))
    assert gap(Reference(ray), ray, np.array([0, 2.0]), 1.0) == np.inf


@has_piqp
def test_a_program_near_another_is_solved_on_its_active_set_and_a_far_one_by_piqp(monkeypatch):
    rng = np.random.default_rng(0)
    args = box(*(0.9 * rng.standard_normal(30)))
    reference, solved, asked = Reference(args), references.solved, []
    monkeypatch.setattr(references, "solved", lambda args, settings: asked.append(settings) or solved(args, settings))
    for step, expected in ((0.0, 1), (1e-9, 1), (-1e-6, 1), (1.0, 2), (0.0, 2)):
        moved = replace(args, p=args.p + step * rng.standard_normal(30))
        assert np.abs(reference(moved) - clipped(moved)).max() < 1e-15
        assert len(asked) == expected, f"step {step}"


@has_piqp
def test_no_solution_is_none_and_not_a_point():
    args = box(-0.3, 0.2)
    crossed = replace(args, lower=np.array([0.0, 2.0]))
    assert Reference(args)(crossed) is None
    falling = replace(args, Q=sp.csc_matrix((2, 2)), upper=np.full(2, np.inf))
    assert Reference(falling)(falling) is None


@has_piqp
def test_the_references_gradient_is_that_of_its_differences():
    rng = np.random.default_rng(3)
    n, m = 12, 4
    root = rng.standard_normal((n, n))
    args = Arguments(
        *(sp.csc_matrix(root @ root.T), rng.standard_normal(n)),
        *(sp.csr_matrix(rng.standard_normal((m, n))), np.full(m, 0.05)),
        *(sp.csr_matrix(rng.standard_normal((2, n))), rng.standard_normal(2)),
        *(np.full(n, -0.2), np.full(n, np.inf)),
    )
    weights, direction, reference = rng.standard_normal(n), rng.standard_normal(n), Reference(args)
    with pytest.raises(ValueError, match="gradient needs a solution"):
        reference.gradient(weights)
    x = reference(args)
    assert (x <= -0.2 + 1e-12).any(), "some bounds are active"
    gradient = reference.gradient(weights)
    found = difference(Reference(args), args, "p", direction, weights)
    assert found.kind == "smooth"
    assert gradient @ direction == pytest.approx(found.value, rel=1e-6)


@has_piqp
def test_the_truth_of_a_problem_is_that_of_its_arguments(tmp_path):
    write_small(tmp_path)
    args = arguments(read(tmp_path, "SMALL"))
    found = truth_of(tmp_path, "SMALL")
    assert list(found.along) == truths.given(args) == ["p", "b", "h", "lower", "upper"]
    assert all(len(along) == truths.DIRECTIONS for along in found.along.values())
    for name, along in found.along.items():
        infinite = ~np.isfinite(getattr(args, name))
        assert all((one.direction[infinite] == 0).all() for one in along), "what is infinite does not change"
    again = truth_of(tmp_path, "SMALL")
    assert (again.along["p"][0].direction == found.along["p"][0].direction).all()


@has_piqp
def test_the_truth_tells_kinks_and_solutions_that_are_not_unique():
    rng, w = np.random.default_rng(0), np.array([1.0, 2.0])
    assert {one.difference.kind for one in truth(box(-0.3, 0.0), w, rng).along["p"]} == {"kink"}
    assert {one.difference.kind for one in truth(box(-0.3, 0.5), w, rng).along["p"]} == {"smooth"}
    many = truth(replace(box(1.0, 0.0), Q=sp.csc_matrix((2, 2))), w, rng)
    assert many.gap == pytest.approx(2)
    assert not many.along
    none = truth(replace(box(1.0, 0.0), lower=np.full(2, 2.0)), w, rng)
    assert np.isnan(none.reach)
    assert not none.along
