"""fold, unfold and unroll on steps whose derivatives are known."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import foldopt
from foldopt import errors
from foldopt.linear_solve import GMRES, LFPI, SOLVERS
from tests.foldopt.steps import F64, heron, iterate, problem, tanh_step


@pytest.mark.parametrize("name", SOLVERS)
def test_first_and_second_order_against_finite_differences(name):
    c, W = problem()
    layer = foldopt.fold(iterate(tanh_step), tanh_step, linear_solver=name)
    assert gradcheck(layer, (c, W))
    assert gradgradcheck(layer, (c, W))


def test_the_derivative_is_an_object_of_ones_choice():
    c, W = problem(scale=0.5)
    solve = iterate(tanh_step, 2000)
    found = []
    for derivative in (
        foldopt.Implicit(),
        foldopt.Implicit(linear_solver=GMRES()),
        foldopt.Unrolled(400, from_solution=True),
    ):
        layer = foldopt.FixedPointLayer(solve, tanh_step, derivative)
        found.append(torch.autograd.grad(layer(c, W).square().sum(), (c, W)))
        assert layer.last.ok.all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)
    with pytest.raises(errors.InputError, match="degenerate='loud' is unknown"):
        foldopt.Implicit(degenerate="loud")


def test_ok_is_of_the_solution_and_of_its_derivative():
    """The second sample has a singular I - Phi: it is solved, but has no derivative."""
    layer = foldopt.fold(lambda c: c, lambda x, c: torch.where(c > 0, 0.5 * x + 0.5 * c, x + 0 * c), on_failure="zero")
    c = torch.tensor([[1.0], [-1.0]], dtype=F64, requires_grad=True)
    x = layer(c)
    assert layer.last.ok.tolist() == [True, True]
    x.sum().backward()
    assert layer.last.solved.tolist() == [True, True]
    assert layer.last.backward.ok.tolist() == layer.last.ok.tolist() == [True, False]


def test_third_order():
    c = torch.tensor([[2.0, 3.0]], dtype=F64, requires_grad=True)
    x = foldopt.fold(torch.sqrt, heron)(c)
    for order, factor in enumerate((0.5, -0.25, 0.375), 1):
        (x,) = torch.autograd.grad(x.sum(), c, create_graph=True)
        torch.testing.assert_close(x, factor * c ** (0.5 - order))


def test_shared_parameter_gets_the_sum_over_the_batch():
    c, W = problem(batch=6)
    layer = foldopt.fold(iterate(tanh_step), tanh_step)
    layer(c, W).square().sum().backward()
    total = torch.zeros_like(W)
    for row in c.detach():
        single = W.detach().clone().requires_grad_()
        layer(row[None], single).square().sum().backward()
        total += single.grad
    torch.testing.assert_close(W.grad, total)


def test_tuple_state_of_different_shapes():
    """x = c^(1/2) as (B, 2, 2), y = x-weighted mean as (B, 3): coupled parts of one state."""

    def step(state, c, d):
        x, y = state
        return 0.5 * (x + c / x), 0.5 * y + d * x.mean((1, 2))[:, None]

    def solve(c, d):
        x = c.sqrt()
        return x, 2 * d * x.mean((1, 2))[:, None]

    gen = torch.Generator().manual_seed(1)
    c = (1 + torch.rand(3, 2, 2, generator=gen, dtype=F64)).requires_grad_()
    d = torch.randn(3, 3, generator=gen, dtype=F64).requires_grad_()
    layer = foldopt.fold(solve, step)
    assert gradcheck(layer, (c, d))
    assert gradgradcheck(layer, (c, d))


def test_lfpi_is_the_unrolled_backward_at_the_fixed_point():
    """Theorem 1: unfolding K steps at x* equals K - 1 LFPI updates from v = g."""
    c, W = problem(scale=0.5)
    solve = iterate(tanh_step, 3000)
    for k in (2, 5, 40):
        grads = []
        lfpi = LFPI(tol=1e-15, max_iter=k - 1)
        for layer in (
            foldopt.unfold(solve, tanh_step, iterations=k),
            foldopt.fold(solve, tanh_step, linear_solver=lfpi, on_failure="warn"),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                grads.append(torch.autograd.grad(layer(c, W).square().sum(), (c, W)))
        for a, b in zip(grads[0], grads[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_fold_unfold_and_unroll_agree():
    c, W = problem(scale=0.5)
    solve = iterate(tanh_step, 2000)
    reference = torch.autograd.grad(foldopt.fold(solve, tanh_step)(c, W).square().sum(), (c, W))
    for layer in (
        foldopt.unfold(solve, tanh_step, iterations=400),
        foldopt.unroll(lambda c, W: torch.zeros_like(c), tanh_step, iterations=800),
    ):
        for a, b in zip(reference, torch.autograd.grad(layer(c, W).square().sum(), (c, W)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert layer.last.ok.all()


def test_gradient_where_the_step_is_not_contractive():
    """A gradient step of size 50 on a quadratic: rho(Phi) is about 100, x* is still its fixed point."""
    gen = torch.Generator().manual_seed(2)
    M = torch.randn(5, 5, generator=gen, dtype=F64)
    H = M @ M.T + torch.eye(5, dtype=F64)
    c = torch.randn(4, 5, generator=gen, dtype=F64).requires_grad_()

    def solve(c):
        return torch.linalg.solve(H, c.T).T

    def step(x, c):
        return x - 50 * (x @ H - c)

    weights = torch.randn(4, 5, generator=gen, dtype=F64)
    true = torch.linalg.solve(H, weights.T).T
    for name in ("auto", "gmres", "direct"):
        (grad,) = torch.autograd.grad((foldopt.fold(solve, step, linear_solver=name)(c) * weights).sum(), c)
        torch.testing.assert_close(grad, true, rtol=1e-8, atol=1e-9)
    layer = foldopt.fold(solve, step, linear_solver="lfpi")
    with pytest.raises(errors.LinearSolveError, match=r"'lfpi' did not solve .* at 4 of 4 samples") as caught:
        (layer(c) * weights).sum().backward()
    assert caught.value.indices == (0, 1, 2, 3)
    for policy, value in (("nan", torch.nan), ("zero", 0.0)):
        layer = foldopt.fold(solve, step, linear_solver="lfpi", on_failure=policy)
        (grad,) = torch.autograd.grad((layer(c) * weights).sum(), c)
        torch.testing.assert_close(grad, torch.full_like(grad, value), equal_nan=True)
        assert not layer.last.backward.ok.any()
    layer = foldopt.fold(solve, step, linear_solver="lfpi", on_failure="warn")
    with pytest.warns(RuntimeWarning, match="did not solve the adjoint equation"):
        (layer(c) * weights).sum().backward()


def test_float32_in_float32_out_with_float64_inside():
    c32 = torch.tensor([[2.0, 3.0]], requires_grad=True)
    seen = []

    def step(x, c):
        seen.append(x.dtype)
        return heron(x, c)

    x = foldopt.fold(torch.sqrt, step, dtype=F64)(c32)
    x.sum().backward()
    assert set(seen) == {F64}
    assert x.dtype == c32.grad.dtype == torch.float32
    torch.testing.assert_close(c32.grad, 0.5 / c32.detach().sqrt(), rtol=1e-7, atol=0)
    x = foldopt.fold(torch.sqrt, heron)(c32)
    assert x.dtype == torch.float32


def test_first_floating_parameter_decides_the_dtype_of_the_answer():
    index = torch.tensor([0, 1])
    c = torch.rand(2, 3, requires_grad=True)
    V = torch.eye(3, dtype=F64, requires_grad=True)
    layer = foldopt.fold(lambda i, c, V: c @ V, lambda x, i, c, V: 0.5 * x + 0.5 * c @ V, dtype=F64)
    x = layer(index, c, V)
    x.sum().backward()
    assert x.dtype == torch.float32
    assert c.grad.dtype == torch.float32
    assert V.grad.dtype == F64


def test_no_grad_inference_mode_and_noncontiguous_input():
    layer = foldopt.fold(torch.sqrt, heron)
    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    with torch.no_grad():
        assert not layer(c).requires_grad
    with torch.inference_mode():
        assert layer(torch.rand(3, 2)).shape == (3, 2)
    assert not layer(c.detach()).requires_grad
    strided = torch.rand(2, 6, dtype=F64).T.requires_grad_()
    assert gradcheck(layer, strided + 1)


def test_gradient_of_the_network_under_a_layer_that_sees_no_grad_solver():
    """The black box runs without gradients even though its input carries them."""
    seen = []

    def solve(c):
        seen.append((torch.is_grad_enabled(), c.requires_grad))
        return c.sqrt()

    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    foldopt.fold(solve, heron)(c).sum().backward()
    assert seen == [(False, False)]


def test_closed_form_jacobian_of_the_update_is_used():
    class Step:
        def __call__(self, x, c):
            return 0.5 * x + 0.5 * c

        def jacobian(self, x, c):
            return 0.5 * torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)

    c = torch.rand(3, 2, dtype=F64, requires_grad=True)
    layer = foldopt.fold(lambda c: c, Step())
    layer(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.ones_like(c))
    assert layer.last.backward.method == "direct"
    assert layer.last.backward.iterations.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SOLVERS)
def test_an_empty_batch_is_no_special_case(name):
    c = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    foldopt.fold(torch.sqrt, heron, linear_solver=name)(c).sum().backward()
    assert c.grad.shape == (0, 3)


@pytest.mark.parametrize(("factor", "method", "products"), [(1.0, "closed form", 1), (1.1, "closed form+gmres", 3)])
def test_a_closed_form_of_the_adjoint_is_certified(factor, method, products):
    """Phi = 1/2, so v = 2 g; a wrong closed form is found out and put right."""

    class Step(nn.Module):
        def forward(self, x, c):
            return 0.5 * (x + c)

        def inverse(self, g, transposed, stepped, x, c):
            assert torch.equal(stepped, self(x, c))
            return factor * 2 * g

    c = torch.tensor([[2.0, 3.0]], dtype=F64, requires_grad=True)
    layer = foldopt.fold(lambda c: c, Step())
    layer(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.ones_like(c))
    assert layer.last.backward.method == method
    assert int(layer.last.backward.iterations[0]) >= products
    assert bool(layer.last.backward.fallback[0]) == (factor != 1)
    tangent = torch.func.jvp(layer, (c.detach(),), (torch.ones(1, 2, dtype=F64),))[1]
    torch.testing.assert_close(tangent, torch.ones_like(tangent))


@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True), (False, False)])
def test_parts_of_the_state_that_nothing_uses_change_no_gradient(used):
    class Step(nn.Module):
        def forward(self, state, c):
            return 0.5 * (state[0] + c), 0.5 * (state[1] + c.sin()[:, :2])

        def inverse(self, g, *_):
            return 2 * g

    c = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    state = foldopt.fold(lambda c: (c, c.sin()[:, :2]), Step())(c)
    exact = c, c.sin()[:, :2]
    found, expected = (
        sum(float(u) * part.square().sum() for u, part in zip(used, parts, strict=True)) for parts in (state, exact)
    )
    torch.testing.assert_close(*(torch.autograd.grad(value, c)[0] for value in (found, expected)))
