"""Functions as solvers of quadratic programs, options of solvers, and errors that say what is wrong."""

import importlib.util
import warnings

import numpy as np
import pytest
import scipy.sparse as sp

from foldopt.errors import InputError, MissingDependencyError, SolverError
from foldopt.solvers import qp_solvers
from foldopt.solvers.qp_solvers import QPSolver, installed
from tests.foldopt.solvers.programs import INF, PROGRAMS, SOLVERS, named, program, violation

qpsolvers = pytest.importorskip("qpsolvers")


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
