"""The built-in solver of smooth programs, and the recovery of multipliers."""

import pytest
import torch

from foldopt import SmoothProgram
from foldopt.errors import InputError
from foldopt.solvers.multipliers import recover_multipliers
from foldopt.solvers.nlp import solve_nlp
from foldopt.solvers.scipy_nlp import solve_scipy
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
    other = solve_scipy(program, "slsqp", near, *params)
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
