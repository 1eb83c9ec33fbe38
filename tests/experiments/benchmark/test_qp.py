"""The benchmark of quadratic programs: files of the collection, hard cases, and runs in a separate process."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import scipy.optimize
import torch

from experiments.benchmark import collection, qp_peers
from experiments.benchmark.apart import in_turn
from experiments.benchmark.hard_cases import cases
from experiments.benchmark.qp_peers import CONTENDERS, Contender, judged
from tests.experiments.benchmark.small_collection import write_small

CASES = {case.name: case for case in cases()}


def test_the_collection_is_read_from_a_folder(tmp_path):
    write_small(tmp_path)
    write_small(tmp_path, "OTHER")
    write_small(tmp_path)
    assert collection.names(tmp_path) == ["OTHER", "SMALL"]
    assert collection.names(tmp_path, 2) == []
    problem = collection.read(tmp_path, "SMALL")
    assert (problem.n, problem.offset, problem.optimum) == (3, 7.0, 7.25)
    assert np.isinf(problem.l).sum() == 3
    assert np.isinf(problem.u).sum() == 1


def test_the_layers_arguments_say_what_the_problem_says(tmp_path):
    write_small(tmp_path)
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
    write_small(tmp_path)
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
    write_small(tmp_path)
    read = scipy.io.loadmat(tmp_path / "SMALL.mat")
    content = {key: value for key, value in read.items() if not key.startswith("_")}
    content["A"] = content["A"][::-1]
    scipy.io.savemat(tmp_path / "SMALL.mat", content)
    with pytest.raises(ValueError, match=r"SMALL: the last 3 rows of A are not the bounds"):
        collection.read(tmp_path, "SMALL")


def optimality(case):
    """Return the active rows that can have a positive multiplier and those that cannot; asserts that x is optimal."""
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
    return Contender("own", "", ("ValueError: no solution",), answer)


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
