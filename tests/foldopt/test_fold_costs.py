"""What a call of a folded layer keeps in memory, and what it and its backward passes cost."""

import functools
import gc

import pytest
import torch

import foldopt
from foldopt._implicit import FixedPoint
from foldopt.linear_solve import GMRES, WarmStart
from tests.foldopt.steps import F64, heron, iterate, problem, tanh_step


def test_backward_twice_with_retain_graph():
    c, W = problem()
    x = foldopt.fold(iterate(tanh_step), tanh_step)(c, W).sum()
    first = torch.autograd.grad(x, (c, W), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(x, (c, W)), first)


def test_memory_of_the_backward_is_one_step_whatever_the_solver_needed():
    calls = []

    def step(x, c):
        calls.append(1)
        return heron(x, c)

    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    foldopt.fold(torch.sqrt, step, linear_solver=GMRES())(c).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["auto", "direct", "closed form"])
def test_a_call_leaves_nothing_to_the_garbage_collector(name, order):
    """A cycle through what a call records would hold its graph for many training steps."""
    c = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    if name == "closed form":
        eye = torch.eye(3, dtype=F64)
        layer = functools.partial(foldopt.QPLayer(), eye, G=-eye, h=torch.zeros(3, dtype=F64))
    else:
        layer = foldopt.fold(torch.exp, lambda x, c: 0.5 * (x + c.exp()), linear_solver=name)

    def step():
        (gradient,) = torch.autograd.grad(layer(c).pow(2).sum(), c, create_graph=order > 1)
        if order > 1:
            torch.autograd.grad(gradient.sum(), c)

    step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            step()
        left = [o for o in gc.get_objects() if issubclass(type(o), FixedPoint)]
    finally:
        gc.enable()
    assert left == []


def test_further_backward_passes_make_no_more_products():
    """Phi is assembled once for all right-hand sides at a solution."""
    products = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            products.append(1)
            return g

    c, W = problem()
    solve = iterate(tanh_step)
    layer = foldopt.fold(solve, lambda x, c, W: tanh_step(Counted.apply(x), c, W), linear_solver="direct")
    x = layer(c, W)
    first = torch.autograd.grad(x.sum(), (c, W), retain_graph=True)
    spent = len(products)
    assert spent >= x.shape[1]
    again = torch.autograd.grad(2 * x.sum(), (c, W))
    assert len(products) - spent <= 2
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_warm_start_through_training_saves_products():
    c, W = problem(batch=8, n=30, scale=0.12)
    cold, warm = [], []
    results = []
    for solver, products in ((GMRES(), cold), (WarmStart(GMRES()), warm)):
        layer = foldopt.fold(iterate(tanh_step), tanh_step, linear_solver=solver)
        moving = c.detach().clone().requires_grad_()
        for _ in range(6):
            (grad,) = torch.autograd.grad(layer(moving, W.detach()).square().sum(), moving)
            products.append(int(layer.last.backward.iterations.sum()))
            moving = (moving - 1e-5 * grad).detach().requires_grad_()
        results.append(moving.detach())
    assert sum(warm[1:]) < 0.8 * sum(cold[1:])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
