import math

import pytest
import torch

from foldopt.errors import InputError
from foldopt.solvers.interior_point import solve_qcqp

F64 = torch.float64


def random_qcqp(B=16, n=12, m=8, p=2, k=2, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    root, roots = normal(B, n, n), normal(B, k, n, n)
    point = normal(B, n)
    H, q = scale * root @ root.mT, scale * normal(B, n)
    A, G = normal(B, p, n), normal(B, m, n)
    b = (A @ point[:, :, None])[:, :, 0]
    h = (G @ point[:, :, None])[:, :, 0] + torch.rand(B, m, generator=g, dtype=F64)
    Q, r = roots @ roots.mT / n, normal(B, k, n)
    s = 0.5 * torch.einsum("bi,bkij,bj->bk", point, Q, point) + torch.einsum("bki,bi->bk", r, point)
    return H, q, A, b, G, h, (Q, r, s + 0.1 + torch.rand(B, k, generator=g, dtype=F64))


def kkt_residuals(solution, H, q, A, b, G, h, quadratic):
    Q, r, s = quadratic
    x, nu, lam = solution.x, solution.equality_dual, solution.inequality_dual
    Qx = torch.einsum("bkij,bj->bki", Q, x)
    J = torch.cat([Qx + r, G], 1)
    stationarity = torch.einsum("bij,bj->bi", H, x) + q + torch.einsum("bpi,bp->bi", A, nu)
    stationarity += torch.einsum("bmi,bm->bi", J, lam)
    value = torch.cat([torch.einsum("bki,bi->bk", 0.5 * Qx + r, x) - s, torch.einsum("bmi,bi->bm", G, x) - h], 1)
    equality = torch.einsum("bpi,bi->bp", A, x) - b
    return stationarity.abs(), value.clamp(min=0), equality.abs(), (lam * value).abs(), (-lam).clamp(min=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_random_programs_satisfy_the_kkt_conditions(seed, scale):
    data = random_qcqp(seed=seed, scale=scale)
    solution = solve_qcqp(*data)
    assert solution.ok.all()
    assert solution.iterations.max() < 30
    for residual in kkt_residuals(solution, *data):
        assert residual.max() < 1e-7 * max(scale, 1)


def test_a_program_solved_by_hand():
    """min x + y on the unit disc with x >= -0.5: the bound is active, y = -sqrt(3)/2, multipliers from KKT."""
    q = torch.ones(1, 2, dtype=F64)
    disc = 2 * torch.eye(2, dtype=F64)[None], torch.zeros(1, 2, dtype=F64), torch.ones(1, dtype=F64)
    G, h = torch.tensor([[-1.0, 0.0]], dtype=F64), torch.tensor([0.5], dtype=F64)
    solution = solve_qcqp(torch.zeros(2, 2), q, G=G, h=h, quadratic=disc)
    y = -math.sqrt(3) / 2
    assert solution.x[0].tolist() == pytest.approx([-0.5, y], abs=1e-8)
    multiplier = 1 / (-2 * y)
    assert solution.inequality_dual[0].tolist() == pytest.approx([multiplier, 1 - multiplier], abs=1e-7)


def test_infeasible_and_unbounded_samples_leave_the_others_alone():
    q = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64)
    G = torch.tensor([[1.0], [-1.0]], dtype=F64)
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=F64)  # the second wants x <= -1 and x >= 0
    solution = solve_qcqp(torch.zeros(1, 1), q, G=G, h=h)
    assert solution.ok.tolist() == [True, False, True]
    assert float(solution.x[0, 0]) == pytest.approx(0, abs=1e-8)
    assert not solve_qcqp(torch.zeros(1, 1), q[:1], G=G[:1], h=h[:1, :1]).ok.any(), "unbounded below"


def test_badly_centred_iterates_do_not_cycle():
    """A tiny Hessian and bounds met with equality at the start: Mehrotra's full corrector cycles here."""
    n = 20
    g = torch.Generator().manual_seed(0)
    c = 0.1 + 0.003 * torch.randn(200, n, generator=g, dtype=F64)
    V = 1e-3 * (torch.eye(n, dtype=F64) + 0.02 * torch.rand(n, n, generator=g, dtype=F64).round())
    x = torch.zeros(200, n, dtype=F64)
    x[:, 3], x[:, 7] = 0.26, 0.74
    ones = torch.ones(1, n, dtype=F64)
    risk = 2 * (x @ V)[:, None, :] / (x @ V * x).sum(1)[:, None, None]
    G = torch.cat([risk, -torch.eye(n, dtype=F64).expand(200, n, n)], 1)
    h = torch.cat([torch.zeros(200, 1, dtype=F64), x], 1)
    solution = solve_qcqp(V + V.mT, -c, ones, torch.zeros(1, dtype=F64), G, h)
    assert solution.ok.all()


def test_without_constraints_it_is_one_newton_step():
    H = torch.diag(torch.tensor([1.0, 2.0], dtype=F64))
    solution = solve_qcqp(H, torch.tensor([[1.0, 2.0]]))
    assert solution.x.tolist() == [[-1.0, -1.0]]
    assert int(solution.iterations) == 1


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"q has shape \(3,\)"):
        solve_qcqp(torch.eye(3), torch.ones(3))
    with pytest.raises(InputError, match=r"H has shape \(2, 2\), expected \(3, 3\)"):
        solve_qcqp(torch.eye(2), torch.ones(1, 3))
    with pytest.raises(InputError, match="pass A together with b"):
        solve_qcqp(torch.eye(3), torch.ones(1, 3), A=torch.ones(1, 3))
