"""Every installed solver of quadratic programs: optimality conditions checked here, options, functions, errors."""

import functools
import importlib.util
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from foldopt.errors import InputError, MissingDependencyError, SolverError
from foldopt.solvers import qp_solvers
from foldopt.solvers.bounded import Answer, Bounded
from foldopt.solvers.qp_solvers import QPSolver, installed

qpsolvers = pytest.importorskip("qpsolvers")
INF = np.inf
SOLVERS = installed()
KINDS = {"dense": lambda H, C: (H, C), "sparse": lambda H, C: (sp.csc_matrix(H), sp.csr_matrix(C))}
ACCURACY = {"ecos": 1e-5}  # of the others 1e-8; ECOS solves a cone program, with x to the root of its tolerance
DEFINITE = ("quadprog", "ecos")  # solvers that refuse an H that is only semidefinite


def program(H, q, C, lower, upper):
    return tuple(np.array(part, dtype=float) for part in (H, q, C, lower, upper))


def integers(seed):
    """min 1/2 x'Hx + q'x over integer rows, feasible at an integer point that many rows hold with equality."""
    g = np.random.default_rng(seed)
    n, r = 5, 9
    M = g.integers(-2, 3, (n, n))
    C = np.vstack([g.integers(-2, 3, (r, n)), np.diag(g.choice([-2, -1, 1, 3], n))])
    z = C @ g.integers(-2, 3, n)
    lower, upper = z - g.integers(0, 3, len(z)), z + g.integers(0, 3, len(z))
    return program(
        M.T @ M + np.eye(n),
        g.integers(-5, 6, n),
        C,
        np.where(g.random(len(z)) < 0.4, -INF, lower),
        np.where(g.random(len(z)) < 0.3, INF, upper),
    )


def dense_random():
    g = np.random.default_rng(0)
    n = 30
    M = g.standard_normal((n, n))
    C = np.vstack([g.standard_normal((12, n)), np.eye(n), np.ones((1, n))])
    lower = [-1] * 6 + [-INF] * 6 + [-0.3] * n + [1]
    upper = [1] * 6 + [0.5] * 6 + [INF] * 15 + [0.4] * 15 + [1]
    return program(M.T @ M / n, g.standard_normal(n), C, lower, upper)


NONE = np.zeros((0, 2))
PROGRAMS = {
    "no rows": program([[2, 1], [1, 2]], [1, -1], NONE, [], []),
    "degenerate vertex": program(
        np.eye(2), [-3, -3], [[1, 0], [0, 1], [1, 1], [1, 2], [2, 1]], [-INF] * 5, [1, 1, 2, 3, 3]
    ),
    "equality twice": program(
        np.eye(3), [-1, 2, 0], [[1, 1, 1], [1, 1, 1], [2, 2, 2], [1, -1, 0]], [1, 1, 2, -INF], [1, 1, 2, 0.5]
    ),
    "entries as bounds twice": program(
        np.eye(3),
        [-4, 4, -4],
        [[1, 0, 0], [2, 0, 0], [-3, 0, 0], [0, -1, 0], [0, -2, 0], [0, 0, -1]],
        [-INF, -INF, -3, -INF, -INF, -1],
        [2, 6, INF, 3, 2, INF],
    ),
    "negative coefficients": program(
        np.diag([1, 2, 3]),
        [5, -5, 1],
        [[-2, 0, 0], [0, -0.5, 0], [0, 0, -1], [1, 1, 1]],
        [-2, -1, -INF, -1],
        [4, 1, 0, 2],
    ),
    "fixed and free": program(
        [[2, 0, 1], [0, 1, 0], [1, 0, 2]], [1, 1, 1], [[0, 1, 0], [1, 0, 1], [0, -1, 0]], [2, -INF, -INF], [2, 1, 5]
    ),
    "empty and free rows": program(np.eye(2), [-1, -1], [[0, 0], [1, 1], [1, 0]], [-1, -INF, -INF], [0, INF, 0.5]),
    "semidefinite": program(
        [[1, -1, 0], [-1, 1, 0], [0, 0, 0]],
        [1, -1, 1],
        [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [1, 0, 0, 0],
        [1, INF, INF, INF],
    ),
    "linear": program(
        np.zeros((3, 3)), [-3, -2, -1], [[1, 1, 0], [1, 0, 1], *np.eye(3)], [-INF, -1, 0, 0, 0], [4, 3, INF, 3, 2]
    ),
    "linear degenerate": program(
        np.zeros((2, 2)),
        [-1, -1],
        [[1, 1], [1, 0], [0, 1], [2, 1], [1, 2]],
        [-INF, 0, 0, -INF, -INF],
        [2, INF, INF, 3, 3],
    ),
    "transport": program(
        np.zeros((4, 4)),
        [1, 2, 3, 1],
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], *np.eye(4)],
        [2, 3, 2, 3, 0, 0, 0, 0],
        [2, 3, 2, 3, INF, INF, INF, INF],
    ),
    "random": dense_random(),
    **{f"integers {seed}": integers(seed) for seed in range(4)},
}
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


@functools.cache
def working(solver):
    try:
        return QPSolver(solver), ""
    except SolverError as error:
        return None, str(error)


def named(solver):
    found, reason = working(solver)
    if found is None:
        pytest.skip(reason)
    return found


def solve(solver, task, kind="dense", start=None):
    H, q, C, lower, upper = task
    H, C = KINDS[kind](H, C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # solvers warn of what they cannot do; the tests look at the answer
        return named(solver)(H, q, C, lower, upper, start)


def violation(task, x, y):
    """The largest violation of the KKT conditions, relative to the numbers that make it up where these are above 1.

    inf where a multiplier is of a side that is no bound.
    """
    H, q, C, lower, upper = task
    z = C @ x
    size = np.abs(H) @ np.abs(x) + np.abs(q) + np.abs(C.T) @ np.abs(y)
    stationarity = np.abs(H @ x + q + C.T @ y) / np.maximum(size, 1)
    outside = np.maximum(lower - z, z - upper)
    slack = np.where(y > 0, upper - z, z - lower)[y != 0] * np.minimum(np.abs(y[y != 0]), 1)
    return max(stationarity.max(), outside.max(initial=0), np.abs(slack).max(initial=0))


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


def lagrangian(H, q, C, lower, upper):
    """A user's solver: all rows are taken as equalities at their upper bounds."""
    n = len(q)
    system = np.block([[H, C.T], [C, np.zeros((len(C), len(C)))]])
    solution = np.linalg.solve(system, np.concatenate([-q, upper]))
    return solution[:n], solution[n:]


EQUALITIES = program([[2, 1], [1, 2]], [1, -1], [[1, 1]], [1], [1])


def test_a_function_is_a_solver():
    answer = QPSolver(lagrangian)(*EQUALITIES)
    assert answer.found
    assert violation(EQUALITIES, answer.x, answer.y) < 1e-14
    alone = QPSolver(lambda *task: lagrangian(*task)[0])(*EQUALITIES)
    np.testing.assert_array_equal(alone.x, answer.x)
    np.testing.assert_array_equal(alone.y, [0])
    assert QPSolver(lambda *task: None)(*EQUALITIES) is None
    assert QPSolver(lagrangian).name == "lagrangian"
    assert (QPSolver().name, QPSolver("piqp").name) == ("default", "piqp")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), r"solver=stub returned x of shape \(3,\), expected \(2,\)"),
        (np.zeros((2, 1)), r"x of shape \(2, 1\), expected \(2,\)"),
        ((np.zeros(2), np.zeros(2)), r"y of shape \(2,\), expected \(1,\): return x \(2,\), or x and the multipliers"),
        ((np.zeros(2), None), r"y of shape \(\), expected \(1,\)"),
        ("nothing", r"x of shape \(\), expected \(2,\)"),
        (np.array([0, np.nan]), "solver=stub returned NaN or inf in x; return None where"),
        ((np.zeros(2), np.array([INF])), "NaN or inf in y"),
    ],
)
def test_what_a_function_must_not_return(returned, message):
    def stub(H, q, C, lower, upper):
        return returned

    with pytest.raises(InputError, match=message):
        QPSolver(stub)(*EQUALITIES)


def test_the_error_of_a_function_is_raised():
    with pytest.raises(ZeroDivisionError):
        QPSolver(lambda *task: 1 / 0)(*EQUALITIES)


def test_options_take_the_place_of_the_tight_ones():
    task = PROGRAMS["random"]
    loose = QPSolver("osqp", {"eps_abs": 1e-3, "eps_rel": 1e-3})(*task)
    assert loose.found
    assert violation(task, loose.x, loose.y) > 1e-6
    for solver, option in (("piqp", "max_iter"), ("clarabel", "max_iter"), ("scs", "max_iters")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = QPSolver(solver, {option: 2})(*task)
        assert answer is None or not answer.found


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_unknown_option_is_named(solver):
    named(solver)
    with pytest.raises(InputError, match=rf"solver='{solver}' .*no_such_option|no_such_option.*solver='{solver}'"):
        QPSolver(solver, {"no_such_option": 1})


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("piqp", {"eps_abs": -1.0}),
        ("piqp", {"max_iter": 50, "eps_abs": "small"}),
        ("clarabel", {"max_iter": 50, "direct_solve_method": "guess"}),
        ("highs", {"time_limit": 5.0, "solver": "guess"}),
        ("osqp", {"max_iter": 50, "eps_abs": -1.0}),
        ("scs", {"max_iters": 50, "eps_abs": "small"}),
    ],
)
def test_a_wrong_value_of_an_option_is_named(solver, options):
    wrong = list(options)[-1]
    with pytest.raises(InputError, match=rf"options=.*{wrong}.*solver='{solver}'.*") as caught:
        QPSolver(solver, options)
    assert "refuses max_iter" not in str(caught.value)
    QPSolver(solver, {name: value for name, value in options.items() if name != wrong})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nix",), InputError, r"solver='nix': installed are .*clarabel.*highs.*piqp.*pip install 'qpsolvers\[NAME\]'"),
        ((3,), InputError, "solver=3: expected None, a name such as 'piqp', or a function"),
        ((None, {"eps": 1}), InputError, r"options=\{'eps': 1\}: they belong to a solver that is named"),
        ((lagrangian, {"eps": 1}), InputError, "functools.partial"),
        (("piqp", [1]), InputError, r"options=\[1\]: expected a dict"),
        (("piqp", {1: 2}), InputError, r"options=\{1: 2\}: expected a dict from names"),
        (("copt",), MissingDependencyError, r"solver='copt' is not installed: pip install 'qpsolvers\[copt\]'"),
    ],
)
def test_wrong_arguments_are_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        QPSolver(*arguments)


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    absent = {"piqp", "qpsolvers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for solver, package in ((None, "piqp"), ("piqp", "piqp"), ("osqp", "qpsolvers")):
        with pytest.raises(MissingDependencyError, match=rf"needs {package}: install with pip install 'foldopt\[qp\]'"):
            QPSolver(solver)
    assert installed() == ["clarabel", "highs"]
    assert QPSolver("highs")(*PROGRAMS["linear"]).found


def test_a_solver_that_does_not_work_says_why(monkeypatch):
    def unlicensed(task, options, start):
        raise OSError("no licence")

    monkeypatch.setitem(qp_solvers.DIRECT, "piqp", unlicensed)
    with pytest.raises(SolverError, match="solver='piqp' fails on a program of two variables: no licence"):
        QPSolver("piqp")
    monkeypatch.setitem(qp_solvers.DIRECT, "piqp", lambda *_: None)
    with pytest.raises(SolverError, match="solver='piqp' does not solve a program of two variables"):
        QPSolver("piqp")


def test_a_dense_solver_says_what_it_would_take(monkeypatch):
    monkeypatch.setattr(qpsolvers, "sparse_solvers", [])
    n = 30_000
    identity = sp.identity(n, format="csr")
    with pytest.raises(InputError, match=r"takes dense matrices only, 14\.4 GB for this program of 30000 variables"):
        named("osqp")(identity, np.ones(n), identity, np.zeros(n), np.full(n, INF))


@pytest.mark.parametrize("solver", [None, *SOLVERS])
def test_solvers_can_be_pickled_and_share_threads(solver):
    copy = pickle.loads(pickle.dumps(named(solver)))
    tasks = [PROGRAMS[f"integers {seed}"] for seed in range(4)] * 5
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda task: copy(*task), tasks))
    for task, answer in zip(tasks, answers, strict=True):
        assert answer.found
        assert violation(task, answer.x, answer.y) < ACCURACY.get(solver, 1e-8)
