"""Functions that are not PyTorch code, as parts of a program: values and derivatives against the same in PyTorch."""

import copy
import pickle

import numpy as np
import pytest
import torch

import foldopt
from foldopt.errors import InputError
from foldopt.updates.external import ExternalFunction

F64 = torch.float64


def value(z):
    return np.array([z[0] * z[3] * (z[0] + z[1] + z[2]) + z[2]])


def jacobian(z):
    total = z[0] + z[1] + z[2]
    return np.array([[z[3] * (total + z[0]), z[0] * z[3], z[0] * z[3] + 1, z[0] * total]])


def hessian(z, w):
    a, b, d = z[3], z[0], 2 * z[0] + z[1] + z[2]
    return w[0] * np.array([[2 * a, a, a, d], [a, 0, 0, b], [a, 0, 0, b], [d, b, b, 0]])


def limits(z):
    """z holds x (4) and the parameters (2): c0 - prod x <= 0 and |x|^2 - c1 = 0."""
    return np.array([z[4] - z[:4].prod(), z[:4] @ z[:4] - z[5]])


def limits_jacobian(z):
    x = z[:4]
    return np.array([[*(-np.delete(x, i).prod() for i in range(4)), 1, 0], [*(2 * x), 0, -1]])


def limits_hessian(z, w):
    H = np.zeros((6, 6))
    for i in range(4):
        H[i, i] = 2 * w[1]
        for j in range(i):
            H[i, j] = H[j, i] = -w[0] * np.delete(z[:4], [i, j]).prod()
    return H


def in_numpy():
    """Hock and Schittkowski's problem 71 with functions of NumPy alone, the parameters among their arguments."""
    cost, rows = ExternalFunction(value, jacobian, hessian), ExternalFunction(limits, limits_jacobian, limits_hessian)
    return foldopt.NLPLayer(
        lambda x, c: cost(x)[:, 0],
        lambda x, c: rows(torch.cat([x, c], 1))[:, :1],
        lambda x, c: rows(torch.cat([x, c], 1))[:, 1:],
        lower=torch.ones(4),
        upper=torch.full((4,), 5.0),
        start=torch.tensor([1.0, 5.0, 5.0, 1.0]),
    )


def in_torch():
    return foldopt.NLPLayer(
        lambda x, c: x[:, 0] * x[:, 3] * x[:, :3].sum(1) + x[:, 2],
        lambda x, c: c[:, :1] - x.prod(1, keepdim=True),
        lambda x, c: x.square().sum(1, keepdim=True) - c[:, 1:],
        lower=torch.ones(4),
        upper=torch.full((4,), 5.0),
        start=torch.tensor([1.0, 5.0, 5.0, 1.0]),
    )


def parameters():
    return torch.tensor([[25.0, 40.0], [25.5, 40.2], [24.0, 41.0]], dtype=F64, requires_grad=True)


def test_first_and_second_derivatives_agree_with_differences():
    z = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=F64).add(0.5).requires_grad_()
    rows = ExternalFunction(limits, limits_jacobian, limits_hessian)
    assert torch.autograd.gradcheck(rows, (z,))
    assert torch.autograd.gradgradcheck(rows, (z,))


def test_a_layer_of_them_has_the_derivative_of_the_same_layer_in_torch():
    c = parameters()
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    (mine,) = torch.autograd.grad((in_numpy()(c) * weight).sum(), c)
    (other,) = torch.autograd.grad((in_torch()(c) * weight).sum(), c)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    rows = torch.func.jacrev(in_numpy())(c.detach())
    torch.testing.assert_close(rows, torch.func.jacrev(in_torch())(c.detach()), rtol=1e-9, atol=1e-12)


def test_under_vmap_the_samples_join_the_batch():
    rows = ExternalFunction(limits, limits_jacobian, limits_hessian)
    z = torch.rand(5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(torch.func.vmap(rows)(z), torch.stack([rows(one) for one in z]))
    torch.testing.assert_close(torch.func.vmap(rows, in_dims=1)(z), torch.stack([rows(z[:, i]) for i in range(3)]))


def test_the_gradient_of_a_gradient_needs_third_derivatives():
    c = parameters()
    (gradient,) = torch.autograd.grad(in_numpy()(c).square().sum(), c, create_graph=True)
    with pytest.raises(InputError, match="first and second derivatives only"):
        gradient.sum().backward()


def test_the_third_derivative_of_the_functions_is_refused():
    """Outside of a layer nothing makes it zero: that of z^4 at 2 is 48."""
    function = ExternalFunction(
        lambda z: z**4, lambda z: np.array([[4 * z[0] ** 3]]), lambda z, w: w[0] * np.array([[12 * z[0] ** 2]])
    )
    z = torch.tensor([[2.0]], dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z, create_graph=True)
    torch.testing.assert_close(second.detach(), torch.tensor([[48.0]], dtype=F64))
    with pytest.raises(InputError, match="first and second derivatives only"):
        torch.autograd.grad(second.sum(), z)
    slope = torch.func.grad(lambda z: function(z[None]).sum())
    with pytest.raises(InputError, match="first and second derivatives only"):
        torch.func.jacrev(torch.func.jacrev(slope))(torch.tensor([2.0], dtype=F64))


def test_rows_that_are_alike_are_evaluated_once():
    calls = []

    def counted(z):
        calls.append(z)
        return value(z)

    function = ExternalFunction(counted, jacobian, hessian)
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 3.0, 4.0]], dtype=F64)
    expected = torch.tensor([[27.0], [27.0], [59.0]], dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(function(z), expected)
    assert len(calls) == 2
    plain = ExternalFunction(value, jacobian, hessian)
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(other(z), expected)


@pytest.mark.parametrize(
    ("which", "match"),
    [("value", r"value .* returned shape \(1, 1\)"), ("jacobian", r"jacobian .* expected \('r', 4\)")],
)
def test_shapes_are_checked(which, match):
    parts = {"value": value, "jacobian": jacobian, "hessian": hessian}
    right = parts[which]
    function = ExternalFunction(**{**parts, which: lambda z: right(z)[None]})
    z = torch.ones(2, 4, dtype=F64, requires_grad=True)
    with pytest.raises(InputError, match=match):
        function(z).sum().backward()
    with pytest.raises(InputError, match=r"called with shape \(4,\)"):
        function(z[0])
