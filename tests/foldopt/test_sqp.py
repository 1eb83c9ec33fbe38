"""SQP as an update step on general smooth programs, also nonconvex ones."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import foldopt
from foldopt.errors import DependentRowsError, FixedPointError, InputError, KinkError, NotUniqueError

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


def at_most():
    """min |x - c|^2 / 2 subject to x <= b for every limit b: x = min(c, b), and the multipliers sum to c - x."""
    return foldopt.SmoothProgram(
        lambda x, c, *b: (x - c).square().sum(1) / 2, inequalities=lambda x, c, *b: torch.cat([x - bi for bi in b], 1)
    )


def solve_at_most(share):
    """The first limit carries `share` of the multiplier where there are two."""

    def solve(c, *b):
        x = torch.stack([c, *(bi.expand_as(c) for bi in b)]).amin(0)
        shares = [1.0] if len(b) == 1 else [share, 1 - share]
        return x, c.new_zeros(len(c), 0), torch.cat([part * (c - x) for part in shares], 1)

    return solve


def gradients(layer, params, g, asked):
    params = [p.clone().requires_grad_(i in asked) for i, p in enumerate(params)]
    x = layer(*params)
    x = x if isinstance(x, torch.Tensor) else x[0]
    x.backward(g.expand_as(x))
    return [p.grad for p in params]


TOUCHED = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 2.0]], dtype=F64)  # the first at a kink in x[0], for b = 1
FIRST, SECOND = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[0.0, 1.0]], dtype=F64)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_a_kink_is_named_and_matters_only_to_cotangents_that_see_it(size):
    params = size * TOUCHED, torch.full((3, 1), size, dtype=F64)
    with pytest.raises(KinkError, match=r"inequalities\[0\]") as error:
        gradients(foldopt.f_sqp(at_most(), solve_at_most(1)), params, FIRST, (0,))
    assert error.value.indices == (0,)
    layer = foldopt.f_sqp(at_most(), solve_at_most(1))
    c, b = gradients(layer, params, SECOND, (0, 1))
    assert layer.last.verdict == ("differentiable",) * 3
    torch.testing.assert_close(c, SECOND * torch.tensor([[1.0], [1.0], [0.0]], dtype=F64))
    torch.testing.assert_close(b, torch.tensor([[0.0], [0.0], [1.0]], dtype=F64))
    for policy in ("one_sided", "least_norm"):
        c, b = gradients(foldopt.f_sqp(at_most(), solve_at_most(1), degenerate=policy), params, FIRST, (0, 1))
        assert (float(c[0, 0]), float(b[0])) in ((1.0, 0.0), (0.0, 1.0)), "one of the two pieces"
        torch.testing.assert_close(c[1:], torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64))
    with pytest.warns(RuntimeWarning, match="has a kink"):
        gradients(foldopt.f_sqp(at_most(), solve_at_most(1), degenerate="warn"), params, FIRST, (0,))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("stepsize", [0.5, 1.0])
def test_dependent_rows_whatever_multipliers_the_solver_chose(share, stepsize):
    """x <= b twice, from two parameters: where they hold the derivative is 0 in c, and 1 in both b together."""
    c = torch.tensor([[5.0, 5.0], [7.0, -2.0], [-5.0, 4.0]], dtype=F64)
    params = c, torch.ones(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64)
    held = (c > 1).to(F64)
    options = {"stepsize": stepsize}
    layer = foldopt.f_sqp(at_most(), solve_at_most(share), **options)
    with torch.no_grad():
        torch.testing.assert_close(layer(*params)[0], params[0].clamp(max=1))
    ones = torch.ones(1, 2, dtype=F64)
    torch.testing.assert_close(gradients(layer, params, ones, (0,))[0], 1 - held)
    assert layer.last.verdict == ("differentiable",) * 3
    with pytest.raises(DependentRowsError, match=r"inequalities\[0\], inequalities\[1\], inequalities\[2\]"):
        gradients(layer, params, ones, (1,))
    for policy, shares in (("one_sided", (0.0, 1.0)), ("least_norm", (0.5,))):
        layer = foldopt.f_sqp(at_most(), solve_at_most(share), degenerate=policy, **options)
        c, first, second = gradients(layer, params, FIRST, (0, 1, 2))
        assert layer.last.verdict == ("dependent rows",) * 3
        torch.testing.assert_close(c, FIRST * (1 - held))
        torch.testing.assert_close(first + second, held[:, :1])
        assert min(abs(float(first[0]) - share) for share in shares) < 1e-12


def test_a_solution_that_is_not_unique():
    """x[1] is free in [-9, 9]."""
    program = foldopt.SmoothProgram(
        lambda x, c: (x[:, 0] - c[:, 0]).square() / 2, inequalities=lambda x, c: torch.cat([x - 9, -9 - x], 1)
    )

    def solve(c):
        x = torch.stack([c[:, 0], torch.full_like(c[:, 0], 0.3)], 1)
        return x, c.new_zeros(len(c), 0), c.new_zeros(len(c), 4)

    with pytest.raises(NotUniqueError, match=r"x\[1\]"):
        gradients(foldopt.f_sqp(program, solve), (TOUCHED,), FIRST + SECOND, (0,))
    (c,) = gradients(foldopt.f_sqp(program, solve), (TOUCHED,), FIRST, (0,))
    torch.testing.assert_close(c, FIRST.expand(3, 2))
    (c,) = gradients(foldopt.f_sqp(program, solve, degenerate="least_norm"), (TOUCHED,), FIRST + SECOND, (0,))
    torch.testing.assert_close(c, FIRST.expand(3, 2))


def test_curvature_of_dependent_rows_makes_the_multipliers_matter():
    """A disc and its tangent: where they touch, x moves along them at a rate that depends on which of them carries."""
    program = foldopt.SmoothProgram(
        lambda x, c: (x - c).square().sum(1) / 2,
        inequalities=lambda x, c: torch.cat([x.square().sum(1, keepdim=True) - 1, x[:, :1] - 1], 1),
    )
    c = torch.tensor([[3.0, 0.0]], dtype=F64)

    def solve(c):
        return c / c.norm(dim=1, keepdim=True), c.new_zeros(len(c), 0), torch.tensor([[0.5, 1.0]], dtype=F64)

    layer = foldopt.f_sqp(program, solve)
    torch.testing.assert_close(gradients(layer, (c,), FIRST, (0,))[0], torch.zeros(1, 2, dtype=F64))
    with pytest.raises(DependentRowsError):
        gradients(layer, (c,), SECOND, (0,))


def test_forward_mode_and_second_order_at_dependent_rows():
    c, b = torch.tensor([[4.0, 0.5]], dtype=F64), torch.ones(1, 1, dtype=F64)
    layer = foldopt.f_sqp(at_most(), solve_at_most(0.5))
    _, tangent = torch.func.jvp(lambda c: layer(c, b, b)[0], (c,), (torch.ones_like(c),))
    torch.testing.assert_close(tangent, SECOND)
    with pytest.raises(DependentRowsError):
        torch.func.jvp(lambda b: layer(c, b, b)[0], (b,), (b,))
    c.requires_grad_()
    (first,) = torch.autograd.grad(layer(c, b, b)[0].pow(3).sum(), c, create_graph=True)
    torch.testing.assert_close(first.detach(), torch.tensor([[0.0, 3 * 0.25]], dtype=F64))
    torch.testing.assert_close(torch.autograd.grad(first.sum(), c)[0], torch.tensor([[0.0, 3.0]], dtype=F64))


def test_the_two_policies_are_checked():
    with pytest.raises(InputError, match="degenerate='ignore' is unknown"):
        foldopt.f_sqp(at_most(), solve_at_most(1), degenerate="ignore")
