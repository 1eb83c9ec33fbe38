"""Folded FDPG and ADMM against the KKT system of the same program, on random instances."""

import pytest
import torch

import foldopt
from foldopt import prox
from foldopt.errors import FixedPointError, InputError
from foldopt.solvers.qp import solve_qp
from foldopt.updates import ADMM, DualProximalGradient

F64 = torch.float64
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


def quadratic_programs(B=200, n=8, m=10, k=2, seed=0):
    """Shared Q, G, A and b; p and h of each sample."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    root, G, A, inside = normal(n, n), normal(m, n), normal(k, n), normal(n)
    h = G @ inside + 0.2 + torch.rand(B, m, generator=g, dtype=F64)
    Q = root @ root.T / n + 0.1 * torch.eye(n, dtype=F64)
    return [t.requires_grad_() for t in (Q, normal(B, n), G, h, A, A @ inside)]


def solve_by_kkt(Q, p, G, h, A, b):
    B, n = p.shape
    parts = Q.expand(B, n, n), p, A.expand(B, *A.shape[-2:]), b.expand(B, len(b)), G.expand(B, *G.shape[-2:]), h
    found = solve_qp(*parts)
    assert found.ok.all()
    return found


@pytest.mark.parametrize("linear_solver", SOLVERS)
@pytest.mark.parametrize("rho", [0.1, 1.0, 10.0])
def test_the_qp_layer_against_the_kkt_system(linear_solver, rho):
    data = quadratic_programs()
    x = foldopt.QPLayer(rho, linear_solver=linear_solver)(*data)
    expected = solve_by_kkt(*data)
    assert (expected.active.sum(1) > 0).any()
    torch.testing.assert_close(x, expected.x, atol=1e-9, rtol=0)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    mine, exact = (list(torch.autograd.grad(y, data, g)) for y in (x, expected.x))
    for gradients in (mine, exact):
        gradients[0] = gradients[0] + gradients[0].T
    agree(mine, exact)


def test_the_closed_form_of_admms_phi_is_that_of_autograd():
    data = [t.detach() for t in quadratic_programs(B=6)]
    update = ADMM(0.7)
    gen = torch.Generator().manual_seed(2)
    state = tuple(torch.randn(6, 10, generator=gen, dtype=F64) for _ in range(2))
    jacobians = torch.autograd.functional.jacobian(lambda z, u: update((z, u), *data), state)
    expected = torch.cat([torch.cat([torch.einsum("bibj->bij", block) for block in row], 2) for row in jacobians], 1)
    torch.testing.assert_close(update.jacobian(state, *data), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("linear_solver", ["auto", "gmres", "least_squares"])
def test_redundant_constraints_change_no_gradient(linear_solver):
    """x <= 1 beside x >= 0 and sum x = 1, and a bound that is given twice: the dual is not unique, the gradient is."""
    n, gen = 5, torch.Generator().manual_seed(0)
    p = torch.randn(200, n, generator=gen, dtype=F64).requires_grad_()
    g = torch.randn(200, n, generator=gen, dtype=F64)
    eye, ones = torch.eye(n, dtype=F64), torch.ones(1, n, dtype=F64)
    least, more = (-eye, torch.zeros(n, dtype=F64)), (torch.cat([-eye, eye, -2 * eye[:1]]), torch.zeros(2 * n + 1))
    more[1][n : 2 * n] = 1
    gradients = []
    for G, h in (least, more):
        layer = foldopt.QPLayer(linear_solver=linear_solver)
        x = layer(eye, p, G, h.to(F64), ones, ones[:, 0])
        gradients.append(torch.autograd.grad(x, p, g)[0])
    assert int((x.detach() > 1e-9).sum(1).min()) == 1  # vertices, where x = 1 is active, among them
    assert layer.fold.last.backward.ok.all()
    if linear_solver != "gmres":
        assert layer.fold.last.backward.fallback.any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_the_qp_layer_against_qpth_given_expanded_arguments():
    """qpth takes the mean where the batch shares an argument, so it is given one of each per sample."""
    qpth = pytest.importorskip("qpth.qp")
    data = quadratic_programs(B=32)
    g = torch.randn(32, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = foldopt.QPLayer()(*data)
    expanded = [t if t.dim() == (2 if i in (1, 3, 5) else 3) else t.expand(32, *t.shape) for i, t in enumerate(data)]
    theirs = qpth.QPFunction(verbose=-1, eps=1e-14, maxIter=60)(*expanded)
    torch.testing.assert_close(x, theirs, atol=1e-6, rtol=0)
    mine, other = (torch.autograd.grad(y, data[1:], g) for y in (x, theirs))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_qp_layer_without_equalities_in_float32_and_per_sample():
    Q, p, G, h, _, _ = (t.detach() for t in quadratic_programs(B=5))
    low = [t.float().requires_grad_() for t in (Q, p, G, h)]
    x = foldopt.QPLayer()(*low)
    assert x.dtype == torch.float32
    gradients = torch.autograd.grad(x.square().sum(), low)
    layer = foldopt.QPLayer()
    total = torch.zeros_like(gradients[0])
    for i in range(5):
        single = low[0].detach().clone().requires_grad_()
        row = layer(single, low[1][i], low[2], low[3][i : i + 1])
        total += torch.autograd.grad(row.square().sum(), single)[0]
    torch.testing.assert_close(gradients[0], total, rtol=1e-4, atol=1e-5)


def test_an_infeasible_program_among_good_ones():
    Q, p, G, h, A, b = quadratic_programs(B=4)
    with torch.no_grad():
        G = torch.cat([G, -G[:1]])
        h = torch.cat([h, 5.0 - h[:, :1]], 1)
        h[2, -1] = -h[2, 0] - 1
    with pytest.raises(FixedPointError, match="at 1 of 4 samples, worst at index 2"):
        foldopt.QPLayer()(Q, p, G, h, A, b)
    x = foldopt.QPLayer(on_failure="zero")(Q, p, G, h, A, b)
    assert x[2].isnan().all()
    x[[0, 1, 3]].square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (Q, p, A, b)), "it does not touch what the batch shares"
    assert (p.grad[2] == 0).all()


def test_a_weakly_active_constraint_counts_as_active():
    """min 1/2 |x|^2 + p'x on the simplex at p = (-1, 0): x = (1, 0) and the bound on x_2 has multiplier 0."""
    p = torch.tensor([[-1.0, 0.0]], dtype=F64, requires_grad=True)
    eye, ones = torch.eye(2, dtype=F64), torch.ones(1, 2, dtype=F64)
    x = foldopt.QPLayer()(eye, p, -eye, torch.zeros(2, dtype=F64), ones, torch.ones(1, dtype=F64))
    assert x.tolist() == [[1.0, 0.0]]
    (gradient,) = torch.autograd.grad(x[0, 0], p)
    assert gradient.abs().max() < 1e-12


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
