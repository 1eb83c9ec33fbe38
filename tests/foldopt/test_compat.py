"""The private names of PyTorch that foldopt uses: each does what it is used for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import foldopt
from foldopt import _compat
from tests.foldopt.steps import F64, heron

ONE = torch.tensor(1.0, dtype=F64)


def seen(transform, probe):
    """Return what `probe` says of a tensor inside of a transform."""
    found = []

    def function(t):
        found.append(probe(t))
        return t.sin()

    transform(function)
    return found[-1]


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(ONE),
    "jvp": lambda f: torch.func.jvp(f, (ONE,), (ONE,)),
    "vmap": lambda f: torch.func.vmap(f)(ONE[None]),
}
each = pytest.mark.parametrize("name", TRANSFORMS)


@each
def test_transforming(name):
    assert seen(TRANSFORMS[name], lambda t: _compat.transforming())
    assert not _compat.transforming(ONE)


@each
def test_wrapped_by_func(name):
    assert seen(TRANSFORMS[name], _compat.wrapped_by_func)
    assert not _compat.wrapped_by_func(ONE)


@each
def test_untransformed(name):
    def probe(t):
        with _compat.untransformed():
            return _compat.transforming()

    assert not seen(TRANSFORMS[name], probe)


def test_plain():
    assert _compat.plain(ONE)
    with forward_ad.dual_level():
        assert not _compat.plain(ONE)
    assert not seen(TRANSFORMS["vmap"], _compat.plain)


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        Probe.seen = _compat.batched_by_autograd(g), _compat.transforming(g), _compat.plain(g)
        return g


def test_batched_by_autograd():
    """The public functions that autograd's own vmap serves: without it a layer would see tensors of another rank."""
    x = torch.ones(2, dtype=F64, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x, torch.eye(2, dtype=F64), is_grads_batched=True)
    assert Probe.seen == (True, True, False)
    torch.autograd.functional.jacobian(Probe.apply, x, vectorize=True)
    assert Probe.seen == (True, True, False)
    torch.autograd.functional.hessian(lambda x: Probe.apply(x).square().sum(), x, vectorize=True)
    assert Probe.seen == (True, True, False)
    Probe.apply(x).sum().backward()
    assert Probe.seen == (False, False, True)


def test_through_autograds_vmap():
    x = torch.tensor([[4.0, 9.0]], dtype=F64, requires_grad=True)
    layer = foldopt.fold(torch.sqrt, heron)
    rows = torch.eye(2, dtype=F64)[:, None]
    (batched,) = torch.autograd.grad(layer(x), x, rows, is_grads_batched=True)
    expected = torch.stack([torch.autograd.grad(layer(x), x, row)[0] for row in rows])
    torch.testing.assert_close(batched, expected)
    alone = _compat.through_autograds_vmap((ONE,), lambda t: (t + 1,), lambda *_: pytest.fail("nothing is batched"))
    assert alone == (2 * ONE,)


def test_outer_tangents():
    """Without it the second derivative in forward mode over forward mode is wrong without a word."""
    layer = foldopt.fold(torch.exp, lambda x, c: 0.5 * (x + c.exp()))
    c = torch.tensor([[0.3]], dtype=F64)
    second = torch.func.jacfwd(torch.func.jacfwd(lambda c: layer(c).sum()))(c)
    torch.testing.assert_close(second.flatten(), c.exp().flatten())


def test_leaves():
    assert _compat.leaves(((1, [2]), {"a": {"b": 3}})) == [1, 2, 3]


def test_parameters_replaced():
    linear = nn.Linear(2, 2)
    holder = nn.ModuleList([nn.ModuleList([linear]), linear])  # one module, two names
    before = list(linear.parameters())
    with _compat.parameters_replaced(holder, ["0.0.weight"], [torch.zeros(2, 2)]):
        assert torch.equal(linear(torch.ones(2)), linear.bias)
    assert all(p is q for p, q in zip(linear.parameters(), before, strict=True))


def test_version():
    t = torch.zeros(2)
    before = _compat.version(t)
    t.add_(1)
    assert _compat.version(t) > before


def test_no_other_module_uses_private_names_of_torch():
    private = re.compile(
        r"torch\._C|torch\._functorch|torch\.utils\._|forward_ad\._|torch\._\w+\(|\._parameters|\._version"
    )
    root = Path(foldopt.__file__).parent
    users = {path.name for path in root.rglob("*.py") if private.search(path.read_text())}
    assert users == {"_compat.py"}
