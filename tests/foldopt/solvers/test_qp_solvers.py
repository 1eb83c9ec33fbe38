"""Every installed solver of quadratic programs: its answers fulfil the optimality conditions."""

import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from foldopt.solvers import qp_solvers
from foldopt.solvers._bounded import Answer, Bounded
from foldopt.solvers.qp_solvers import QPSolver
from tests.foldopt.solvers.programs import INF, PROGRAMS, SOLVERS, named, program, violation

qpsolvers = pytest.importorskip("qpsolvers")
KINDS = {"dense": lambda H, C: (H, C), "sparse": lambda H, C: (sp.csc_matrix(H), sp.csr_matrix(C))}
ACCURACY = {"ecos": 1e-5}  # of the others 1e-8; ECOS solves a cone program, with x to the root of its tolerance
DEFINITE = ("quadprog", "ecos")  # solvers that refuse an H that is only semidefinite
UNABLE = {
    **{
        (name, task): None for name in DEFINITE for task in ("semidefinite", "linear", "linear degenerate", "transport")
    },
    **{("cvxopt", task): None for task in ("equality twice", "transport")},  # it asks for independent equalities
}
UNSOLVABLE = {
    "infeasible": program(np.eye(2), [0, 0], [[1, 1], [1, 1]], [1, -INF], [INF, 0]),
    "crossed bounds": program(np.eye(1), [0], [[1], [-2]], [1, 0], [INF, INF]),
    "infeasible linear": program(np.zeros((2, 2)), [1, 1], [[1, 1], [1, 0], [0, 1]], [3, -INF, -INF], [INF, 1, 1]),
    "unbounded linear": program(np.zeros((2, 2)), [-1, 0], [[1, -1]], [-INF], [1]),
    "unbounded": program(np.diag([0, 1]), [-1, 0], [[0, 1]], [-1], [1]),
    "empty row": program(np.eye(1), [0], [[0]], [1], [2]),
}


def solve(solver, task, kind="dense", start=None):
    H, q, C, lower, upper = task
    H, C = KINDS[kind](H, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers warn of what they cannot do; the tests look at the answer
        return named(solver)(H, q, C, lower, upper, start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_the_answer_fulfils_the_optimality_conditions(solver, name, kind):
    task = PROGRAMS[name]
    answer = solve(solver, task, kind)
    if (solver, name) in UNABLE:
        assert answer is None or not answer.found
        return
    assert answer.found
    assert answer.x.shape == task[1].shape
    assert answer.y.shape == task[3].shape
    assert violation(task, answer.x, answer.y) < ACCURACY.get(solver, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNSOLVABLE)
@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_what_has_no_solution_is_not_found(solver, name, kind):
    answer = solve(solver, UNSOLVABLE[name], kind)
    assert answer is None or not answer.found
    assert answer is None or answer.x.shape == UNSOLVABLE[name][1].shape


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_an_indefinite_program_raises_nothing(solver):
    answer = solve(solver, program(np.diag([1, -1]), [0, 0.1], np.eye(2), [-1, -1], [1, 1]), "sparse")
    assert answer is None or np.isfinite(answer.x).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [2, 1, 0, 4, 3, 5]])
def test_only_the_tightest_bound_of_a_variable_carries(order, kind):
    H, q, C, lower, upper = PROGRAMS["entries as bounds twice"]
    x, y, _ = solve(None, (H, q, C[order], lower[order], upper[order]), kind)
    np.testing.assert_allclose(x, [1, -1, 1], atol=1e-8)
    np.testing.assert_allclose(y, np.array([0, 0, -1, 0, 1.5, -3])[order], atol=1e-8)


def test_a_stored_zero_is_no_entry():
    C = sp.csr_matrix((np.array([2.0, 0.0, 0.0, 1.0]), np.array([0, 1, 0, 1]), np.array([0, 2, 4])), shape=(2, 2))
    task = sp.identity(2, format="csc"), np.array([-3.0, 1.0]), C, np.zeros(2), np.array([2.0, 5.0])
    answer = named(None)(*task)
    np.testing.assert_allclose(answer.x, [1, 0], atol=1e-9)
    np.testing.assert_allclose(answer.y, [1, -1], atol=1e-9)
    assert C.nnz == 4
    bounded = Bounded(*task)
    assert bounded.G is None
    np.testing.assert_array_equal(bounded.high, [1, 5])


def test_matrices_of_both_kinds_may_be_mixed():
    H, q, C, lower, upper = PROGRAMS["random"]
    for mixed in ((sp.csc_matrix(H), C), (H, sp.csr_matrix(C)), (sp.csr_matrix(H), sp.csc_matrix(C))):
        answer = named(None)(mixed[0], q, mixed[1], lower, upper)
        assert violation(PROGRAMS["random"], answer.x, answer.y) < 1e-9


@pytest.mark.parametrize("name", ["linear", "linear degenerate", "transport"])
def test_a_linear_program_gets_multipliers_of_a_vertex(name):
    """The rows that carry are independent, as those of a basis are."""
    _, _, C, _, _ = PROGRAMS[name]
    carrying = C[solve(None, PROGRAMS[name]).y != 0]
    assert np.linalg.matrix_rank(carrying) == len(carrying)


@pytest.mark.parametrize("n", [1_000, 30_000])
def test_a_large_sparse_projection_on_the_simplex(n):
    c = np.random.default_rng(0).standard_normal(n)
    C = sp.vstack([np.ones((1, n)), sp.identity(n)], format="csr")
    lower, upper = np.r_[1, np.zeros(n)], np.r_[1, np.full(n, INF)]
    answer = named(None)(sp.identity(n, format="csc"), -c, C, lower, upper)
    ordered = np.sort(c)[::-1]
    thresholds = (np.cumsum(ordered) - 1) / np.arange(1, n + 1)
    theta = thresholds[np.flatnonzero(ordered > thresholds)[-1]]
    np.testing.assert_allclose(answer.x, np.maximum(c - theta, 0), atol=1e-9)
    np.testing.assert_allclose(answer.y, np.r_[theta, np.minimum(c - theta, 0)], atol=1e-9)


@pytest.mark.parametrize("failure", ["none", "not found", "raises"])
def test_clarabel_takes_over_where_piqp_fails(monkeypatch, failure):
    H, q, C, lower, upper = PROGRAMS["random"]

    def failing(task, options, start):
        if failure == "raises":
            raise RuntimeError("broken")
        return None if failure == "none" else Answer(np.zeros_like(q), np.zeros_like(lower), False)

    monkeypatch.setitem(qp_solvers.DIRECT, "piqp", failing)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        answer = QPSolver()(H, q, C, lower, upper)
    assert violation(PROGRAMS["random"], answer.x, answer.y) < 1e-8
    assert [str(one.message) for one in seen] == (["solver='piqp' raised RuntimeError: broken"] * (failure == "raises"))


@pytest.mark.parametrize("better", ["piqp", "clarabel"])
def test_where_all_fail_the_best_answer_is_kept(monkeypatch, better):
    task = PROGRAMS["random"]
    good, bad = solve("piqp", task), Answer(np.ones(30), np.ones(43), False)
    for name in ("piqp", "clarabel"):
        answer = good._replace(found=False) if name == better else bad
        monkeypatch.setitem(qp_solvers.DIRECT, name, lambda *_, answer=answer: answer)
    answer = QPSolver()(*task)
    np.testing.assert_array_equal(answer.x, good.x)
    assert not answer.found


def test_the_residual_is_that_of_the_optimality_conditions():
    """min x^2 / 2 - 3x + y with x + y <= 2 and y >= -1 at (3, -2) with multipliers 2 and -1: each violated once."""
    task = program(np.diag([1, 0]), [-3, 1], [[1, 1], [0, 1]], [-INF, -1], [2, INF])
    found = Bounded(*task)
    assert found.residual(Answer(np.array([3.0, -1.0]), np.array([0.0, -1.0]), True)) == 0
    assert found.residual(Answer(np.array([3.0, -1.5]), np.array([0.0, -1.0]), True)) == 0.5
    assert found.residual(Answer(np.array([2.75, -1.0]), np.array([0.0, -1.0]), True)) == 0.25
    assert found.residual(Answer(np.array([-1.0, 0.0]), np.array([4.0, -5.0]), True)) == 12
    assert found.residual(Answer(np.array([3.0, 1.0]), np.array([-1.0, 0.0]), True)) == INF


def test_the_default_prints_nothing_and_warns_of_nothing():
    code = """
import numpy as np
from foldopt.solvers.qp_solvers import QPSolver
for H in (np.eye(2), np.zeros((2, 2))):
    assert QPSolver()(H, np.ones(2), np.eye(2), np.zeros(2), np.ones(2)).found
    assert not QPSolver()(H, np.ones(2), np.ones((2, 2)), np.array([0.0, 2.0]), np.array([1.0, 3.0])).found
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_leaves_the_answer_right(solver):
    task = PROGRAMS["random"]
    for start in (np.zeros(30), solve(None, task).x):
        answer = solve(solver, task, "sparse", start)
        assert violation(task, answer.x, answer.y) < ACCURACY.get(solver, 1e-8)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in qp_solvers.DIRECT])
def test_a_start_reaches_the_solvers_that_can_use_it(monkeypatch, solver):
    named(solver)
    seen = []
    original = qpsolvers.solve_problem

    def watching(problem, solver, initvals=None, **options):
        seen.append(initvals)
        return original(problem, solver, initvals, **options)

    monkeypatch.setattr(qpsolvers, "solve_problem", watching)
    start = np.full(30, 0.1)
    solve(solver, PROGRAMS["random"], "sparse", start)
    assert seen[0] is (start if solver in ("osqp", "scs", "proxqp", "daqp") else None)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_solvers_can_be_pickled_and_share_threads(solver):
    copy = pickle.loads(pickle.dumps(named(solver)))
    tasks = [PROGRAMS[f"integers {seed}"] for seed in range(4)] * 5
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda task: copy(*task), tasks))
    for task, answer in zip(tasks, answers, strict=True):
        assert answer.found
        assert violation(task, answer.x, answer.y) < ACCURACY.get(solver, 1e-8)
