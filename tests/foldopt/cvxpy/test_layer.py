import copy
import pickle
import subprocess
import sys

import cvxpy as cp
import numpy as np
import pytest
import torch

import foldopt
from experiments.benchmark.cvxpy_kinds import kind
from foldopt.errors import (
    InfeasibleError,
    InputError,
    KinkError,
    LimitError,
    UnboundedError,
)

F64 = torch.float64


def ball(**options):
    """The point of the ball of radius r that is farthest in the direction c."""
    c, r, x = cp.Parameter(3, name="c"), cp.Parameter(name="r"), cp.Variable(3, name="x")
    return foldopt.CvxpyLayer(cp.Problem(cp.Maximize(c @ x), [cp.norm(x) <= r]), [c, r], [x], **options)


def interval(**options):
    """min c x over low <= x: infeasible above 1, unbounded for c < 0."""
    c, low, x = cp.Parameter(name="c"), cp.Parameter(name="low"), cp.Variable(name="x")
    return foldopt.CvxpyLayer(cp.Problem(cp.Minimize(c * x), [x >= low, low <= 1]), [c, low], [x], **options)


@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS", "foldopt"])
def test_batched_and_shared_parameters_mix_and_shared_ones_get_the_sum(solver):
    layer = ball(solver=solver)
    c = torch.tensor([[3.0, 0, 4], [1, 2, 2]], dtype=F64, requires_grad=True)
    r = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (x,) = layer(c, r)
    torch.testing.assert_close(x, 2 * c.detach() / torch.tensor([[5.0], [3.0]], dtype=F64))
    _, of_r = torch.autograd.grad(x.sum(), [c, r])
    torch.testing.assert_close(of_r, (x.sum() / 2).detach())
    (one,) = layer(c[0], r)
    torch.testing.assert_close(one, x[0])
    (several,) = layer(c[0], torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    torch.testing.assert_close(several[1], x[0].detach())


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_second_derivatives_in_both_modes(outer, inner):
    layer, r = ball(), torch.tensor(2.0, dtype=F64)
    c = torch.tensor([3.0, -1, 4], dtype=F64)
    expected = torch.func.hessian(lambda c: r * c / torch.linalg.vector_norm(c))(c)
    torch.testing.assert_close(outer(inner(lambda c: layer(c, r)[0]))(c), expected, rtol=1e-10, atol=1e-10)


def test_float32_in_float32_out_computed_in_float64():
    layer = ball()
    c = torch.tensor([3.0, 0, 4], requires_grad=True)
    (x,) = layer(c, torch.tensor(5.0))
    assert x.dtype == torch.float32
    (gradient,) = torch.autograd.grad(x[0], c)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.tensor([0.64, 0, -0.48]))


@pytest.mark.parametrize("solver", [None, "CLARABEL", "foldopt"])
def test_one_bad_sample_spoils_no_other(solver):
    c = torch.tensor([1.0, 1, -1, 2], dtype=F64, requires_grad=True)
    low = torch.tensor([0.5, 3, 0, 0.25], dtype=F64, requires_grad=True)
    with pytest.raises(InfeasibleError, match=r"infeasible at 1 of 4 samples, first .1.; unbounded at 1") as caught:
        interval(solver=solver)(c, low)
    assert caught.value.indices == (1, 2)
    with pytest.raises(UnboundedError):
        interval(solver=solver)(-c[:1], low[:1])
    for policy, bad in (("nan", torch.nan), ("zero", 0.0)):
        layer = interval(solver=solver, on_failure=policy)
        (x,) = layer(c, low)
        assert layer.last.status == ("solved", "infeasible", "unbounded", "solved")
        torch.testing.assert_close(x, torch.tensor([0.5, torch.nan, torch.nan, 0.25], dtype=F64), equal_nan=True)
        gradient = torch.autograd.grad(x.nansum(), [low])[0]
        torch.testing.assert_close(gradient, torch.tensor([1, bad, bad, 1], dtype=F64), equal_nan=True)
        assert layer.last.verdict == ("differentiable", "not solved", "not solved", "differentiable")
    with pytest.warns(RuntimeWarning, match="infeasible at 1 of 4"):
        interval(solver=solver, on_failure="warn")(c, low)


def test_a_solver_that_is_stopped_is_no_solution():
    with pytest.raises(LimitError, match="limit reached"):
        ball(options={"max_iter": 1})(torch.ones(3, dtype=F64), torch.tensor(1.0, dtype=F64))


def test_degenerate_policies_act_on_the_samples_at_a_kink():
    x, z = cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - x)), [cp.norm(z) <= 5])
    points = torch.tensor([[3.0, 4], [1, 1], [6, 8]], dtype=F64, requires_grad=True)
    inside, outside = torch.ones(2, dtype=F64), torch.tensor([0.32 - 0.24, 0.18 - 0.24], dtype=F64)
    with pytest.raises(KinkError) as caught:
        foldopt.CvxpyLayer(problem, [x], [z])(points)[0].sum().backward()
    assert caught.value.indices == (0,)
    for policy, at_kink in (("nan", torch.nan), ("zero", 0.0)):
        layer = foldopt.CvxpyLayer(problem, [x], [z], degenerate=policy)
        gradient = torch.autograd.grad(layer(points)[0].sum(), points)[0]
        expected = torch.stack([torch.full((2,), at_kink, dtype=F64), inside, outside])
        torch.testing.assert_close(gradient, expected, equal_nan=True)
        assert layer.last.verdict == ("kink", "differentiable", "differentiable")
    layer = foldopt.CvxpyLayer(problem, [x], [z], degenerate="one_sided")
    one = torch.autograd.grad(layer(points)[0].sum(), points)[0][0]
    pieces = torch.stack([inside, torch.tensor([0.64 - 0.48, 0.36 - 0.48], dtype=F64)])
    assert (one - pieces).abs().amax(1).min() < 1e-6


def test_a_kink_that_the_cotangent_does_not_see_is_none():
    x, z = cp.Parameter(2), cp.Variable(2)
    layer = foldopt.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(z - x)), [cp.norm(z) <= 5]), [x], [z])
    point = torch.tensor([3.0, 4], dtype=F64, requires_grad=True)
    along = torch.tensor([4.0, -3], dtype=F64)  # along the circle both sides have the same derivative, 1
    (gradient,) = torch.autograd.grad(layer(point)[0] @ along, point)
    torch.testing.assert_close(gradient, along)
    assert layer.last.verdict == ("differentiable",)


def test_warm_start_gives_the_same_answer_without_the_solver():
    cold, warm = ball(), ball(warm_start=True)
    c, r = torch.tensor([[3.0, 0, 4], [1, 2, 2]], dtype=F64), torch.tensor(2.0, dtype=F64)
    warm(c, r)
    calls = []
    front = warm.engine.solvers[0].solve
    warm.engine.solvers[0].solve = lambda *data: calls.append(data) or front(*data)
    near = c + 0.01 * torch.sin(torch.arange(6.0, dtype=F64)).view(2, 3)
    torch.testing.assert_close(warm(near, r)[0], cold(near, r)[0], rtol=1e-12, atol=1e-12)
    assert not calls
    torch.testing.assert_close(warm(-c, r)[0], cold(-c, r)[0], rtol=1e-10, atol=1e-10)


def test_symmetric_parameters_get_a_symmetric_gradient():
    k = kind("semidefinite form")
    Q, q = (torch.tensor(value, requires_grad=True) for value in k.values)
    layer = foldopt.CvxpyLayer(k.problem, k.parameters, k.variables)
    (gradient,) = torch.autograd.grad(layer(Q, q)[0][0], Q)
    torch.testing.assert_close(gradient, gradient.mT)
    with pytest.raises(InputError, match=r"not PSD.*as it was declared"):
        layer(-Q, q)
    with pytest.raises(InputError, match="not PSD"):
        layer(Q + torch.eye(5, dtype=F64).roll(1, 0), q)


def test_a_quadratic_objective_may_become_a_cone():
    x, z = cp.Parameter(4), cp.Variable(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - x)), [cp.sum(z) == 1, z >= 0])
    point = torch.tensor([0.4, 0.9, -0.5, 0.3], dtype=F64, requires_grad=True)
    answers = []
    for options in ({}, {"quadratic": False}):
        layer = foldopt.CvxpyLayer(problem, [x], [z], **options)
        (z_value,) = layer(point)
        answers.append((z_value, *torch.autograd.grad(z_value[1], point)))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_problems_without_constraints_or_parameters_in_them():
    p, x = cp.Parameter(3), cp.Variable(3)
    layer = foldopt.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x) + p @ x)), [p], [x])
    value = torch.tensor([1.0, 2, 3], dtype=F64, requires_grad=True)
    (found,) = layer(value)
    torch.testing.assert_close(found, -value / 2)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), value)[0], torch.full((3,), -0.5, dtype=F64))


def test_variables_with_structure():
    c, D, S = cp.Parameter((3, 3)), cp.Variable((3, 3), diag=True), cp.Variable((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(D - c) + cp.sum_squares(S - c)))
    value = torch.arange(9.0, dtype=F64).view(3, 3)
    diagonal, symmetric = foldopt.CvxpyLayer(problem, [c], [D, S])(value)
    torch.testing.assert_close(diagonal, torch.diag(value.diagonal()))
    torch.testing.assert_close(symmetric, (value + value.T) / 2)


def test_layers_can_be_copied_and_pickled():
    layer = ball()
    c, r = torch.tensor([3.0, 0, 4], dtype=F64), torch.tensor(5.0, dtype=F64)
    expected = layer(c, r)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(c, r)[0], expected)


x, n, p, pp = (
    cp.Variable(2, name="x"),
    cp.Variable(integer=True, name="n"),
    cp.Parameter(2, name="p"),
    cp.Parameter(name="s"),
)
Z = cp.Variable(complex=True, name="Z")
REFUSED = {
    "integer": (cp.Minimize(cp.sum_squares(x - p) + cp.square(n)), [x, n], {}, "variables n are integer.*Relax"),
    "complex": (cp.Minimize(cp.sum_squares(x - p) + cp.abs(Z)), [x], {}, "Z are complex"),
    "not DPP": (cp.Minimize(cp.sum_squares(cp.multiply(p, p) - x)), [x], {}, "not DPP because of minimize.*torch"),
    "not convex": (cp.Minimize(cp.sum(cp.sqrt(x)) + p @ x), [x], {}, "not convex .DCP. because of.*NLPLayer"),
    "DQCP": (cp.Minimize(cp.ceil(x[0]) + 0 * p[0]), [x], {}, "quasiconvex .DQCP."),
    "maximize convex": (cp.Maximize(cp.sum_squares(x - p)), [x], {}, "not convex"),
    "parameter": (cp.Minimize(cp.sum_squares(x - p)), [x], {"parameters": [p, pp]}, "has s, which the problem does"),
    "no parameter": (cp.Minimize(cp.sum_squares(x - p)), [x], {"parameters": []}, "parameters= lacks p"),
    "variable": (cp.Minimize(cp.sum_squares(x - p)), [n], {}, "variables= has n, which is neither"),
    "no variable": (cp.Minimize(cp.sum_squares(x - p)), [], {}, "variables= is empty"),
    "solver": (cp.Minimize(cp.sum_squares(x - p)), [x], {"solver": "NONE"}, "solver='NONE' is not installed.*CLARABEL"),
    "cones": (cp.Minimize(cp.norm(x - p)), [x], {"solver": "OSQP"}, "does not support the cones .*soc"),
    "own cones": (cp.Minimize(cp.sum(cp.exp(x - p))), [x], {"solver": "foldopt"}, r"has \['exp'\]; choose another"),
    "own options": (
        cp.Minimize(cp.norm(x - p)),
        [x],
        {"solver": "foldopt", "options": {"eps": 1e-3}},
        "options has .'eps'.: solver='foldopt' knows 'tol' and 'max_iter'",
    ),
    "policy": (cp.Minimize(cp.sum_squares(x - p)), [x], {"degenerate": "no"}, "degenerate='no' is unknown"),
    "failure": (cp.Minimize(cp.sum_squares(x - p)), [x], {"on_failure": "no"}, "on_failure='no' is unknown"),
    "dual": (cp.Minimize(cp.sum_squares(x - p)), [x], {"dual": [x >= 0]}, "dual.0. is .*not one of the problem's"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_problems_that_are_no_layer_are_refused_with_the_remedy(name):
    objective, variables, options, message = REFUSED[name]
    options = {"parameters": [p], **options}
    with pytest.raises(InputError, match=message):
        foldopt.CvxpyLayer(cp.Problem(objective), variables=variables, **options)


def test_a_geometric_program_without_the_flag():
    y, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(a * y**0.5 + 1 / y))
    with pytest.raises(InputError, match="gp=True"):
        foldopt.CvxpyLayer(problem, [a], [y])
    layer = foldopt.CvxpyLayer(problem, [a], [y], gp=True)
    value = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (found,) = layer(value)  # a / (2 sqrt(y)) = 1 / y^2
    torch.testing.assert_close(found, (2 / value) ** (2 / 3))
    torch.testing.assert_close(torch.autograd.grad(found, value)[0], -(2 / 3) * found.detach() / 2)
    with pytest.raises(InputError, match="not pos"):
        layer(-value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.ones(3)], "called with 1 tensors, expected 2: c, r"),
        ([torch.ones(4), torch.ones(())], r"parameter c has shape \(4,\), expected \(3,\) or \('B', 3\)"),
        ([torch.ones(2, 3), torch.ones(3)], "different batch sizes: {'c': 2, 'r': 3}"),
        ([torch.ones(3), torch.tensor(torch.nan)], "parameter r .* is not finite"),
        ([torch.ones(3), 1.0], "parameter r is a float, expected a tensor"),
        ([torch.ones(3, dtype=torch.complex64), torch.ones(())], "expected real numbers"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        ball()(*values)


def test_importing_foldopt_does_not_import_cvxpy():
    code = "import sys, foldopt; print([m for m in ('cvxpy', 'scipy', 'numpy.linalg.lapack') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_cvxpy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(foldopt.errors.MissingDependencyError, match=r"foldopt\[cvxpy\]"):
        foldopt.CvxpyLayer(None, [], [])


def test_random_points_of_a_batch_agree_with_single_calls():
    k = kind("soft top k")
    layer = foldopt.CvxpyLayer(k.problem, k.parameters, k.variables)
    c = torch.tensor(np.random.default_rng(3).normal(size=(6, 10)), requires_grad=True)
    (x,) = layer(c)
    whole = torch.autograd.grad((x**2).sum(), c)[0]
    for i in range(6):
        one = c[i].detach().requires_grad_()
        (alone,) = layer(one)
        torch.testing.assert_close(alone, x[i])
        torch.testing.assert_close(torch.autograd.grad((alone**2).sum(), one)[0], whole[i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda():
    layer = ball(solver="foldopt")
    c = torch.tensor([[3.0, 0, 4], [1, 2, 2]], dtype=F64, requires_grad=True)
    r = torch.tensor(2.0, dtype=F64)
    there = c.detach().cuda().requires_grad_()
    x, y = layer(c, r)[0], layer(there, r.cuda())[0]
    assert y.device.type == "cuda"
    torch.testing.assert_close(y.cpu(), x)
    gradients = torch.autograd.grad(x[:, 0].sum(), c)[0], torch.autograd.grad(y[:, 0].sum(), there)[0]
    torch.testing.assert_close(gradients[1].cpu(), gradients[0])
