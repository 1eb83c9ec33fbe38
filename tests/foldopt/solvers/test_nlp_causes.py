"""The built-in solver where curvature, units or solutions are missing, and the name of what is missing."""

import time

import pytest
import torch

import foldopt
from foldopt import SmoothProgram, errors
from foldopt.solvers._nlp_causes import CAUSES
from foldopt.solvers.nlp import solve_nlp

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(x, c):
    return (c * x).sum(1)


def in_ball(x, c):
    return x.square().sum(1, keepdim=True) - 1


CURVED = {
    "ball": (in_ball, None, lambda c: -c.norm(dim=1)),
    "sphere": (None, in_ball, lambda c: -c.norm(dim=1)),
    "quartic": (
        lambda x, c: (x**4).sum(1, keepdim=True) - 1,
        None,
        lambda c: -((c.abs() ** (4 / 3)).sum(1) ** (3 / 4)),
    ),
}


@pytest.mark.parametrize("start", [0.0, 0.1, 1.0, 10.0, 200.0])
@pytest.mark.parametrize("kind", CURVED)
def test_a_linear_objective_over_a_curved_set_is_solved_from_anywhere(kind, start):
    """With zero multipliers the Lagrangian has no curvature at the start; the optima are closed forms."""
    inequalities, equalities, optimum = CURVED[kind]
    c = normal(200, 5)
    found = solve_nlp(SmoothProgram(linear, equalities, inequalities), torch.full((200, 5), start, dtype=F64), c)
    assert found.ok.all()
    torch.testing.assert_close(linear(found.x, c), optimum(c), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_units_of_the_objective_and_of_the_rows_do_not_matter(unit):
    c = normal(50, 5)
    expected = -c / c.norm(dim=1, keepdim=True)
    start = torch.full((50, 5), 0.1, dtype=F64)
    for cost, row in ((unit, 1.0), (1.0, unit), (unit, 1 / unit)):
        program = SmoothProgram(
            lambda x, c, cost=cost: cost * linear(x, c), None, lambda x, c, row=row: row * in_ball(x, c)
        )
        found = solve_nlp(program, start, c)
        assert found.ok.all()
        torch.testing.assert_close(found.x, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.lam[:, 0], cost / row * c.norm(dim=1) / 2, rtol=1e-8, atol=0)


def test_large_variables_do_not_matter():
    """min sum ((x_j - a_j) / a_j)^2 with a from 1 to 1e7."""
    a = torch.tensor([[1.0, 1e3, 1e5, 1e7]], dtype=F64)
    program = SmoothProgram(lambda x, a: ((x - a) / a).pow(2).sum(1) - 0.1 * (x / a).prod(1))
    found = solve_nlp(program, 2 * a, a)
    assert found.ok.all()
    ratio = (found.x / a)[0]  # alike in all variables by symmetry: 2 (r - 1) = r^3 / 10
    torch.testing.assert_close(2 * (ratio - 1), 0.1 * ratio**3)


def causes(objective, inequalities=None, equalities=None, n=2, start=1.0, **options):
    program = SmoothProgram(objective, equalities, inequalities)
    begun = time.process_time()
    found = solve_nlp(program, torch.full((2, n), start, dtype=F64), torch.ones(2, n, dtype=F64), **options)
    assert time.process_time() - begun < 10
    assert not found.ok.any()
    return {CAUSES[i] for i in found.cause.tolist()}


def square(x, c):
    return x.square().sum(1)


@pytest.mark.parametrize(
    ("expected", "program"),
    [
        ("infeasible", {"objective": square, "inequalities": lambda x, c: torch.cat([x - 1, 2 - x], 1)}),
        ("infeasible", {"objective": square, "equalities": lambda x, c: torch.stack([x.sum(1), x.sum(1) - 1], 1)}),
        ("infeasible", {"objective": square, "equalities": lambda x, c: in_ball(x, c) + 2}),
        ("unbounded", {"objective": lambda x, c: -x.sum(1), "inequalities": lambda x, c: -x}),
        ("unbounded", {"objective": lambda x, c: x.sum(1) - x.square().sum(1)}),
        ("not smooth", {"objective": lambda x, c: (x - 0.3).abs().sum(1)}),
        ("iteration limit", {"objective": lambda x, c: (x - 5).pow(4).sum(1), "max_iter": 3}),
        ("time limit", {"objective": lambda x, c: (x - 5).pow(4).sum(1), "time_limit": 1e-9}),
        ("not finite", {"objective": lambda x, c: x.log().sum(1), "start": -1.0}),
    ],
)
def test_every_failure_has_its_name(expected, program):
    assert causes(**program) == {expected}


def layer(objective, *rows, start=1.0, **options):
    return foldopt.NLPLayer(objective, *rows, start=torch.full((2,), start), **options)


@pytest.mark.parametrize("solver", ["sqp", "slsqp"])
def test_an_infeasible_sample_names_the_constraint_and_its_violation(solver):
    """x <= 1 and x >= c: the violations are c - 1 at any point between."""
    if solver != "sqp":
        pytest.importorskip("scipy")
    rows = lambda x, c: torch.cat([x - 1, c - x], 1)  # noqa: E731
    c = torch.tensor([[0.5, 0.5], [0.0, 3.0]], dtype=F64)
    with pytest.raises(errors.InfeasibleError, match=r"inequalities\[[13]\] most, by .* all together by 2.0e\+00") as e:
        layer(square, rows, solver=solver)(c)
    assert e.value.indices == (1,)
    lenient = layer(square, rows, solver=solver, on_failure="nan")
    lenient(c)
    assert lenient.last.status == ("solved", "infeasible")


@pytest.mark.parametrize(
    ("error", "objective", "rows"),
    [
        (errors.UnboundedError, lambda x, c: -x.sum(1), (lambda x, c: -x,)),
        (errors.NotSmoothError, lambda x, c: (x - c).abs().sum(1), ()),
        (errors.NoMultipliersError, lambda x, c: x[:, 0], (None, lambda x, c: x.square())),
        (errors.LimitError, lambda x, c: (x - 5).pow(4).sum(1), ()),
    ],
)
def test_causes_are_errors_of_their_own(error, objective, rows):
    options = {"max_iter": 3} if error is errors.LimitError else {}
    with pytest.raises(error):
        layer(objective, *rows, **options)(torch.full((1, 2), 0.3, dtype=F64))


@pytest.mark.parametrize("solver", ["sqp", "slsqp", "trust-constr"])
@pytest.mark.parametrize(
    ("limit", "name"), [({"max_iter": 2}, "iteration limit"), ({"time_limit": 1e-6}, "time limit")]
)
def test_limits_reach_every_solver(solver, limit, name):
    if solver != "sqp":
        pytest.importorskip("scipy")
    limited = layer(
        lambda x, c: 100 * (x[:, 1] - x[:, 0] ** 2) ** 2 + (c[:, 0] - x[:, 0]) ** 2,
        start=-50.0,
        solver=solver,
        on_failure="nan",
        **limit,
    )
    limited(torch.ones(1, 2, dtype=F64))
    assert limited.last.status == (name,)


def test_functions_that_leave_torch_are_told_so():
    with pytest.raises(errors.InputError, match=r"foldopt\.ExternalFunction"):
        layer(lambda x, c: torch.as_tensor((x.detach().numpy() ** 2).sum(1)))(torch.ones(1, 2, dtype=F64))
