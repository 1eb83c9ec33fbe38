"""fold and modules: their parameters get gradients, undeclared ones are refused; layers copied and compiled."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import foldopt
from foldopt import errors
from tests.foldopt.steps import F64, heron, iterate, problem


class Net(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        gen = torch.Generator().manual_seed(3)
        self.linear = nn.Linear(n, n).double()
        with torch.no_grad():
            self.linear.weight.copy_(0.3 * torch.randn(n, n, generator=gen, dtype=F64))

    def forward(self, x, c):
        return torch.tanh(self.linear(x) + c)


GLOBAL_NET = Net()


def global_step(x, c):
    return GLOBAL_NET(x, c)


def explicit_module_gradient(net, c):
    """The same with the weights passed as parameters of the layer."""
    W, b = (p.detach().clone().requires_grad_() for p in (net.linear.weight, net.linear.bias))

    def step(x, c, W, b):
        return torch.tanh(x @ W.T + b + c)

    loss = foldopt.fold(iterate(step), step)(c, W, b).square().sum()
    first = torch.autograd.grad(loss, (c, W, b), create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), (c, W, b))


@pytest.mark.parametrize("how", ["module", "closure", "partial", "global", "bound method", "modules="])
def test_gradients_reach_the_parameters_of_modules(how):
    c, _ = problem()
    net = GLOBAL_NET if how == "global" else Net()
    hidden = {"net": net}
    options = {}
    update = {
        "module": net,
        "closure": lambda x, c: net(x, c),
        "partial": functools.partial(lambda net, x, c: net(x, c), net),
        "global": global_step,
        "bound method": net.forward,
        "modules=": lambda x, c: hidden["net"](x, c),
    }[how]
    if how == "modules=":
        options["modules"] = [net]
    layer = foldopt.fold(iterate(update), update, **options)
    wanted = (c, net.linear.weight, net.linear.bias)
    first = torch.autograd.grad(layer(c).square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    expected_first, expected_second = explicit_module_gradient(net, c)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(second, expected_second)
    if how == "module":
        assert set(layer.parameters()) == set(net.parameters())


def test_undeclared_parameter_raises_and_names_the_remedy():
    c, _ = problem()
    stray = torch.ones(4, dtype=F64, requires_grad=True)
    derived = stray * 2
    hidden = {"net": Net()}
    for update in (
        lambda x, c: heron(x, c) * stray,
        lambda x, c: heron(x, c) * derived,
        lambda x, c: hidden["net"](x, c),
    ):
        with pytest.raises(errors.UndeclaredParameterError, match=r"shape \(4,.*\).*modules="):
            foldopt.fold(lambda c: c.exp(), update)(c)


def test_deepcopy_and_pickle():
    layer = foldopt.fold(torch.sqrt, heron, on_failure="nan", linear_solver="gmres")
    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    layer(c).sum().backward()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (grad,) = torch.autograd.grad(clone(c).sum(), c)
        torch.testing.assert_close(grad, c.grad)
        assert clone.on_failure == "nan"
    net = Net()
    module_layer = foldopt.fold(lambda c: iterate(net)(c), net)
    twin = copy.deepcopy(module_layer)
    assert twin.update is not net
    twin(torch.rand(2, 4, dtype=F64)).sum().backward()
    assert twin.update.linear.weight.grad is not None
    assert net.linear.weight.grad is None


@pytest.mark.parametrize(
    "layer",
    [foldopt.fold(torch.sqrt, heron), foldopt.unroll(lambda c: c, heron, iterations=20)],
    ids=["fold", "unroll"],
)
def test_a_compiled_function_around_a_layer_gives_the_same_gradient(layer):
    linear = nn.Linear(3, 3).double()

    def function(z):
        return (layer(linear(z).exp()) * 2).sum()

    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    (expected,) = torch.autograd.grad(function(z), z)
    compiled = torch.compile(function, backend="eager")
    for _ in range(2):
        (gradient,) = torch.autograd.grad(compiled(z), z)
        torch.testing.assert_close(gradient, expected)
