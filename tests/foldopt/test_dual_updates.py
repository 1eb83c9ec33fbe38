"""Folded FDPG and ADMM against the KKT system of the same program, on random instances."""

import pytest
import torch

import foldopt
from foldopt import prox
from foldopt.errors import FixedPointError, InputError
from foldopt.solvers.qp import solve_qp
from foldopt.updates import ADMM, DualProximalGradient
from tests.foldopt.programs import F64, quadratic_programs, solve_by_kkt

SOLVERS = ["auto", "direct", "gmres"]


def agree(mine, other):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def total_variation(v, t, D, d, weight):
    return prox.soft_threshold(v, t * weight)


def solve_dual(D, d, weight):
    """min_w 1/2 |D'w + d|^2 over |w| <= weight, differentiable through its KKT system."""
    B, m = len(d), D.shape[-2]
    D = D.expand(B, *D.shape[-2:])
    eye = torch.eye(m, dtype=d.dtype)
    found = solve_qp(
        D @ D.mT,
        torch.einsum("bmn,bn->bm", D, d),
        d.new_zeros(B, 0, m),
        d.new_zeros(B, 0),
        torch.cat([eye, -eye]).expand(B, 2 * m, m),
        weight.expand(B, 2 * m),
    )
    assert found.ok.all()
    return found.x


def signals(B=200, n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    D = torch.eye(n, dtype=F64)[:-1] - torch.eye(n, dtype=F64)[1:] + 0.1 * torch.randn(n - 1, n, generator=g, dtype=F64)
    d = torch.randn(B, n, generator=g, dtype=F64)
    return D.requires_grad_(), d.requires_grad_(), torch.tensor(0.4, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("stepsize", [None, 0.1])
def test_fdpg_with_a_learned_operator(linear_solver, stepsize):
    D, d, weight = signals()
    update = DualProximalGradient(total_variation, stepsize)
    layer = foldopt.fold(solve_dual, update, linear_solver=linear_solver)
    g = torch.randn(d.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    w = layer(D, d, weight)
    assert (w.abs() > 0.4 - 1e-9).any()
    assert (w.abs() < 0.39).any()
    folded = torch.autograd.grad((update.primal(w, D, d) * g).sum(), (D, d, weight))
    exact = torch.autograd.grad((update.primal(solve_dual(D, d, weight), D, d) * g).sum(), (D, d, weight))
    agree(folded, exact)


def test_fdpg_with_one_operator_per_sample():
    D, d, weight = signals(B=5)
    D = torch.stack([D.detach() * scale for scale in (0.5, 1.0, 1.5, 2.0, 3.0)]).requires_grad_()
    update = DualProximalGradient(total_variation)
    folded = torch.autograd.grad(foldopt.fold(solve_dual, update)(D, d, weight).square().sum(), (D, d, weight))
    agree(folded, torch.autograd.grad(solve_dual(D, d, weight).square().sum(), (D, d, weight)))


def test_the_papers_step_converges_for_the_differencing_operator():
    n = 10
    D = torch.eye(n, dtype=F64)[:-1] - torch.eye(n, dtype=F64)[1:]
    d, weight = signals(B=6, n=n)[1].detach(), torch.tensor(0.4, dtype=F64)
    update = DualProximalGradient(total_variation, 0.25)
    w = torch.zeros(6, n - 1, dtype=F64)
    for _ in range(3000):
        w = update(w, D, d, weight)
    torch.testing.assert_close(w, solve_dual(D, d, weight), atol=1e-8, rtol=0)


def test_the_closed_form_of_admms_phi_is_that_of_autograd():
    data = [t.detach() for t in quadratic_programs(B=6)]
    update = ADMM(0.7)
    gen = torch.Generator().manual_seed(2)
    state = tuple(torch.randn(6, 10, generator=gen, dtype=F64) for _ in range(2))
    jacobians = torch.autograd.functional.jacobian(lambda z, u: update((z, u), *data), state)
    expected = torch.cat([torch.cat([torch.einsum("bibj->bij", block) for block in row], 2) for row in jacobians], 1)
    torch.testing.assert_close(update.jacobian(state, *data), expected, rtol=1e-12, atol=1e-12)


def test_admm_itself_converges_to_the_state_of_the_solution():
    data = [t.detach() for t in quadratic_programs(B=10)]
    update, found = ADMM(), solve_by_kkt(*data)
    state = torch.zeros(10, 10, dtype=F64), torch.zeros(10, 10, dtype=F64)
    for _ in range(5000):
        state = update(state, *data)
    for part, expected in zip(state, update.state(found.x, found.lam, data[2]), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(update.primal(state, *data), found.x, atol=1e-8, rtol=0)


def test_admm_without_its_dual_is_caught():
    data = quadratic_programs(B=10)
    solve = solve_by_kkt
    layer = foldopt.fold(lambda *d: (solve(*d).x @ d[2].mT, torch.zeros(10, 10, dtype=F64)), ADMM())
    with pytest.raises(FixedPointError, match="the update step does not fix the solver's solution"):
        layer(*data)


def test_misuse_is_refused():
    Q, p, *rest = quadratic_programs(B=2)
    with pytest.raises(InputError, match="rho=-1: expected a number above 0"):
        ADMM(-1)
    with pytest.raises(InputError, match=r"Q has shape \(8, 7\)"):
        foldopt.QPLayer()(Q[:, :7], p, *rest)
    with pytest.raises(InputError, match="prox=3 is not callable"):
        DualProximalGradient(3)
    with pytest.raises(InputError, match="stepsize=0: expected a number above 0"):
        DualProximalGradient(total_variation, 0)
