"""The built-in solver of smooth programs, and the recovery of multipliers."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import foldopt
from foldopt import SmoothProgram
from foldopt.errors import InputError
from foldopt.solvers.multipliers import recover_multipliers
from foldopt.solvers.nlp import solve_nlp
from foldopt.solvers.scipy_nlp import solve_scipy
from tests.drawn import normal, not_finite, points, properties, scales, seeds
from tests.foldopt.programs import F64, PROGRAMS, made


def started(program, batch=60):
    objective, inequalities, equalities, start, params = made(program, batch)
    start = start if start.dim() == 2 else start.expand(batch, -1)
    return SmoothProgram(objective, equalities, inequalities), start, params


@pytest.mark.parametrize("make", PROGRAMS)
def test_the_kkt_conditions_hold(make):
    """Measured here by plain reverse-mode derivatives of the Lagrangian, apart from the solver's own residual."""
    program, start, params = started(make)
    found = solve_nlp(program, start, *params)
    assert found.ok.all()
    x = found.x.clone().requires_grad_()
    f, h, g = program.values(x, *params)
    lagrangian = f + (found.nu * h).sum(1) + (found.lam * g).sum(1)
    (stationarity,) = torch.autograd.grad(lagrangian.sum(), x)
    h, g = h.detach(), g.detach()
    size = 1 + float(found.lam.max() if found.lam.numel() else found.nu.abs().max())
    assert float(stationarity.abs().max()) < 1e-8 * size
    assert float(h.abs().max() if h.numel() else 0) < 1e-8
    assert float(g.max() if g.numel() else 0) < 1e-8
    assert float((found.lam * g).abs().max() if g.numel() else 0) < 1e-8 * size
    assert (found.lam >= 0).all()


@pytest.mark.parametrize("make", PROGRAMS)
def test_no_instance_fails(make):
    """Among them some whose Hessian takes a large multiple of the active constraints to become convex."""
    program, start, params = started(make, batch=1000)
    found = solve_nlp(program, start, *params)
    assert found.ok.all()
    assert int(found.iterations.max()) < 100


@pytest.mark.parametrize("make", PROGRAMS)
def test_no_feasible_neighbour_is_better(make):
    """SLSQP, started at the solutions, finds nothing better than rounding."""
    pytest.importorskip("scipy")
    program, start, params = started(make, batch=8)
    found = solve_nlp(program, start, *params)
    generator = torch.Generator().manual_seed(1)
    near = found.x + 1e-3 * torch.randn(found.x.shape, generator=generator, dtype=F64)
    other = solve_scipy(program, "slsqp", near, *params).x
    gain = program.objective(found.x, *params) - program.objective(other, *params)
    assert float(gain.max()) < 1e-6


def test_a_program_without_solution_is_not_ok_and_leaves_the_others_alone():
    program = SmoothProgram(lambda x, c: x.square().sum(1), None, lambda x, c: torch.cat([c - x, x - 1], 1))
    c = torch.tensor([[0.5], [2.0], [-1.0]], dtype=F64)
    found = solve_nlp(program, torch.zeros(3, 1, dtype=F64), c, max_iter=30)
    assert found.ok.tolist() == [True, False, True]
    torch.testing.assert_close(found.x[[0, 2]], torch.tensor([[0.5], [0.0]], dtype=F64))


def test_shapes_are_checked():
    program = SmoothProgram(lambda x, c: x.square().sum())
    with pytest.raises(InputError, match=r"objective returned shape \(\)"):
        solve_nlp(program, torch.zeros(3, 1, dtype=F64), torch.zeros(3, 1, dtype=F64))
    with pytest.raises(InputError, match=r"start has shape \(3,\)"):
        solve_nlp(program, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("make", PROGRAMS)
def test_multipliers_of_x_alone(make):
    program, start, params = started(make)
    found = solve_nlp(program, start, *params)
    data = program.sqp_data(found.x, found.nu, found.lam, *params)
    nu, lam = recover_multipliers(data.gradient, data.jacobian_h, data.g, data.jacobian_g)
    torch.testing.assert_close(nu, found.nu, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(lam, found.lam, rtol=1e-6, atol=1e-7)


def test_multipliers_of_dependent_constraints_are_stationary():
    """x >= 1 said twice: any split of the multiplier is one; the recovered one satisfies the KKT conditions."""
    gradient = torch.tensor([[2.0, 0.0]], dtype=F64)
    jacobian = torch.tensor([[[-1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]], dtype=F64)
    g = torch.tensor([[0.0, 0.0, -1.0]], dtype=F64)
    _, lam = recover_multipliers(gradient, gradient.new_zeros(1, 0, 2), g, jacobian)
    torch.testing.assert_close(gradient + torch.einsum("bmn,bm->bn", jacobian, lam), torch.zeros_like(gradient))
    assert (lam >= 0).all()
    assert lam[0, 2] == 0


@st.composite
def scaled_programs(draw):
    """An indefinite objective of scale a, two variables alike or not, on a capped simplex of scale k."""
    a, k, Q = draw(scales), draw(scales), normal(draw(seeds), 5, 5)
    if draw(st.booleans()):
        Q[1] = Q[0]
        Q[:, 1] = Q[:, 0]
    Q, q = a * (Q + Q.T), a * k * draw(points(scales=st.just(1.0)))
    program = SmoothProgram(
        lambda x, q: torch.einsum("bi,ij,bj->b", x, Q, x) / 2 + (q * x).sum(1),
        lambda x, q: x.sum(1, keepdim=True) - 2.5 * k,
        lambda x, q: torch.cat([-x, x - k], 1),
    )
    return program, Q, q, a, k


def relative_kkt(found, Q, q, a, k):
    """The largest violation of the KKT conditions in units of the program's own scales."""
    x, lower, upper = found.x, *found.lam.chunk(2, 1)
    size = 1 + torch.cat([found.nu, found.lam], 1).abs().amax(1, keepdim=True) / (a * k)
    slack = torch.cat([x, k - x], 1)
    return torch.cat(
        [
            (x @ Q + q + found.nu - lower + upper).abs() / (a * k) / size,
            (x.sum(1, keepdim=True) - 2.5 * k).abs() / k,
            (-slack).clamp(min=0) / k,
            (-found.lam).clamp(min=0) / (a * k) / size,
            (found.lam * slack).abs() / (a * k * k) / size,
        ],
        1,
    ).amax(1)


@properties
@given(scaled_programs())
def test_the_kkt_conditions_hold_at_every_scale_with_a_tolerance_of_that_scale(instance):
    program, Q, q, a, k = instance
    start = torch.full((3, 5), 0.5 * k, dtype=F64)
    found = solve_nlp(program, start, q, tol=1e-10 * min(1, k, a * k))
    assert found.ok.all()
    assert (relative_kkt(found, Q, q, a, k) <= 1e-6).all()


@properties
@given(scaled_programs(), seeds)
def test_gradients_at_every_scale_agree_with_finite_differences(instance, seed):
    """Where the solution moves little: from a saddle it would leave to either side."""
    program, _, q, a, k = instance
    tol = 1e-10 * min(1, k, a * k)

    def solve(q, start):
        found = solve_nlp(program, start, q, tol=tol, max_iter=50)
        return found.x, found.nu, found.lam

    start = solve(q, torch.full((3, 5), 0.5 * k, dtype=F64))[0]
    layer = foldopt.f_sqp(program, lambda q: solve(q, start), on_failure="zero", degenerate="zero")
    leaf, g, d = q.clone().requires_grad_(), normal(seed, 3, 5), normal(seed + 1, 3, 5)
    x = layer(leaf)[0]
    (pulled,) = torch.autograd.grad((g * x).sum(), leaf)
    h = 1e-6 * a * k
    ahead, behind = (solve(q + sign * h * d, start)[0] for sign in (1, -1))
    curved, moved = (ahead + behind - 2 * x.detach()).abs().amax(1), (ahead - behind).abs().amax(1)
    smooth = (
        layer.last.backward.ok & layer.last.derivative.ok & (curved <= 1e-3 * moved + 1e-11 * k) & (moved <= 1e-3 * k)
    )
    assume(smooth.any())
    got, expected = a * (pulled * d).sum(1), a * (g * (ahead - behind)).sum(1) / (2 * h)
    torch.testing.assert_close(got[smooth], expected[smooth], rtol=1e-3, atol=1e-3)


@properties
@given(scaled_programs(), st.integers(0, 2), not_finite, st.booleans())
def test_a_sample_that_is_not_finite_is_not_ok_and_leaves_the_others_alone(instance, row, bad, everywhere):
    """In the gradient, or in the Hessian and the constraints as well."""
    program, _, q, a, k = instance
    spoilt = SmoothProgram(
        lambda x, q, s: program.objective(s * x, q),
        lambda x, q, s: program.equalities(s * x, q),
        lambda x, q, s: program.inequalities(s * x, q),
    )
    start, s, tol = torch.full((3, 5), 0.5 * k, dtype=F64), torch.ones(3, 1, dtype=F64), 1e-10 * min(1, k, a * k)
    alone = solve_nlp(spoilt, start, q, s, tol=tol)
    s, q = s.clone(), q.clone()
    (s if everywhere else q)[row, 0] = bad
    found = solve_nlp(spoilt, start, q, s, tol=tol, max_iter=30)
    others = [i for i in range(3) if i != row]
    assert not found.ok[row]
    assert found.ok[others].all()
    assert torch.equal(found.x[others], alone.x[others])


def test_float32_is_solved_to_its_rounding():
    """The default tolerance counts as 8 rounding units, which most samples reach; 1e-4 is reached by all."""
    program, start, params = started(PROGRAMS[0])
    expected = solve_nlp(program, start, *params).x
    start, params = start.float(), [p.float() for p in params]
    rounded = solve_nlp(program, start, *params, max_iter=20)
    assert rounded.ok.double().mean() > 0.9
    assert float(rounded.residual[rounded.ok].max()) <= 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(rounded.x[rounded.ok].double(), expected[rounded.ok], rtol=1e-3, atol=1e-3)
    found = solve_nlp(program, start, *params, tol=1e-4)
    assert found.x.dtype == torch.float32
    assert found.ok.all()
    torch.testing.assert_close(found.x.double(), expected, rtol=1e-2, atol=1e-2)
