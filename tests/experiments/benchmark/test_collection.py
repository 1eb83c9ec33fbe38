"""The benchmark of quadratic programs: answers of libraries to the collection, their judgement, and the page."""

import importlib.util
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.benchmark import collection, collection_report, collection_run, large_sparse, qp_report
from experiments.benchmark.differences import Difference
from experiments.benchmark.examination import Finding, Observation, examine, finding
from experiments.benchmark.libraries import LIBRARIES, Answer, Library, Prepared, ask
from experiments.benchmark.optima import corrected, recomputed
from experiments.benchmark.truth import Along, Truth, given, truth_of, weights
from foldopt.errors import KinkError
from scripts import bench_qp
from tests.experiments.benchmark.small_collection import write_small

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[3].parent / "shared" / "maros_meszaros"
has_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the Maros-Meszaros problems are not there: ../shared/maros_meszaros"
)
has_piqp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("qpsolvers", "piqp", "clarabel")),
    reason="qpsolvers with piqp and Clarabel are only in the environment of the peers",
)
has_peers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("moreau", "dqp")),
    reason="moreau and libdqp are only in the environment of the peers",
)


def library(solve, verdict=str, refuses=("ValueError: no solution",)):
    return Library("own", "", refuses, lambda args, name: Prepared(solve, verdict))


def small(tmp_path):
    write_small(tmp_path)
    problem = collection.read(tmp_path, "SMALL")
    return problem, collection.arguments(problem)


@pytest.mark.parametrize("name", ["p", "b", "h", "lower", "upper"])
def test_foldopt_is_asked_for_each_gradient_of_a_sparse_program(tmp_path, name):
    _, args = small(tmp_path)
    w = np.array([1.0, -2.0, 0.5])
    answer = ask(LIBRARIES["foldopt"], args, name, w)
    assert (answer.said, answer.verdict) == ("answered", "differentiable")
    assert answer.seconds_forward > 0
    assert answer.seconds_backward > 0
    assert answer.peak_bytes >= 0
    rng = np.random.default_rng(0)
    finite = np.isfinite(getattr(args, name))
    direction = np.where(finite, rng.standard_normal(len(finite)), 0.0)

    def value(step):
        moved = replace(args, **{name: np.where(finite, getattr(args, name) + step * direction, getattr(args, name))})
        return w @ ask(LIBRARIES["foldopt"], moved, name, w).x

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert answer.gradient[finite] @ direction[finite] == pytest.approx(slope, abs=1e-8)


@has_peers
@pytest.mark.parametrize("key", [key for key in LIBRARIES if key != "foldopt"])
def test_every_library_gets_the_same_program(tmp_path, key):
    _, args = small(tmp_path)
    w = np.array([1.0, -2.0, 0.5])
    ours, theirs = (ask(LIBRARIES[name], args, "p", w) for name in ("foldopt", key))
    assert theirs.said == "answered", theirs.error
    assert np.abs(theirs.x - ours.x).max() < 1e-4
    assert np.abs(theirs.gradient - ours.gradient).max() < 1e-3


def test_errors_refusals_and_nan_are_told_apart(tmp_path):
    _, args = small(tmp_path)

    def raises(error):
        def solve(p):
            raise error

        return ask(library(solve), args, "p", np.ones(3))

    assert raises(ValueError("no solution here")).said == "refused"
    assert raises(ValueError("shape")).said == "raw"
    assert raises(IndexError("7")).error == "IndexError: 7"
    kink = raises(KinkError("at x[0]"))
    assert (kink.said, kink.verdict) == ("refused", "kink")
    nan = ask(library(lambda p: math.nan * p), args, "p", np.ones(3))
    assert (nan.said, nan.error, nan.x) == ("refused", "NaN", None)
    late = ask(library(lambda p: (p * torch.zeros(3, dtype=p.dtype)).detach() + p[:0].sum()), args, "p", np.ones(3))
    assert late.said == "answered", "a gradient of zeros is an answer"
    cut = ask(library(lambda p: p.detach()), args, "p", np.ones(3))
    assert cut.said == "raw"
    assert cut.x is not None, "what came before the error is kept"


def test_the_observation_is_what_x_is_worth_in_the_units_of_the_file(tmp_path):
    problem, args = small(tmp_path)
    seen = examine(tmp_path, "foldopt", "SMALL", "p")
    x = ask(LIBRARIES["foldopt"], args, "p", weights("SMALL", 3)).x
    assert seen.objective == problem.objective(x)
    assert max(seen.row, seen.bound) < 1e-12
    assert seen.answer.x is None


def observed(**changes):
    """The observation of an answer with objective 10, the gradient (1, 2) and a verdict."""
    answer = Answer("answered", gradient=np.array([1.0, 2.0]), verdict="differentiable")
    return Observation(replace(answer, **changes), 10.0, 0.0, 0.0)


def true(kind="smooth", value=3.0, gap=0.0):
    """The truth along (1, 1), by default equal to the derivative of `observed`."""
    along = (Along(np.ones(2), Difference(kind, value, value, 1e-6)),)
    return Truth(gap, 1.0, {} if gap > 0 else {"p": along, "b": along})


def judged(seen, truth, optimum=10.0, argument="p"):
    return finding("foldopt", "A", argument, 2, optimum, seen, truth)


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (true(), "confirmed"),
        (true(value=3.0015), "close"),
        (true(value=3.1), "contradicted"),
        (true("kink"), "contradicted (kink)"),
        (true("jump"), "contradicted (jump)"),
        (true("unresolved"), "unresolved"),
        (true(gap=1.0), "contradicted (not unique)"),
        (None, "not compared"),
        (Truth(), "not compared"),
    ],
)
def test_a_gradient_is_judged_by_differences(truth, said):
    assert judged(observed(), truth).derivative == said


@pytest.mark.parametrize(
    ("verdict", "truth", "said"),
    [
        ("kink", true("kink"), "kink confirmed"),
        ("kink", true(), "kink contradicted"),
        ("kink", true("unresolved"), "kink unresolved"),
        ("kink", true(gap=1.0), "kink confirmed"),
        ("dependent rows", true("infeasible"), "dependent rows confirmed"),
        ("not unique", true(gap=1.0), "not unique confirmed"),
        ("not unique", true("kink"), "not unique contradicted"),
        ("not unique", true("jump", gap=math.nan), "not unique confirmed"),
        ("not unique", true(gap=math.nan), "not unique unresolved"),
        ("", true("kink"), "refused confirmed"),
        ("", true(), "refused contradicted"),
        ("kink", None, "not compared"),
    ],
)
def test_a_refusal_is_judged_by_its_cause(verdict, truth, said):
    seen = observed(said="refused", gradient=None, verdict=verdict)
    assert judged(seen, truth, argument="b").derivative == said


def test_the_direction_that_fares_worst_counts():
    right, wrong = true().along["p"][0], true(value=9.0).along["p"][0]
    assert judged(observed(), replace(true(), along={"p": (right, wrong)})).derivative == "contradicted"
    assert judged(observed(), replace(true(), along={"p": (wrong, right)})).derivative == "contradicted"


def test_a_solution_is_judged_by_objective_and_rows():
    assert judged(observed(), true()).solution == "solved"
    assert judged(observed(), true(), optimum=10.001).solution == "wrong"
    assert judged(replace(observed(), row=1e-7), true()).solution == "wrong"
    assert judged(Observation(Answer("raw", error="time limit of 60 s")), true()).solution == ""


def test_an_optimum_is_corrected_only_where_two_solvers_agree_on_another():
    assert corrected(100.0, {"piqp": 10.0, "Clarabel": 10.0 + 1e-8}) == 10.0
    assert corrected(100.0, {"piqp": 10.0, "Clarabel": 10.1}) == 100.0
    assert corrected(100.0, {"piqp": 10.0, "Clarabel": math.nan}) == 100.0
    assert corrected(10.0000001, {"piqp": 10.0, "Clarabel": 10.0}) == 10.0000001
    assert corrected(100.0, {}) == 100.0


@has_piqp
def test_a_misprint_is_found_and_all_is_judged_by_the_right_optimum(tmp_path):
    write_small(tmp_path)
    problem = collection.read(tmp_path, "SMALL")
    values = recomputed(tmp_path, "SMALL")
    assert abs(values["piqp"] - problem.optimum) > 0.1, "the file's optimum is made up"
    lines = []
    findings = collection_run.examined(tmp_path, ["SMALL"], lines.append)
    ours = findings[findings["library"] == "foldopt"]
    assert list(ours["argument"]) == given(collection.arguments(problem))
    assert set(ours["solution"]) == {"solved"}
    assert set(ours["derivative"]) == {"confirmed"}
    assert collection_report.misprints(ours)[0][:2] == ["SMALL", "7.25"]
    assert "SMALL" in "\n".join(collection_report.report(findings))
    assert any("differences taken" in line for line in lines)


def rows(*changes):
    base = Finding(
        *("foldopt", "A", "p", 2, "answered", "solved", "differentiable", "confirmed", 1.0, 0.0, 0.0, 0.0),
        *(0.1, 0.1, 1e6),
    )
    size = {"equalities": 0, "inequalities": 1, "bounds": 4, "published": 1.0}
    return pd.DataFrame([{**asdict(replace(base, **change)), **size} for change in changes])


def test_the_page_counts_what_is_in_its_tables():
    findings = rows(
        {},
        {"argument": "h", "derivative": "contradicted (kink)"},
        {"problem": "B", "said": "refused", "solution": "", "derivative": "not compared", "error": "NonconvexError: Q"},
        {"problem": "C", "said": "refused", "solution": "wrong", "verdict": "kink", "derivative": "kink confirmed"},
        {"problem": "D", "said": "raw", "solution": "", "derivative": "not compared", "error": "IndexError: 7"},
        {"problem": "E", "said": "refused", "verdict": "not unique", "derivative": "not unique contradicted"},
        {"problem": "F", "said": "raw", "solution": "", "derivative": "not compared", "error": "time limit of 60 s"},
        {"problem": "G", "n": 9000, "derivative": "not compared", "seconds_backward": 7.0},
        {"library": "moreau", "derivative": "contradicted", "seconds_forward": 1.0},
        {"library": "moreau", "problem": "C", "derivative": "contradicted (kink)"},
        {"library": "moreau", "problem": "E", "objective_error": 1e-3},
    )
    ours = findings[findings["library"] == "foldopt"]
    counts = dict(collection_report.summary(ours))
    assert counts["Problems"] == "7"
    assert counts["Wrong x without an error"] == "C"
    assert counts["Raw exceptions"] == "D (IndexError)"
    assert counts["Over 60 s"] == "F"
    assert counts["Not solved, refused by cause"] == "B (NonconvexError)"
    assert counts["Slowest (s)"] == "7.1"
    assert counts["Given, and confirmed by differences"] == counts["Given, and contradicted by differences"] == "1"
    assert counts["Refused, kink, which differences confirm"] == "1"
    assert counts["Refused, though differences see a derivative (†)"] == "1"
    page = "\n".join(collection_report.report(findings))
    assert (
        "| A | 2 | 0 | 1 | 4 | yes | 0e+00 | 0e+00 | 0e+00 | right |  | **wrong** (kink) |  |  | 0.1 | 0.1 | 1 |"
        in page
    )
    assert "| E | 2 | 0 | 1 | 4 | yes | 0e+00 | 0e+00 | 0e+00 | not unique † |" in page
    assert "| G | 9000 | 0 | 1 | 4 | yes | 0e+00 | 0e+00 | 0e+00 | differentiable ‡ |" in page
    assert "| foldopt | 1 | 1 | 0 | 0 | 0 | 2 | 1 | 1 | 1 | 3.6 | 7.1 | 0.2 (of 1) |" in page
    assert " | 0 | 0 | 1 | 1 | 1 | 0 | 0 | 0 | 0 | 0.2 | 1.1 | 1.1 (of 1) |" in page
    assert "| A | 2 | right 0.2 | **gradient** 1.1 |" in page
    assert "| C | 2 | refused: right 0.2 | **answers** 0.2 |" in page


def test_all_parts_of_the_page_are_there():
    name, refused = "an equality of zeros", "x >= 1 and x <= 0"
    speed = pd.DataFrame(
        [
            {"case": "tiny", "library": "foldopt_piqp", "seconds_forward": 0.2, "seconds_backward": 0.1, "nnz": 10,
             "seconds_cold": 1.0, "error_x": 1e-15, "error_gradient": 1e-14, "peak_bytes": 3e6, "error": ""},
            {"case": "tiny", "library": "dqp_piqp", "seconds_forward": 0.1, "seconds_backward": 0.05, "nnz": 10,
             "seconds_cold": 1.0, "error_x": 1e-6, "error_gradient": 1e-4, "peak_bytes": 2e6, "error": ""},
            {"case": "tiny", "library": "moreau", "error": "time limit of 60 s"},
        ]
    )  # fmt: skip
    answers = {"foldopt": {name: "right", refused: "wrong: answers, though infeasible"}}
    names = {"dqp_piqp": "libdqp", "moreau": "moreau"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "named", lambda self: names.get(self.package, self.title))
        page = qp_report.report(rows({}), speed, answers, "note")
    assert "| tiny | foldopt, piqp | 0.2 | 0.1 | 2 | 1 | 1e-15 | 1e-14 | 3 | 300000 |" in page
    assert "| time limit of 60 s |  |  |  |  |  |  |  |" in page
    assert f"\n\n{qp_report.HARD}\n| Case |" in page
    assert "| foldopt | 1 | 1 | 0 | 0 |" in page
    assert f"| {refused} (infeasible) | **answers** |" in page
    assert page.endswith("|\n\nnote\n")


@pytest.mark.parametrize("n", [7, 400])
def test_the_projection_onto_the_simplex_is_exact(n):
    case = large_sparse.simplex(n)
    x, point = case.x, -case.args.p
    assert x.min() == 0
    assert x.sum() == pytest.approx(1, abs=1e-14)
    shift = (point - x)[x > 0]
    assert np.ptp(shift) < 1e-14
    assert (point[x == 0] <= shift[0]).all()
    assert case.nnz == 3 * n
    answer = ask(LIBRARIES["foldopt"], case.args, "p", case.weights)
    assert np.abs(answer.x - x).max() < 1e-14
    assert np.abs(answer.gradient - case.gradient).max() < 1e-11


@has_piqp
def test_the_control_problem_is_one_and_its_bounds_matter():
    case = large_sparse.control(20, 4, 2)
    M, B = -case.args.A[4:8, 2:6].toarray(), -case.args.A[4:8, 6:8].toarray()
    steps = case.x.reshape(20, 6)
    for before, after in itertools.pairwise(steps):
        assert np.abs(after[2:] - M @ before[2:] - B @ after[:2]).max() < 1e-12
    at = np.abs(np.abs(case.x) - case.args.upper) < 1e-12
    assert 0 < at.sum() < 40
    answer = ask(LIBRARIES["foldopt_piqp"], case.args, "p", case.weights)
    assert np.abs(answer.x - case.x).max() < 1e-12
    assert np.abs(answer.gradient - case.gradient).max() < 1e-10 * np.abs(case.gradient).max()


@has_piqp
def test_speed_is_measured_in_turns_and_a_first_call_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(qp_report, "FAST", ("foldopt_piqp",))
    name = "simplex, n = 1,000"
    (row,) = qp_report.fast([name], lambda text: None).to_dict("records")
    assert (row["case"], row["library"], row["nnz"]) == (name, "foldopt_piqp", 3000)
    assert row["error_x"] < 1e-12
    assert row["error_gradient"] < 1e-10
    assert 0 < row["seconds_forward"] + row["seconds_backward"] < 10
    assert row["seconds_cold"] > 0


def test_the_script_measures_what_it_is_asked_for(capsys):
    assert bench_qp.main(["--only", "an equality of zeros", "--only", "foldopt"]) == 0
    said = capsys.readouterr().out
    assert "| an equality of zeros | right |" in said
    assert "wrote" not in said
    with pytest.raises(SystemExit):
        bench_qp.main(["--only", "an equality of zeroes"])
    assert "no problem in --data, no case and no library" in capsys.readouterr().err


@has_data
@pytest.mark.parametrize(("name", "verdict"), [("DUALC2", ""), ("HS268", "kink"), ("QAFIRO", "not unique")])
def test_problems_of_the_collection_are_solved_and_refused_by_their_cause(name, verdict):
    seen = examine(DATA, "foldopt", name, "p")
    judged = finding("foldopt", name, "p", 1, collection.read(DATA, name).optimum, seen, None)
    assert judged.solution == "solved"
    assert judged.said == ("refused" if verdict else "answered")
    assert judged.verdict == (verdict or "differentiable")


@has_piqp
@has_data
@pytest.mark.parametrize(
    ("name", "said"), [("DUALC2", "confirmed"), ("HS268", "kink confirmed"), ("QAFIRO", "not unique confirmed")]
)
def test_differences_confirm_the_verdicts(name, said):
    problem = collection.read(DATA, name)
    truth = truth_of(DATA, name)
    for argument in given(collection.arguments(problem)):
        seen = examine(DATA, "foldopt", name, argument)
        assert finding("foldopt", name, argument, problem.n, problem.optimum, seen, truth).derivative == said
        if said == "confirmed" and argument == "p":
            wrong = replace(seen, answer=replace(seen.answer, gradient=1.01 * seen.answer.gradient))
            assert finding("own", name, argument, problem.n, 1.0, wrong, truth).derivative == "contradicted"
