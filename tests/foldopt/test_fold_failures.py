"""What fold and unroll do about samples that fail, and every way to misuse them."""

import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.steps import F64, heron, iterate, problem, tanh_step


def test_step_that_does_not_fix_the_solution_is_found_out():
    c = torch.tensor([[4.0], [9.0], [16.0]], dtype=F64, requires_grad=True)

    def solve(c):
        x = c.sqrt()
        x[1] = 2.9
        return x

    with pytest.raises(
        errors.FixedPointError, match=r"at 1 of 3 samples, worst at index 1.*Solver and step disagree"
    ) as e:
        foldopt.fold(solve, heron)(c)
    assert e.value.indices == (1,)
    with pytest.raises(errors.FixedPointError):
        foldopt.fold(solve, heron)(c.detach())
    assert foldopt.fold(solve, heron, tol=0.1)(c).shape == (3, 1)
    layer = foldopt.fold(solve, heron, on_failure="zero")
    layer(c).sum().backward()
    assert layer.last.ok.tolist() == [True, False, True]
    torch.testing.assert_close(c.grad, torch.tensor([[0.25], [0.0], [0.125]], dtype=F64))
    layer = foldopt.fold(solve, heron, on_failure="nan")
    (grad,) = torch.autograd.grad(layer(c).sum(), c)
    assert grad.isnan().flatten().tolist() == [False, True, False]
    with pytest.warns(RuntimeWarning, match="does not fix the solver's solution"):
        foldopt.fold(solve, heron, on_failure="warn")(c)


def test_failed_sample_does_not_spoil_the_others_or_shared_parameters():
    c, W = problem(batch=4)
    good = iterate(tanh_step)

    def solve(c, W):
        x = good(c, W)
        x[2] = torch.nan
        return x

    layer = foldopt.fold(solve, tanh_step, on_failure="zero")
    x = layer(c, W)
    assert x[2].isnan().all()
    grads = torch.autograd.grad(x[layer.last.ok].square().sum(), (c, W))
    keep = [0, 1, 3]
    expected = torch.autograd.grad(foldopt.fold(good, tanh_step)(c[keep], W).square().sum(), (c, W))
    torch.testing.assert_close(grads, expected)


def test_unrolled_layer_reports_samples_that_have_not_converged():
    c = torch.tensor([[4.0], [1e8]], dtype=F64, requires_grad=True)
    start = torch.ones_like
    with pytest.raises(errors.FixedPointError, match="at 1 of 2 samples, worst at index 1"):
        foldopt.unroll(start, heron, iterations=8)(c)
    layer = foldopt.unroll(start, heron, iterations=8, on_failure="zero")
    layer(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.tensor([[0.25], [0.0]], dtype=F64))


def ok_layer(**options):
    return foldopt.fold(torch.sqrt, heron, **options)


C = torch.rand(3, 2, dtype=F64)
NAN = C.clone()
NAN[1, 0] = torch.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: foldopt.fold(3, heron), "solve=3 is not callable"),
        (lambda: foldopt.fold(torch.sqrt, None), "update=None is not callable"),
        (lambda: ok_layer(on_failure="ignore"), "on_failure='ignore' is unknown; choose one of"),
        (lambda: ok_layer(linear_solver="lu"), "linear_solver='lu' is unknown"),
        (lambda: ok_layer(tol=-1.0), "tol=-1.0: expected a number above 0"),
        (lambda: ok_layer(dtype=torch.int64), "dtype=torch.int64 is not a floating-point type"),
        (
            lambda: foldopt.unroll(torch.sqrt, heron, iterations=0),
            "iterations=0: expected a whole number of at least 1",
        ),
        (lambda: ok_layer()(), "called without parameters"),
        (lambda: ok_layer()(3.0), "parameter 0 is a float, expected a tensor"),
        (lambda: ok_layer()(NAN), r"parameter 0 of shape \(3, 2\) holds NaN or inf, first in rows \[1\]"),
        (lambda: ok_layer()(C, C.to("meta")), "parameter 1 is on meta but parameter 0 is on cpu"),
        (lambda: foldopt.fold(lambda c: c.sum(), heron)(C), r"solve returned Tensor, expected a tensor of shape \(B"),
        (lambda: foldopt.fold(lambda c: [c], heron)(C), "solve returned list"),
        (lambda: foldopt.fold(lambda c: (c, c[:1]), heron)(C), "parts of different batch sizes"),
        (lambda: foldopt.fold(lambda c: c.to("meta"), heron)(C), "solve returned part 0 on meta"),
        (lambda: foldopt.fold(torch.sqrt, lambda x, c: x[:, :1])(C), r"update returned a state of shapes \[\(3, 1\)\]"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(errors.InputError, match=message):
        make()


def test_unrolling_holds_a_sample_whose_step_fails_at_its_last_finite_state():
    def step(x, c):
        return 0.5 * (x + c / x) + 0 * c.detach().log()  # NaN for negative c

    c = torch.tensor([[4.0], [-1.0]], dtype=F64, requires_grad=True)
    layer = foldopt.unroll(lambda c: c.abs(), step, iterations=12, on_failure="zero")
    x = layer(c)
    assert x.tolist() == [[2.0], [1.0]]
    assert layer.last.ok.tolist() == [True, False]
    x.sum().backward()
    torch.testing.assert_close(c.grad[0], torch.tensor([0.25], dtype=F64))
    with pytest.raises(errors.FixedPointError, match="worst at index 1"):
        foldopt.unroll(lambda c: c.abs(), step, iterations=12)(c)


def unfolded(iterations, **options):
    """Of x = a x + c, with a per sample; its fixed point is c / (1 - a)."""
    return foldopt.unfold(lambda c, a: c / (1 - a), lambda x, c, a: a * x + c, iterations=iterations, **options)


def test_unfolding_certifies_its_backward_pass_by_its_last_term():
    c = torch.tensor([[1.0], [1.0]], dtype=F64, requires_grad=True)
    a = torch.tensor([[0.5], [1.1]], dtype=F64)
    layer = unfolded(30)
    x = layer(c, a)
    assert layer.last.ok.all(), "rounding has not grown enough to be seen in x"
    with pytest.raises(
        errors.LinearSolveError, match=r"30 steps still adds 1.6e\+01 .* at 1 of 2 samples, worst at .* 1"
    ):
        x.sum().backward()
    with pytest.warns(RuntimeWarning, match="backward pass of unfolding diverges"):
        unfolded(30, on_failure="warn")(c, a).sum().backward()
    layer = unfolded(30, on_failure="zero")
    torch.autograd.grad(layer(c, a).sum(), c)
    assert layer.last.backward.ok.tolist() == [True, False]
    torch.testing.assert_close(layer.last.backward.residual, a[:, 0] ** 29)
    torch.autograd.grad(unfolded(1)(c, a).sum(), c)


def test_unfolding_that_leaves_the_solution_is_found_out():
    c = torch.tensor([[1.0], [1.0]], dtype=F64, requires_grad=True)
    a = torch.tensor([[0.5], [3.3]], dtype=F64)
    with pytest.raises(errors.FixedPointError, match=r"60 update steps from the solver's solution end .* index 1"):
        unfolded(60)(c, a)
    layer = unfolded(60, on_failure="zero")
    (gradient,) = torch.autograd.grad(layer(c, a).sum(), c)
    assert layer.last.ok.tolist() == [True, False]
    torch.testing.assert_close(gradient, torch.tensor([[2.0], [0.0]], dtype=F64))
