"""`NLPLayer` with a sparse KKT system: against the dense one, differences, and states that are no solutions."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import jacfwd, jacrev, vmap

import foldopt
from foldopt.errors import FixedPointError
from tests.foldopt.programs import F64
from tests.foldopt.sparse_programs import PROGRAMS, chain, problem, shared_state, square, total


@pytest.mark.parametrize("name", PROGRAMS)
def test_sparse_and_dense_agree(name):
    dense, sparse, c = problem(name)
    weights = torch.linspace(-1, 1, c.shape[1], dtype=F64)
    values, gradients = [], []
    for layer in (dense, sparse):
        x = layer(c)
        values.append((x.detach(), *layer.multipliers))
        gradients.append(torch.autograd.grad((x * weights).sin().sum(), c)[0])
        assert layer.last.verdict == ("differentiable",) * 3
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert sparse.last.backward.residual.max() < 1e-12
    assert sparse.last.backward.method == "closed form"


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_those_of_finite_differences(name):
    _, layer, c = problem(name, batch=2)
    weights = torch.linspace(-1, 1, c.shape[1], dtype=F64)
    (grad,) = torch.autograd.grad((layer(c) * weights).sum(), c)
    direction, eps = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=F64), 1e-5
    ends = [(layer(c.detach() + side * eps * direction) * weights).sum() for side in (1, -1)]
    torch.testing.assert_close((grad * direction).sum(), (ends[0] - ends[1]) / (2 * eps), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_higher_derivatives_and_transforms():
    dense, _, c = problem("curved equalities", n=6, batch=2)
    plain = c.detach()
    state = (dense(plain).detach(), *dense.multipliers)

    def nearby(c):  # Newton's steps, of the layer itself, do the rest
        same = [(c[:, None] - plain).norm(dim=2).argmin(1)]
        return tuple(part[same] for part in state)

    objective, inequalities, equalities = PROGRAMS["curved equalities"]
    layer = foldopt.NLPLayer(objective, inequalities, equalities, solver=nearby, sparsity=True, polish=4)
    assert torch.autograd.gradcheck(layer, c, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, c)
    expected = jacrev(dense)(plain)
    for jacobian in (jacrev(layer), jacfwd(layer)):
        torch.testing.assert_close(jacobian(plain), expected, rtol=1e-10, atol=1e-10)
    many = torch.stack([plain, 1.0001 * plain])
    found = vmap(jacrev(lambda c: layer(c).sum()))(many)
    for one, gradient in zip(many, found, strict=True):
        torch.testing.assert_close(gradient, jacrev(lambda c: dense(c).sum())(one), rtol=1e-10, atol=1e-10)


def test_gradients_reach_modules_and_float32_is_answered_in_float32():
    class Cost(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5, 0.5, 2.0], dtype=F64))

        def forward(self, x, c):
            return (self.weight * (x - c) ** 2).sum(1)

    cost = Cost()
    c = torch.tensor([[0.3, -0.2, 0.5], [1.0, 2.0, 3.0]], requires_grad=True)

    def solver(c):  # min sum w (x - c)^2, sum x = 1, in closed form
        inverse = 1 / cost.weight
        return c + (1 - c.sum(1, keepdim=True)) * inverse / inverse.sum()

    layer = foldopt.NLPLayer(cost, equalities=lambda x, c: x.sum(1, keepdim=True) - 1, solver=solver, sparsity=True)
    x = layer(c)
    found = torch.autograd.grad((x * torch.arange(3)).sum(), (c, cost.weight))
    expected = torch.autograd.grad((solver(c.double()) * torch.arange(3)).sum(), (c, cost.weight))
    assert x.dtype == found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-6, atol=1e-6)


def infeasible(state):
    state[0][1] += 0.1


def wrong_sign(state):
    state[2][1, int((state[0][1].abs() < 0.9).nonzero()[0, 0])] = -0.3


def not_active(state):
    state[2][1, int((state[0][1].abs() < 0.9).nonzero()[0, 0])] = 0.3


def not_finite(state):
    state[0][1, 2] = torch.nan


@pytest.mark.parametrize("spoil", [infeasible, wrong_sign, not_active, not_finite])
@pytest.mark.parametrize("polish", [0, 1])
def test_a_state_that_is_no_solution_is_found_out_and_spoils_no_other(spoil, polish):
    layer, state, c = shared_state(polish=polish, on_failure="nan")
    right = torch.autograd.grad(layer(c).sin().sum(), c)[0]
    exact = state[0].clone()
    spoil(state)
    x = layer(c)
    mended = polish and spoil in (wrong_sign, not_active)
    assert layer.last.ok.tolist() == [True, bool(mended), True]
    (grad,) = torch.autograd.grad(x.sin().sum(), c)
    torch.testing.assert_close(grad[[0, 2]], right[[0, 2]], rtol=1e-12, atol=1e-12)
    if mended:
        torch.testing.assert_close(x.detach(), exact, rtol=1e-12, atol=1e-12)
    else:
        assert grad[1].isnan().all()
        strict, *_ = shared_state(polish=polish)
        strict.solver = lambda c: tuple(state)
        with pytest.raises(FixedPointError) as caught:
            strict(c)
        assert caught.value.indices == (1,)


def test_a_loose_answer_is_polished_and_multipliers_are_found():
    layer, state, c = shared_state()
    exact = [part.clone() for part in state]
    (right,) = torch.autograd.grad(layer(c).sin().sum(), c)
    noise = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    layer.solver = lambda c: exact[0] + 1e-7 * noise
    x = layer(c)
    (grad,) = torch.autograd.grad(x.sin().sum(), c)
    torch.testing.assert_close(x.detach(), exact[0], rtol=1e-11, atol=1e-11)
    for found, expected in zip(layer.multipliers, exact[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9)


def test_layers_are_copied_and_pickled():
    layer = foldopt.NLPLayer(chain, square, total, solver=picklable_solver, sparsity=True)
    c = problem("both")[2]
    (expected,) = torch.autograd.grad(layer(c).sum(), c)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (grad,) = torch.autograd.grad(clone(c).sum(), c)
        assert torch.equal(grad, expected)


def picklable_solver(c):
    return problem("both")[0](c).detach()
