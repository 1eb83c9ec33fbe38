"""Every proximal operator by its optimality condition, and its derivatives against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from foldopt import prox
from foldopt.errors import InputError

F64 = torch.float64


def points(B=200, n=6, seed=0, scale=2.0):
    return scale * torch.randn(B, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


VALUES = {
    "soft_threshold": (prox.soft_threshold, lambda y: y.abs().sum(1)),
    "l2_norm": (prox.l2_norm, lambda y: y.norm(dim=1)),
    "group_soft_threshold": (
        lambda x, t: prox.group_soft_threshold(x, t, 3),
        lambda y: y.unflatten(1, (3, 2)).norm(dim=2).sum(1),
    ),
    "entropy": (prox.entropy, lambda y: torch.where(y >= 0, torch.special.xlogy(y, y.clamp(min=0)), torch.inf).sum(1)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("t", [0.05, 1.0, 3.0])
def test_nothing_near_has_a_smaller_objective(name, t):
    operator, g = VALUES[name]
    x = points()
    y = operator(x, t)

    def objective(y):
        return t * g(y) + 0.5 * (y - x).square().sum(1)

    best = objective(y)
    for seed in range(40):
        step = points(seed=seed + 1, scale=10.0 ** -(seed % 5))
        assert (objective(y + step) >= best + 0.5 * step.square().sum(1) - 1e-9).all(), (
            "strongly convex: quadratic growth"
        )


@pytest.mark.parametrize("name", VALUES)
def test_derivatives_of_first_and_second_order(name):
    operator, _ = VALUES[name]
    x = points(B=8, seed=3).requires_grad_()
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    assert gradcheck(operator, (x, t))
    assert gradgradcheck(operator, (x, t))


def test_the_entropy_solves_its_equation_at_any_scale():
    x = torch.tensor([-500.0, -20.0, -1.0, 0.0, 1.0, 3.0, 50.0, 1e4], dtype=F64)
    for t in (1e-2, 1.0, 30.0):
        y = prox.entropy(x, t)
        sound = y > 1e-300
        assert (y >= 0).all()
        residual = y + t * (1 + y.log()) - x
        assert (residual[sound].abs() <= 1e-12 * (1 + x[sound].abs() + t * y[sound].log().abs())).all()
    big = torch.tensor([[0.3, 2.0]], dtype=F64, requires_grad=True)
    y = prox.entropy(big, 0.5)
    (slope,) = torch.autograd.grad(y.sum(), big)
    torch.testing.assert_close(slope, (y / (y + 0.5)).detach())


def test_a_zero_weight_is_the_identity():
    x = points(3)
    for operator in (prox.soft_threshold, prox.l2_norm):
        assert torch.equal(operator(x, 0.0), x)


def test_the_origin_has_a_finite_derivative():
    x = torch.zeros(2, 4, dtype=F64, requires_grad=True)
    for operator in (prox.soft_threshold, prox.l2_norm):
        (gradient,) = torch.autograd.grad(operator(x, 0.5).sum(), x)
        assert (gradient == 0).all()


def test_bad_input_is_named():
    x = points(2)
    with pytest.raises(InputError, match="t holds negative values"):
        prox.soft_threshold(x, -1.0)
    with pytest.raises(InputError, match="t of the entropy"):
        prox.entropy(x, 0.0)
    with pytest.raises(InputError, match=r"x has shape \(2, 6\) and groups=4"):
        prox.group_soft_threshold(x, 1.0, 4)
