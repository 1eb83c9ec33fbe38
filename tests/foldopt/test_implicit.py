"""The pure derivatives of a fixed point, and how few functions a call of a layer passes through."""

import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import foldopt
from foldopt import _implicit
from foldopt.linear_solve import GMRES, Direct
from foldopt.step import record
from tests.foldopt.steps import F64, heron, problem, tanh_step

CORE = str(Path(foldopt.__file__).parent)


def solved(c, W):
    x = torch.zeros_like(c)
    for _ in range(300):
        x = tanh_step(x, c, W)
    return x


def jacobians(x, c, W):
    """dx*/dc and dx*/dW, one dense system per sample: x* = tanh(x* W + c)."""
    slope = 1 - x.square()
    inverse = torch.linalg.inv(torch.eye(x.shape[1], dtype=F64) - slope[:, :, None] * W.T)
    return inverse * slope[:, None, :], x


@pytest.mark.parametrize("solver", [Direct(), GMRES()])
def test_the_pure_vjp_and_jvp_are_those_of_the_implicit_function(solver):
    c, W = problem()
    with torch.no_grad():
        x = solved(c, W)
        exact, _ = jacobians(x, c, W)
    gen = torch.Generator().manual_seed(1)
    g, dc = (torch.randn(c.shape, generator=gen, dtype=F64) for _ in range(2))
    recorded = record(lambda state, params: (tanh_step(*state, *params),), (x,), (c, W))
    (of_c, of_W), info = foldopt.fixed_point_vjp(recorded, (g,), solver)
    assert info.ok.all()
    torch.testing.assert_close(of_c, torch.einsum("bi,bij->bj", g, exact))
    torch.testing.assert_close(of_W, torch.einsum("bi,bj->ij", x, of_c))
    (only,), _ = foldopt.fixed_point_vjp(recorded, (g,), solver, wanted=[recorded.params[0]])
    assert torch.equal(only, of_c)
    (t,), info = foldopt.fixed_point_jvp(recorded, (dc, None), solver)
    assert info.ok.all()
    torch.testing.assert_close(t, torch.einsum("bij,bj->bi", exact, dc))


def entered(function):
    """Call `function`; also return the distinct functions of foldopt that it entered, comprehensions apart."""
    found = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(CORE) and not code.co_name.startswith("<"):
            found.add(f"{Path(code.co_filename).name}:{code.co_qualname}")

    sys.setprofile(note)
    try:
        return function(), found
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(("linear_solver", "most"), [("lfpi", 18), ("auto", 21)])
def test_a_trivial_call_passes_through_few_functions(linear_solver, most):
    """Before the core was made anew these were 28 forward, and 36 (lfpi) and 42 (auto) backward."""
    layer = foldopt.fold(torch.sqrt, heron, linear_solver=linear_solver)
    c = torch.tensor([[4.0, 9.0]], dtype=F64, requires_grad=True)
    x, forward = entered(lambda: layer(c))
    loss = x.sum()
    _, backward = entered(loss.backward)
    torch.testing.assert_close(c.grad, 0.5 / c.detach().sqrt())
    assert 5 < len(forward) <= 14, sorted(forward)
    assert 5 < len(backward) <= most, sorted(backward)


@pytest.mark.parametrize("function", [foldopt.fixed_point_vjp, foldopt.fixed_point_jvp, _implicit.FixedPoint.vjp])
def test_the_core_stays_short(function):
    code = function.__code__
    lines = {line for _, _, line in code.co_lines() if line is not None}
    assert max(lines) - code.co_firstlineno < 40


def test_a_forward_derivative_that_nothing_differentiates_again_is_one_pass():
    """First order needs no fixed point of its own: the step is recorded once, whatever the parameter that moves."""
    calls = []

    def step(x, c):
        calls.append(1)
        return heron(x, c)

    c = torch.tensor([[4.0, 9.0]], dtype=F64)
    with forward_ad.dual_level():
        dual = foldopt.fold(torch.sqrt, step)(forward_ad.make_dual(c, torch.ones_like(c)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, 0.5 / c.sqrt())
    assert len(calls) == 2  # to certify the solution, and to record
