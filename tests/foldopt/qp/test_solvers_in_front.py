"""QPLayer with every installed solver: x and the gradients do not depend on the solver."""

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.qp.hard_cases import RIGHT
from tests.foldopt.qp.programs import F64, Program, truth
from tests.foldopt.qp.sparse import all_sparse, arguments, asked, call

pytest.importorskip("scipy")
pytest.importorskip("qpsolvers")


def works(name):
    """Return whether a solver works here; commercial ones may lack a licence."""
    try:
        return bool(foldopt.QPLayer(solver=name))
    except errors.SolverError as error:
        if "licen" not in str(error).split("Check its")[0].lower():
            raise
        return False


SOLVERS = [name for name in pytest.importorskip("foldopt.solvers.qp_solvers").installed() if works(name)]
STRICT = ("quadprog", "ecos")  # need a positive definite Q
INDEPENDENT = ("cvxopt", "quadprog", "nppro")  # need independent equalities
FORMS = {"dense": dict, "sparse": all_sparse}
WEIGHT = [1.0, 2.0, 4.0]


def drawn(seed):
    """Return a strictly convex program in 3 variables with all kinds of rows."""
    draws = np.random.default_rng(seed)
    R, G = draws.normal(size=(3, 3)), draws.normal(size=(2, 3))
    Q = R @ R.T + 0.5 * np.eye(3)
    bounds = np.zeros(3), np.full(3, 0.8)
    return Program(Q, 2 * draws.normal(size=3), G, G.sum(1) / 3 + 0.05, np.ones((1, 3)), [1], *bounds)


WELL_POSED = {f"drawn {seed}": drawn(seed) for seed in range(4)}
DEGENERATE = (
    "an equality as two inequalities",
    "two equalities as four inequalities, at a vertex",
    "a weakly active row that follows from others",
    "assignment 3 x 3, all rows, ridge 0.01",
    "convex, and flat in what a row fixes",
    "an LP at a vertex with one row too many",
)


def takes(solver, name):
    if solver in STRICT and name in ("convex, and flat in what a row fixes", "an LP at a vertex with one row too many"):
        return False
    return not (solver in INDEPENDENT and "assignment" in name)


def near(found, expected, tol=1e-9):
    expected = torch.as_tensor(np.asarray(expected), dtype=F64)
    torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=tol * (1 + float(expected.abs().max())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_well_posed_programs_in_every_argument(solver, form):
    for program in WELL_POSED.values():
        args = arguments(program)
        _, x, expected = asked(args, WEIGHT, args)
        found = truth(program)
        near(x, found.x)
        near(expected["p"], found.gradient(WEIGHT))
        layer, x, gradients = asked(FORMS[form](args), WEIGHT, args, solver=solver)
        near(x, found.x)
        assert layer.last.verdict == ("differentiable",)
        for name, gradient in gradients.items():
            dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
            there = torch.ones_like(dense) if dense is gradient else (args[name] != 0).to(F64)
            near(dense, there * expected[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_degenerate_programs(solver, form):
    for name in filter(lambda name: takes(solver, name), DEGENERATE):
        program, x, weight, gradient = RIGHT[name]
        layer, found, gradients = asked(FORMS[form](arguments(program)), weight, solver=solver)
        near(found, x)
        near(gradients["p"], gradient)
        assert layer.last.verdict == ("differentiable",), name


@pytest.mark.parametrize("solver", SOLVERS)
def test_causes_are_named_whoever_solves(solver):
    program = drawn(0)
    program.b = np.array([-1.0])
    with pytest.raises(errors.InfeasibleError):
        call(foldopt.QPLayer(solver=solver), all_sparse(arguments(program)))
    program = drawn(0)
    program.Q = np.diag([1.0, -2.0, 1.0])
    with pytest.raises(errors.NonconvexError):
        call(foldopt.QPLayer(solver=solver), all_sparse(arguments(program)))


@pytest.mark.parametrize("form", FORMS)
def test_options_reach_the_solver(form, monkeypatch):
    qp_solvers, seen = pytest.importorskip("foldopt.solvers.qp_solvers"), []
    own = qp_solvers.DIRECT["piqp"]

    def watched(program, options, start):
        seen.append(options)
        return own(program, options, start)

    layer = foldopt.QPLayer(solver="piqp", options={"max_iter": 77, "eps_abs": 1e-6})
    monkeypatch.setitem(qp_solvers.DIRECT, "piqp", watched)
    near(call(layer, FORMS[form](arguments(drawn(1)))), truth(drawn(1)).x)
    assert seen
    assert all((options["max_iter"], options["eps_abs"]) == (77, 1e-6) for options in seen)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("piqp", {"eps_absolute": 1e-6}, "eps_absolute"),
        ("piqp", {"eps_abs": "small"}, "eps_abs"),
        ("highs", {"threads": "many"}, "threads"),
        ("clarabel", {"no_such": 1}, "no_such"),
        ("osqp", {"no_such": 1}, "no_such"),
        (None, {"eps_abs": 1e-6}, "belong to a solver that is named"),
        ("no solver", None, "no solver"),
        (3, None, "expected None, a name such as 'piqp', or a function"),
    ],
)
def test_wrong_solvers_and_options_are_named(solver, options, message):
    with pytest.raises((errors.InputError, errors.MissingDependencyError), match=message):
        foldopt.QPLayer(solver=solver, options=options)


def by_clarabel(H, q, C, lower, upper):
    """Return x and multipliers by Clarabel, as the function of a user might do."""
    qp_solvers = pytest.importorskip("foldopt.solvers.qp_solvers")
    answer = qp_solvers.QPSolver("clarabel")(H, q, C, lower, upper)
    return None if answer is None or not answer.found else (answer.x, answer.y)


def without_multipliers(H, q, C, lower, upper):
    """Return x alone."""
    found = by_clarabel(H, q, C, lower, upper)
    return None if found is None else found[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", [by_clarabel, without_multipliers])
def test_a_function_is_a_solver_of_the_callers_own_programs(solver, form):
    sp, seen = pytest.importorskip("scipy.sparse"), []

    def function(*program):
        seen.append(program)
        return solver(*program)

    args = arguments(drawn(2))
    _, x, gradients = asked(FORMS[form](args), WEIGHT, ("p", "h", "b"), solver=function)
    near(x, truth(drawn(2)).x)
    _, _, expected = asked(args, WEIGHT, ("p", "h", "b"))
    for name, gradient in gradients.items():
        near(gradient, expected[name])
    H, q, C, lower, upper = seen[0]
    assert sp.issparse(H) == sp.issparse(C) == (form == "sparse")
    H, C = (M.toarray() if sp.issparse(M) else M for M in (H, C))
    program = drawn(2)
    rows = np.concatenate([program.A, program.G, np.eye(3)])
    for found, own in ((H, program.Q), (q, program.p), (C, rows), (upper, np.r_[1, program.h, program.upper])):
        np.testing.assert_allclose(found, own, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(lower, np.r_[1, -np.inf, -np.inf, program.lower], rtol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_that_is_wrong_or_raises(form):
    args = FORMS[form](arguments(drawn(0)))

    def broken(*program):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        call(foldopt.QPLayer(solver=broken), args)
    with pytest.raises(errors.InputError, match=r"returned x of shape \(2,\), expected \(3,\)"):
        call(foldopt.QPLayer(solver=lambda *program: np.zeros(2)), args)
    with pytest.raises(errors.LimitError):
        call(foldopt.QPLayer(solver=lambda *program: None), args)
    layer = foldopt.QPLayer(solver=lambda *program: np.full(3, 1e3), on_failure="nan")
    x = call(layer, args)
    assert layer.last.status in (("solved",), ("limit reached",))
    if layer.last.ok.all():
        near(x, truth(drawn(0)).x)
    else:
        assert x.isnan().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name in ("osqp", "scs", "proxqp", "daqp", "piqp")])
def test_a_warm_start_changes_nothing_but_the_time(solver, form):
    layer = foldopt.QPLayer(solver=solver, warm_start=True)
    for shift in (0.0, 1e-3, 0.5):
        program = drawn(3).moved(p=shift)
        _, x, gradients = asked(FORMS[form](arguments(program)), WEIGHT, layer=layer)
        near(x, truth(program).x)
        near(gradients["p"], truth(program).gradient(WEIGHT))


def test_a_warm_start_begins_at_the_last_solution(monkeypatch):
    qp_solvers, starts = pytest.importorskip("foldopt.solvers.qp_solvers"), []
    own = qp_solvers.QPSolver.__call__

    def watched(self, *program):
        starts.append(program[5])
        return own(self, *program)

    monkeypatch.setattr(qp_solvers.QPSolver, "__call__", watched)
    layer, args = foldopt.QPLayer(solver="osqp", warm_start=True), all_sparse(arguments(drawn(3)))
    x = call(layer, args)
    call(layer, args)
    assert starts[0] is None
    assert starts[1].shape == (3,)
    assert np.isfinite(starts[1]).all()
    assert np.array_equal(np.sign(starts[1]).round(), np.sign(x[0].numpy()).round())
    with pytest.raises(errors.InputError, match="warm_start=True needs solver="):
        foldopt.QPLayer(warm_start=True)
