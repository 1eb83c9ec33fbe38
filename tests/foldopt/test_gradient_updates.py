"""Folded projected and proximal gradient steps against an independent derivation, on random programs."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import foldopt
from foldopt import projections, prox
from foldopt.errors import InputError
from foldopt.solvers.qp import solve_qp
from foldopt.updates import ProjectedGradient, ProximalGradient

F64 = torch.float64


def quadratic(x, H, q):
    return 0.5 * torch.einsum("bi,bij,bj->b", x, H, x) + (q * x).sum(1)


def random_quadratics(B, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(B, n, n, generator=g, dtype=F64)
    return (root @ root.mT / n + 0.1 * torch.eye(n, dtype=F64)), torch.randn(B, n, generator=g, dtype=F64)


def simplex_qp(H, q):
    B, n = q.shape
    ones, eye = q.new_ones(B, 1, n), torch.eye(n, dtype=q.dtype).expand(B, n, n)
    found = solve_qp((H + H.mT) / 2, q, ones, q.new_ones(B, 1), -eye, q.new_zeros(B, n))
    assert found.ok.all()
    return found.x


@pytest.mark.parametrize("linear_solver", ["auto", "direct", "lfpi"])
@pytest.mark.parametrize("n", [5, 30])
def test_projected_gradient_on_the_simplex_against_the_kkt_system_of_the_qp(linear_solver, n):
    H, q = (t.requires_grad_() for t in random_quadratics(200, n))
    update = ProjectedGradient(lambda x, H, q: quadratic(x, H, q), lambda x, H, q: projections.simplex(x), 0.2)
    layer = foldopt.fold(simplex_qp, update, linear_solver=linear_solver)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    folded = torch.autograd.grad(layer(H, q), (H, q), g)
    expected = torch.autograd.grad(simplex_qp(H, q), (H, q), g)
    for mine, other in zip(folded, expected, strict=True):
        mine, other = ((t + t.mT if t.dim() == 3 else t).flatten(1) for t in (mine, other))
        assert ((mine - other).norm(dim=1) <= 1e-6 * other.norm(dim=1).clamp(min=1e-3)).all()


def solve_lasso(A, b, w):
    """Proximal gradient descent to machine precision."""
    x = b.new_zeros(len(b), A.shape[-1])
    step = 1 / torch.linalg.matrix_norm(A, 2).square()
    for _ in range(4000):
        x = prox.soft_threshold(x - step * (x @ A.mT - b) @ A, step * w)
    return x


@pytest.mark.slow
def test_proximal_gradient_on_the_lasso_of_first_and_second_order():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(6, 4, generator=g, dtype=F64).requires_grad_()
    b = torch.randn(5, 6, generator=g, dtype=F64).requires_grad_()
    w = torch.tensor(0.4, dtype=F64, requires_grad=True)
    update = ProximalGradient(
        lambda x, A, b, w: 0.5 * (x @ A.mT - b).square().sum(1),
        lambda x, step, A, b, w: prox.soft_threshold(x, step * w),
        0.05,
    )
    layer = foldopt.fold(solve_lasso, update)
    x = layer(A, b, w)
    assert (x == 0).any() and (x != 0).any()  # noqa: PT018
    assert gradcheck(layer, (A, b, w))
    assert gradgradcheck(layer, (A, b, w))


@pytest.mark.parametrize("stepsize", [1e-3, 0.5, 50.0])
def test_the_gradient_does_not_depend_on_the_stepsize(stepsize):
    H, q = random_quadratics(20, 6, seed=2)
    q = q.requires_grad_()
    gradients = []
    for step in (0.1, stepsize):
        update = ProjectedGradient(quadratic, lambda x, H, q: projections.simplex(x), step)
        gradients.append(torch.autograd.grad(foldopt.fold(simplex_qp, update)(H, q).square().sum(), q)[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_misuse_is_refused():
    with pytest.raises(InputError, match="projection=None is not callable"):
        ProjectedGradient(quadratic, None, 0.1)
    with pytest.raises(InputError, match="stepsize=0: expected a number above 0"):
        ProximalGradient(quadratic, prox.soft_threshold, 0)
