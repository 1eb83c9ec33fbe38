import cvxpy as cp
import numpy as np
import pytest
import torch
from torch.autograd import gradgradcheck

import foldopt
from experiments.benchmark.cvxpy_differences import directions, slopes, solution, weights
from experiments.benchmark.cvxpy_kinds import KINDS, kind
from foldopt.errors import DependentRowsError, KinkError, NotUniqueError

SECOND_ORDER = ("portfolio", "quadratic program", "logistic", "geometric", "nearest semidefinite", "log utility")
OTHER_CONES = (  # cones that foldopt's interior point does not support
    *("logistic", "soft top k", "maximum entropy", "geometric", "log utility"),
    *("nearest semidefinite", "semidefinite at zero", "matrix completion", "weighted geometric mean"),
)
ERRORS = {"kink": KinkError, "not unique": NotUniqueError, "dependent rows": DependentRowsError}


def layer_of(k, **options):
    return foldopt.CvxpyLayer(k.problem, k.parameters, k.variables, gp=k.gp, **options)


def tensors(k):
    return [torch.tensor(value, requires_grad=True) for value in k.values]


def weighted(k, outputs):
    return sum((out * torch.tensor(w)).sum() for out, w in zip(outputs, weights(k), strict=True))


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, None) for name in KINDS] + [(name, "foldopt") for name in KINDS if name not in OTHER_CONES],
)
def test_solution_gradient_and_verdict(name, solver):
    k = kind(name)
    layer, values = layer_of(k, solver=solver), tensors(k)
    outputs = layer(*values)
    loss = weighted(k, outputs)
    if k.verdict != "differentiable":
        with pytest.raises(ERRORS[k.verdict]):
            torch.autograd.grad(loss, values)
        assert layer.last.verdict == (k.verdict,)
        return
    for out, true in zip(outputs, solution(k, k.values), strict=True):
        assert np.abs(out.detach().numpy() - true).max() < 1e-9
    gradients = torch.autograd.grad(loss, values)
    assert layer.last.verdict == ("differentiable",)
    for gradient, direction, (slope, _) in zip(gradients, directions(k), slopes(k), strict=True):
        assert abs((gradient.numpy() * direction).sum() - slope) < 1e-7 * (1 + abs(slope))


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order(name):
    k = kind(name)
    layer = layer_of(k)

    def symmetric(*values):
        return layer(*(v if p.shape == () or not p.is_symmetric() else (v + v.mT) / 2 for v, p in pairs(values)))

    def pairs(values):
        return zip(values, k.parameters, strict=True)

    assert gradgradcheck(symmetric, tensors(k), fast_mode=True)


@pytest.mark.parametrize("name", ["portfolio", "soft top k", "geometric", "huber", "matrix completion"])
def test_forward_mode_and_vmap_agree_with_reverse_mode(name):
    k = kind(name)
    layer, values = layer_of(k), tensors(k)
    tangents = [torch.tensor(d) for d in directions(k)]
    plain = tuple(v.detach() for v in values)
    _, moved = torch.func.jvp(lambda *v: weighted(k, layer(*v)), plain, tuple(tangents))
    gradients = torch.autograd.grad(weighted(k, layer(*values)), values)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert float(moved) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    batch = tuple(torch.stack([v, v + 1e-3 * t]) for v, t in zip(plain, tangents, strict=True))
    for one, other in zip(torch.func.vmap(layer)(*batch), layer(*batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["portfolio", "matrix completion", "maximum entropy", "nearest semidefinite"])
def test_another_solver_gives_the_same_derivative(name):
    k = kind(name)
    found = []
    for solver in (None, "SCS"):
        values = tensors(k)
        layer = layer_of(k, solver=solver)
        found.append(torch.autograd.grad(weighted(k, layer(*values)), values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", list(KINDS))
def test_sparse_systems_give_the_same_gradient_and_verdict(name, monkeypatch):
    k = kind(name)
    answers = []
    for largest in (300, 0):
        monkeypatch.setattr("foldopt._conic.systems.DENSE", largest)
        monkeypatch.setattr("foldopt._conic.newton.DENSE", largest)
        values = tensors(k)
        layer = layer_of(k, degenerate="nan")
        answers.append(torch.autograd.grad(weighted(k, layer(*values)), values))
        assert layer.last.verdict == (k.verdict,)
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_duals_are_those_of_cvxpy():
    A, b, C = cp.Parameter((1, 4)), cp.Parameter(1), cp.Parameter((3, 3), symmetric=True)
    x, t, S = cp.Variable(4), cp.Variable(), cp.Variable((3, 3), symmetric=True)
    constraints = [
        A @ x == b,
        x >= -0.2,
        cp.SOC(t, x),
        S >> C,
        cp.ExpCone(x[:2], np.ones(2), x[2:] + 4),
        cp.sum(x) <= 0.3,
    ]
    for sense in (1, -1):
        cost = t + cp.sum_squares(x - 1) + cp.trace(S) + 0.1 * cp.sum_squares(S)
        problem = cp.Problem(cp.Minimize(cost) if sense > 0 else cp.Maximize(-cost), constraints)
        draw = np.random.default_rng(0)
        values = draw.normal(size=(1, 4)), 0.1 * draw.normal(size=1), np.diag([1.0, -1, 0.5]) + 0.3
        layer = foldopt.CvxpyLayer(problem, [A, b, C], [x], dual=constraints)
        found = layer(*map(torch.tensor, values))[1:]
        for parameter, value in zip((A, b, C), values, strict=True):
            parameter.value = value
        problem.solve(solver="SCS", eps_abs=1e-11, eps_rel=1e-11)
        expected = [d.value for c in constraints for d in c.dual_variables]
        assert len(found) == len(expected) == 9
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), np.reshape(other, one.shape), atol=1e-7)


def test_a_dual_is_differentiable():
    mean, bound, w = cp.Parameter(3), cp.Parameter(), cp.Variable(3)
    limit = cp.norm(w) <= bound
    problem = cp.Problem(cp.Maximize(mean @ w), [limit, cp.sum(w) == 0])
    layer = foldopt.CvxpyLayer(problem, [mean, bound], [w, limit.dual_variables[0]])
    m, r = torch.tensor([1.0, 2, 4], dtype=torch.float64, requires_grad=True), torch.tensor(2.0, dtype=torch.float64)
    _, price = layer(m, r)
    centred = m - m.mean()
    torch.testing.assert_close(price, torch.linalg.vector_norm(centred))
    (gradient,) = torch.autograd.grad(price, m)
    torch.testing.assert_close(gradient, (centred / torch.linalg.vector_norm(centred)).detach())
