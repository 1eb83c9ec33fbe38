"""SQP as an update step on general smooth programs, also nonconvex ones."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import foldopt
from foldopt.errors import FixedPointError, InputError

F64 = torch.float64


def projection_on_ellipsoid():
    """min |x - c|^2 subject to sum a x^2 <= 1, with a > 0 a parameter shared by the batch."""
    return foldopt.SmoothProgram(
        lambda x, c, a: (x - c).square().sum(1), inequalities=lambda x, c, a: ((a * x * x).sum(1) - 1)[:, None]
    )


def solve_projection(c, a):
    """Bisection on the multiplier: x = c / (1 + lam a) with a x^2 summing to 1, or c itself when inside."""
    low, high = torch.zeros(len(c), 1, dtype=c.dtype), torch.full((len(c), 1), 1e6, dtype=c.dtype)
    for _ in range(200):
        lam = (low + high) / 2
        x = c / (1 + lam * a)
        outside = (a * x * x).sum(1, keepdim=True) > 1
        low, high = torch.where(outside, lam, low), torch.where(outside, high, lam)
    inside = (a * c * c).sum(1, keepdim=True) <= 1
    lam = torch.where(inside, 0.0, low)
    return c / (1 + lam * a), c.new_zeros(len(c), 0), lam


def parameters(B=5, n=3, scale=2.0):
    g = torch.Generator().manual_seed(0)
    c = (scale * torch.randn(B, n, generator=g, dtype=F64)).requires_grad_()
    a = (0.5 + torch.rand(n, generator=g, dtype=F64)).requires_grad_()
    return c, a


def test_projection_on_a_learned_ellipsoid_of_first_and_second_order():
    c, a = parameters()
    layer = foldopt.f_sqp(projection_on_ellipsoid(), solve_projection)

    def primal(c, a):
        return layer(c, a)[0]

    assert ((a * c * c).sum(1) > 1).all()
    assert gradcheck(primal, (c, a), atol=1e-6)
    assert gradgradcheck(primal, (c, a), atol=1e-4)


def test_an_inactive_constraint_does_not_matter():
    c, a = parameters(scale=0.1)
    x, _, lam = foldopt.f_sqp(projection_on_ellipsoid(), solve_projection)(c, a)
    assert (lam == 0).all()
    gradient_c, gradient_a = torch.autograd.grad(x.sum(), (c, a))
    torch.testing.assert_close(gradient_c, torch.ones_like(c))
    assert (gradient_a == 0).all()


@pytest.mark.parametrize("stepsize", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("linear_solver", ["lfpi", "gmres", "direct"])
def test_the_gradient_does_not_depend_on_the_stepsize(stepsize, linear_solver):
    c, a = parameters()
    g = torch.randn(c.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    gradients = []
    for options in ({}, {"stepsize": stepsize, "linear_solver": linear_solver}):
        x = foldopt.f_sqp(projection_on_ellipsoid(), solve_projection, **options)(c, a)[0]
        gradients.append(torch.autograd.grad(x, (c, a), g))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def test_a_nonconvex_objective_on_the_sphere():
    """min 0.5 x'Mx on |x| = 1 is an eigenvector; its derivative is that of the eigenvector (multiplier: eigenvalue)."""
    g = torch.Generator().manual_seed(3)
    root = torch.randn(4, 3, 3, generator=g, dtype=F64)
    M = (root + root.mT).requires_grad_()
    program = foldopt.SmoothProgram(
        lambda x, M: 0.5 * torch.einsum("bi,bij,bj->b", x, M, x),
        equalities=lambda x, M: 0.5 * (x.square().sum(1, keepdim=True) - 1),
    )

    def solve(M):
        values, vectors = torch.linalg.eigh(M)
        return vectors[:, :, 0], -values[:, :1], M.new_zeros(len(M), 0)

    x = foldopt.f_sqp(program, solve)(M)[0]
    cotangent = torch.randn(x.shape, generator=g, dtype=F64)
    (gradient,) = torch.autograd.grad((x * cotangent).sum(), M)
    vector = torch.linalg.eigh((M + M.mT) / 2)[1][:, :, 0]
    (expected,) = torch.autograd.grad((vector * cotangent).sum(), M)
    torch.testing.assert_close((gradient + gradient.mT) / 2, expected)


def test_a_solver_of_another_problem_is_caught():
    c, a = parameters()
    wrong = foldopt.f_sqp(projection_on_ellipsoid(), lambda c, a: solve_projection(1.01 * c, a))
    with pytest.raises(FixedPointError, match="the update step does not fix the solver's solution"):
        wrong(c, a)


def test_misuse_is_refused():
    with pytest.raises(InputError, match=r"has no method sqp_data; wrap its functions in foldopt\.SmoothProgram"):
        foldopt.SQP(lambda x: x)
    with pytest.raises(InputError, match=r"stepsize=2: SQP takes a step in \(0, 1\]"):
        foldopt.SQP(projection_on_ellipsoid(), stepsize=2)
