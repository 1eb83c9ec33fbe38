"""The benchmark of quadratic programs: the collection, the differences that judge it, the hard cases, the page."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.optimize
import scipy.sparse as sp
import torch

from experiments.benchmark import collection, differences, examination, qp_peers, qp_report
from experiments.benchmark.apart import in_turn
from experiments.benchmark.differences import STEPS, Difference, difference, judge, plateau
from experiments.benchmark.hard_cases import cases
from experiments.benchmark.qp_peers import CONTENDERS, Contender, judged

DATA = Path(__file__).parents[2].parent / "shared" / "maros_meszaros"
has_piqp = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("qpsolvers", "piqp")),
    reason="piqp and qpsolvers are only in the environment of the peers",
)
CASES = {case.name: case for case in cases()}


def write(folder, name="SMALL"):
    """min x1^2 + x1 x2 + 1.5 x2^2 - x1 + 7 with an equality, a range, one row below, a free row, a fixed variable."""
    rows = np.array([[1.0, 1, 1], [1, -1, 0], [0, 2, 1], [0, 1, 1]])
    content = {
        "P": sp.csc_matrix([[2.0, 1, 0], [1, 3, 0], [0, 0, 0]]),
        "q": np.array([[-1.0], [0], [0]]),
        "r": np.array([[7]]),
        "A": sp.csc_matrix(np.vstack([rows, np.eye(3)])),
        "l": np.array([[2.0], [-1], [-1e20], [-1e20], [0], [-1e20], [0.5]]),
        "u": np.array([[2.0], [3], [4], [1e20], [1], [2], [0.5]]),
    }
    scipy.io.savemat(folder / f"{name}.mat", content)
    (folder / "optima.json").write_text(json.dumps({name: 7.25}))


def test_the_collection_is_read_from_a_folder(tmp_path):
    write(tmp_path)
    write(tmp_path, "OTHER")
    write(tmp_path)
    assert collection.names(tmp_path) == ["OTHER", "SMALL"]
    assert collection.names(tmp_path, 2) == []
    problem = collection.read(tmp_path, "SMALL")
    assert (problem.n, problem.offset, problem.optimum) == (3, 7.0, 7.25)
    assert np.isinf(problem.l).sum() == 3
    assert np.isinf(problem.u).sum() == 1


def test_the_layers_arguments_say_what_the_problem_says(tmp_path):
    write(tmp_path)
    problem = collection.read(tmp_path, "SMALL")
    args = collection.arguments(problem)
    assert len(args.b) == 2, "the equality and the fixed variable"
    assert len(args.h) == 3, "a range is two rows, a row with one bound is one, a free row none"
    assert np.isinf([args.lower[2], args.upper[2]]).all(), "the fixed variable has no bounds beside its row"
    rng = np.random.default_rng(0)
    for x in rng.standard_normal((200, 3)):
        own = 0.5 * x @ (args.Q @ x) + args.p @ x + problem.offset
        assert own == pytest.approx(problem.objective(x), rel=1e-14)
        value = problem.A @ x
        worst = max(float((problem.l - value).max()), float((value - problem.u).max()), 0.0)
        parts = (args.G @ x - args.h, abs(args.A @ x - args.b), args.lower - x, x - args.upper)
        assert max(0.0, *(float(part.max()) for part in parts)) == pytest.approx(worst, rel=1e-14)


def test_violations_are_those_of_rows_and_of_bounds_in_their_own_units(tmp_path):
    write(tmp_path)
    problem = collection.read(tmp_path, "SMALL")
    assert problem.violations(np.array([1.0, 0.5, 0.5])) == (0.0, 0.0)
    row, bound = problem.violations(np.array([1.0, 0.5 + 1e-6, 0.5]))
    assert 1e-7 < row < 1e-6
    assert bound == 0
    row, bound = problem.violations(np.array([1 + 1e-6, 0.5 - 1e-6, 0.5]))
    assert row < 1e-12
    assert 1e-7 < bound < 1e-6
    tiny = replace(problem, A=problem.A * 1e-8, l=problem.l * 1e-8, u=problem.u * 1e-8)
    assert tiny.violations(np.array([1.0, 0.6, 0.5])) == pytest.approx(problem.violations(np.array([1.0, 0.6, 0.5])))


def test_a_file_whose_last_rows_are_no_bounds_is_an_error(tmp_path):
    write(tmp_path)
    read = scipy.io.loadmat(tmp_path / "SMALL.mat")
    content = {key: value for key, value in read.items() if not key.startswith("_")}
    content["A"] = content["A"][::-1]
    scipy.io.savemat(tmp_path / "SMALL.mat", content)
    with pytest.raises(ValueError, match=r"SMALL: the last 3 rows of A are not the bounds"):
        collection.read(tmp_path, "SMALL")


def clipped(args):
    """The exact solution of min 1/2 |x|^2 + p'x in a box."""
    return np.clip(-args.p, args.lower, args.upper)


def box(*p):
    n, none = len(p), sp.csr_matrix((0, len(p)))
    zero = np.zeros(0)
    return collection.Arguments(
        sp.identity(n, format="csc"), np.array(p), none, zero, none, zero, np.zeros(n), np.ones(n)
    )


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
    found = difference(box(p), "p", np.ones(1), np.ones(1), 1.0, clipped)
    assert found.kind == kind
    assert (found.left, found.right) == pytest.approx((left, right), abs=1e-6)


def test_differences_find_jumps_and_sides_without_a_solution():
    assert difference(box(0.0), "p", np.ones(1), np.ones(1), 1.0, lambda a: np.sign(a.p)).kind == "jump"
    for ending in (1, -1):
        found = difference(
            box(0.0), "p", np.ones(1), np.ones(1), 1.0, lambda a, s=ending: a.p if s * a.p[0] <= 0 else None
        )
        assert found.kind == "infeasible"


def test_differences_of_a_noisy_solver_are_not_resolved():
    rng = np.random.default_rng(0)
    found = difference(box(-0.3), "p", np.ones(1), np.ones(1), 1.0, lambda a: -a.p + 1e-3 * rng.standard_normal(1))
    assert found.kind == "unresolved"
    assert np.isnan(plateau(STEPS, np.sin(1 / STEPS), 0.0, 0.0, 1.0)[0])


def test_a_wrong_derivative_is_called_wrong():
    truth = Difference("smooth", 2.0, 2.0, 1e-6)
    assert judge(2.0, truth, 5.0) == "confirmed"
    assert judge(2.0 + 1e-6, truth, 5.0) == "confirmed"
    assert judge(2.01, truth, 5.0) == "contradicted"
    assert judge(-2.0, truth, 5.0) == "contradicted"
    assert judge(0.0, truth, 5.0) == "contradicted"
    assert judge(float("nan"), truth, 5.0) == "contradicted"
    assert judge(2.0005, truth, 5.0) == "unresolved"
    assert judge(1e-15, Difference("smooth", 0.0, 0.0, 0.0), 1.0) == "confirmed", "rounding is no error"
    for kind in ("kink", "jump", "infeasible"):
        assert judge(2.0, Difference(kind, 2.0, 1.0, 1e-6), 5.0) == "contradicted"
    assert judge(2.0, Difference("unresolved"), 5.0) == "unresolved"


def optimality(case):
    """Return S, W: the active rows that can carry a multiplier, those that cannot; x is checked to be optimal."""
    G, h, A, b = qp_peers._rows(case)
    Q, p, x = case.Q.double(), case.p, case.x
    slack = h - G @ x
    extent = G.abs() @ x.abs() + torch.where(h.isfinite(), h.abs(), 0) + 1e-300
    assert (slack >= -1e-12 * extent).all()
    assert ((A @ x - b).abs() <= 1e-12 * (A.abs() @ x.abs() + b.abs() + 1e-300)).all()
    active = G[slack <= 1e-9 * extent]
    scale = float((Q @ x).abs().max() + p.abs().max())
    unit = active.abs().amax(1, keepdim=True).clamp(min=1e-300) if len(active) else active[:, :1]
    rows = active / unit
    gradient = (Q @ x + p) / scale
    multipliers = [(0, None)] * len(rows) + [(None, None)] * len(A)
    columns = torch.cat([rows, A]).T.numpy()
    carries = np.zeros(len(rows), bool)
    for i in range(len(rows)):
        best = scipy.optimize.linprog(
            -np.eye(len(multipliers))[i], A_eq=columns, b_eq=-gradient.numpy(), bounds=multipliers
        )
        assert best.status in (0, 3), f"{case.name}: x is not optimal"
        carries[i] = best.status == 3 or -best.fun > 1e-13
    return torch.cat([rows[carries], A]), rows[~carries]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refusal])
def test_the_right_answers_of_the_hard_cases_are_right(name):
    case = CASES[name]
    strong, weak = optimality(case)
    v = -case.gradient
    Q = case.Q.double()
    rest = torch.ones(len(v), dtype=torch.float64) - Q @ v
    solved = torch.linalg.lstsq(strong.T, rest[:, None], driver="gelsd").solution[:, 0] if len(strong) else rest[:0]
    assert (strong.T @ solved - rest).abs().max() < 1e-9, "v is not the derivative"
    assert float((strong @ v).abs().sum()) < 1e-9 * (1 + float(v.abs().max())), "it leaves an active row"
    assert float((weak @ v).abs().sum()) < 1e-9 * (1 + float(v.abs().max())), "a kink"


@pytest.mark.parametrize("name", CASES)
def test_foldopt_is_right_on_the_hard_cases(name):
    assert judged(CONTENDERS["foldopt"], CASES[name]) == "right"


def contender(answer):
    return Contender("own", "", answer, ("ValueError: no solution",))


def test_answers_to_the_hard_cases_are_judged():
    case, kink = CASES["an equality as two inequalities"], CASES["kink: a bound with multiplier 0"]
    right = contender(lambda p, case: case.x + (p - p.detach()) * case.gradient)
    assert judged(right, case) == "right"
    assert judged(contender(lambda p, case: 1.01 * right.solve(p, case)), case).startswith("wrong: x by")
    assert judged(contender(lambda p, case: case.x + (p - p.detach())), case).startswith("wrong: gradient by")
    assert judged(contender(lambda p, case: torch.nan * p), case).startswith("refused: NaN")
    assert judged(contender(lambda p, case: torch.relu(-p)), kink) == "wrong: answers, though kink"

    def raises(error):
        def solve(p, case):
            raise error

        return contender(solve)

    assert judged(raises(ValueError("no solution")), case) == "refused: ValueError: no solution"
    assert judged(raises(ValueError("no solution")), kink) == "right"
    assert judged(raises(IndexError("7")), case) == "raw: IndexError: 7"
    assert judged(raises(IndexError("7")), kink) == "raw: IndexError: 7", "an accident is no refusal"


def test_foldopt_has_to_name_the_cause():
    from foldopt.errors import InfeasibleError

    def solve(p, case):
        raise InfeasibleError("no point")

    assert judged(contender(solve), CASES["x >= 1 and x <= 0"]) == "right"
    assert judged(contender(solve), CASES["indefinite Q in a box"]).startswith("refused: InfeasibleError")


def test_a_crash_and_a_hang_cost_one_item_each():
    said = ["'a'", "__import__('os')._exit(3)", "'b'", "__import__('time').sleep(60)", "[][7]", "'c'"]
    found = list(in_turn(eval, [(text,) for text in said], 2.0))
    assert [answer for answer, _ in found] == ["a", None, "b", None, None, "c"]
    reasons = ["", "the process ended with code 3", "", "time limit of 2 s", "IndexError: list index out of range", ""]
    assert [reason for _, reason in found] == reasons


def test_the_page_counts_what_is_in_its_tables():
    base = {"n": 2, "equalities": 0, "inequalities": 1, "bounds": 4, "seconds_forward": 0.1, "seconds_backward": 0.1}
    rows = [
        {"problem": "A", "argument": "p", "solution": "solved", "derivative": "confirmed"},
        {"problem": "A", "argument": "h", "solution": "solved", "derivative": "contradicted (kink)"},
        {"problem": "B", "argument": "p", "solution": "nonconvex", "derivative": ""},
        {"problem": "C", "argument": "p", "solution": "wrong", "derivative": "kink confirmed"},
        {"problem": "D", "argument": "p", "solution": "raw", "derivative": "raw exception", "seconds_forward": 9.0},
        {"problem": "E", "argument": "p", "solution": "solved", "derivative": "not unique contradicted"},
    ]
    findings = pd.DataFrame(
        [{**base, "objective_error": 0.0, "row_violation": 0.0, "bound_violation": 0.0, **r} for r in rows]
    )
    counts = dict(qp_report.summary(findings))
    assert counts["Problems"] == "5"
    assert counts["Wrong without a word"] == counts["Raw exceptions"] == "1"
    assert counts["Not solved, refused by cause"] == "1 nonconvex"
    assert counts["Given, and confirmed by differences"] == counts["Given, and contradicted by differences"] == "1"
    assert counts["Refused, kink, which differences confirm"] == "1"
    assert counts["Refused, though differences see a derivative (†)"] == "1"
    assert counts["Slower than 5 s"] == "D"
    name, refused = "an equality of zeros", "x >= 1 and x <= 0"
    page = qp_report.report(
        findings, {"foldopt": {name: "right", refused: "wrong: answers, though infeasible"}}, "note"
    )
    assert f"\n\n{qp_report.COLLECTION}\n| Problem |" in page
    assert f"\n\n{qp_report.HARD}\n| Case |" in page
    assert page.endswith("|\n\nnote\n")
    assert "| foldopt | 1 | 1 | 0 | 0 |" in page
    assert f"| {refused} (infeasible) | **answers** |" in page
    assert "| A | 2 | 0 | 1 | 4 | yes | 0e+00 | 0e+00 | 0e+00 | right |  | **wrong** (kink) |  |  | 0.1 | 0.1 |" in page
    assert "| E | 2 | 0 | 1 | 4 | yes | 0e+00 | 0e+00 | 0e+00 | not unique † |" in page


@pytest.mark.skipif(not DATA.is_dir(), reason="the Maros-Meszaros problems are not there: ../shared/maros_meszaros")
@pytest.mark.parametrize(("name", "verdict"), [("DUALC2", ""), ("HS268", "kink"), ("QAFIRO", "not unique")])
def test_problems_of_the_collection_are_solved_and_refused_by_their_cause(name, verdict):
    problem = collection.read(DATA, name)
    args = collection.arguments(problem)
    rng = np.random.default_rng(0)
    answer = examination.ask(args, "p", rng.standard_normal(problem.n))
    assert problem.objective_error(answer.x) < examination.OBJECTIVE
    assert max(problem.violations(answer.x)) < examination.ROWS
    assert answer.said == ("refused" if verdict else "answered")
    assert answer.verdict == (verdict or "differentiable")


@has_piqp
@pytest.mark.skipif(not DATA.is_dir(), reason="the Maros-Meszaros problems are not there: ../shared/maros_meszaros")
@pytest.mark.parametrize(
    ("name", "said"), [("DUALC2", "confirmed"), ("HS268", "kink confirmed"), ("QAFIRO", "not unique confirmed")]
)
def test_differences_confirm_the_verdicts(name, said):
    found = examination.examine(DATA, name)
    assert {row["derivative"] for row in found} == {said}
    assert {row["solution"] for row in found} == {"solved"}


@has_piqp
@pytest.mark.skipif(not DATA.is_dir(), reason="the Maros-Meszaros problems are not there: ../shared/maros_meszaros")
def test_a_wrong_gradient_of_a_problem_is_found(monkeypatch):
    honest = examination.ask

    def ask(args, name, weights):
        answer = honest(args, name, weights)
        return replace(answer, gradient=1.01 * answer.gradient)

    monkeypatch.setattr(examination, "ask", ask)
    assert {row["derivative"] for row in examination.examine(DATA, "DUALC2") if row["argument"] == "p"} == {
        "contradicted"
    }


@has_piqp
def test_the_reference_is_exact_and_sees_what_is_not_unique():
    x = differences.solve(box(-0.3, 0.2, -2.0))
    assert np.abs(x - [0.3, 0, 1]).max() < 1e-15
    lp = replace(box(1.0, 0.0), Q=sp.csc_matrix((2, 2)))
    assert differences.gap(lp, np.array([1.0, 0]), 1.0) == 0
    assert differences.gap(lp, np.array([0, 2.0]), 1.0) == pytest.approx(2)
    assert differences.gap(replace(lp, upper=np.array([1, np.inf])), np.array([0, 2.0]), 1.0) == np.inf
