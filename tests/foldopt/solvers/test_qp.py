import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from foldopt.errors import InputError
from foldopt.projections import simplex
from foldopt.solvers.qp import solve_qp

F64 = torch.float64


def random_qp(B=8, n=6, p=1, m=9, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    root = normal(B, n, rank or n)
    point = normal(B, n)
    A, G = normal(B, p, n), normal(B, m, n)
    b = (A @ point[:, :, None])[:, :, 0]
    h = (G @ point[:, :, None])[:, :, 0] + torch.rand(B, m, generator=g, dtype=F64)
    return root @ root.mT, 3 * normal(B, n), A, b, G, h


@pytest.mark.parametrize("seed", range(5))
def test_solutions_satisfy_the_kkt_conditions_to_machine_precision(seed):
    H, q, A, b, G, h = random_qp(seed=seed)
    s = solve_qp(H, q, A, b, G, h)
    assert s.ok.all()
    assert not s.singular.any()
    assert s.active.any()
    stationarity = (H @ s.x[:, :, None] + A.mT @ s.nu[:, :, None] + G.mT @ s.lam[:, :, None])[:, :, 0] + q
    slack = h - (G @ s.x[:, :, None])[:, :, 0]
    assert stationarity.abs().max() < 1e-9
    assert slack.min() > -1e-9
    assert s.lam.min() >= 0
    assert (s.lam * slack).abs().max() < 1e-9


def test_a_right_guess_and_no_guess_give_the_same_solution():
    data = random_qp(seed=3)
    cold = solve_qp(*data)
    warm = solve_qp(*data, active=cold.active)
    torch.testing.assert_close(warm.x, cold.x)
    torch.testing.assert_close(warm.lam, cold.lam)
    wrong = solve_qp(*data, active=~cold.active)
    torch.testing.assert_close(wrong.x, cold.x)


def test_derivatives_with_respect_to_everything_of_first_and_second_order():
    data = [t.requires_grad_() for t in random_qp(B=2, n=4, m=5, seed=1)]

    def solve(H, *rest):
        s = solve_qp((H + H.mT) / 2, *rest)
        return s.x, s.nu, s.lam

    assert (solve_qp(*data).active.sum(1) > 0).all()
    assert gradcheck(solve, data, atol=1e-6)
    assert gradgradcheck(solve, data, atol=1e-4)


def test_only_equalities_only_inequalities_and_nothing():
    H, q, A, b, G, h = random_qp(seed=2)
    none = q.new_zeros(len(q), 0, q.shape[1]), q.new_zeros(len(q), 0)
    free = solve_qp(H, q, *none, *none)
    torch.testing.assert_close(free.x, -torch.linalg.solve(H, q))
    assert solve_qp(H, q, A, b, *none).ok.all()
    assert solve_qp(H, q, *none, G, h).ok.all()


def test_a_failed_sample_is_nan_and_does_not_touch_the_others():
    H, q, A, b, G, h = random_qp(seed=4)
    G, h = G.clone(), h.clone()
    G[2, 1], h[2, 1] = -G[2, 0], -h[2, 0] - 1  # g'x <= h and g'x >= h + 1
    q = q.requires_grad_()
    s = solve_qp(H, q, A, b, G, h)
    assert s.ok.tolist() == [i != 2 for i in range(8)]
    assert s.x[2].isnan().all()
    s.x[s.ok].square().sum().backward()
    assert q.grad.isfinite().all()
    assert (q.grad[2] == 0).all()


def test_dependent_active_constraints_are_marked_singular_and_have_a_least_norm_derivative():
    H, q, A, b, G, h = random_qp(B=1, seed=0)
    active = solve_qp(H, q, A, b, G, h).active[0]
    row = int(active.nonzero()[0])
    twice = torch.cat([G, G[:, row : row + 1]], 1), torch.cat([h, h[:, row : row + 1]], 1)
    q = q.requires_grad_()
    single, double = solve_qp(H, q, A, b, G, h), solve_qp(H, q, A, b, *twice)
    assert double.singular.all()
    torch.testing.assert_close(double.x, single.x, atol=1e-8, rtol=1e-8)
    gradients = [torch.autograd.grad(s.x.square().sum(), q)[0] for s in (single, double)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-6)


def test_shapes_that_do_not_fit_are_named():
    H, q, A, b, G, h = random_qp()
    with pytest.raises(InputError, match=r"A has shape \(8, 6\), expected \(8, 1, 6\)"):
        solve_qp(H, q, A[:, 0], b, G, h)


def test_nearly_degenerate_constraints_are_decided():
    """Entries of 1e-7 beside multipliers of 1e-5: an interior point leaves errors of 1e-5 there."""
    gen = torch.Generator().manual_seed(0)
    x = 10.0 ** torch.empty(200, 30, dtype=F64).uniform_(-8, 0, generator=gen)
    z = torch.where(torch.rand(200, 30, generator=gen) < 0.2, -1e-4 * x, x)
    eye = torch.eye(30, dtype=F64)
    A, b = torch.ones(1, 30, dtype=F64), z.clamp(min=0).sum(1, keepdim=True) + 1e-9
    found = solve_qp(
        eye.expand(200, 30, 30), -z, A.expand(200, 1, 30), b, -eye.expand(200, 30, 30), torch.zeros_like(z)
    )
    assert found.ok.all()
    torch.testing.assert_close(found.x, simplex(z, b[:, 0]), rtol=0, atol=5e-9)
