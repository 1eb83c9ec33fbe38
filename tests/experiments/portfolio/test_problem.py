"""The portfolio problem: agreement of its solvers, and of f-SQP with two independent derivations."""

import pickle

import numpy as np
import pytest
import torch

import foldopt
from experiments.portfolio.exact import FEW, smallest_variance
from experiments.portfolio.problem import PortfolioProblem
from foldopt.errors import InfeasibleError, InputError, KinkError, NotUniqueError
from tests.experiments.portfolio.portfolios import N, instances, layer, nondegenerate, problem


def kkt_vjp(p, x, lam, g):
    """g'J by a null-space method on the active set: J = Z (Z'HZ)^-1 Z' for a basis Z of the tangent space."""
    V, out = p.V.numpy(), np.zeros((len(x), p.n))
    for i, (xi, li, gi) in enumerate(zip(x.numpy(), lam.numpy(), g.numpy(), strict=True)):
        on = xi > 0
        normals = np.stack([np.ones(on.sum()), V[np.ix_(on, on)] @ xi[on] / p.gamma], 1)
        Z = np.linalg.qr(normals, mode="complete")[0][:, 2:]
        H = 2 * li[0] / p.gamma * V[np.ix_(on, on)]
        out[i, on] = Z @ np.linalg.solve(Z.T @ H @ Z, Z.T @ gi[on])
    return torch.from_numpy(out)


def directional_derivative(p, c, d, h):
    """Central differences of fourth order of the exact solution."""

    def at(step):
        return p.exact(c + step * d).x

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


@pytest.mark.parametrize("kind", ["targets", "predictions"])
@pytest.mark.parametrize(("degree", "tau", "n"), [(1, 0.1, 20), (2, 0.1, 20), (3, 0.1, 20), (3, 1.0, 20), (2, 0.1, 50)])
def test_vjp_agrees_with_finite_differences_and_with_the_kkt_derivation(kind, degree, tau, n):
    checked = 0
    for seed in (0, 1):
        p, c = instances(kind, seed, degree, tau, n)
        c = c[nondegenerate(p, c)]
        checked += len(c)
        generator = torch.Generator().manual_seed(seed)
        g, d = (torch.randn(c.shape, generator=generator, dtype=c.dtype) for _ in range(2))
        leaf = c.clone().requires_grad_()
        x, _, lam = layer(p)(*p.params(leaf))
        (vjp,) = torch.autograd.grad(x, leaf, g)
        independent = kkt_vjp(p, x.detach(), lam.detach(), g)
        assert ((vjp - independent).norm(dim=1) / independent.norm(dim=1)).max() < 1e-6
        d = d / d.abs().amax(1, keepdim=True)
        products = g * directional_derivative(p, c, d, 1e-3 * distance_to_kink(p, c))
        assert (((vjp * d).sum(1) - products.sum(1)).abs() / products.norm(dim=1)).max() < 1e-6
    assert checked >= 60, "together more than 200 instances of either kind"


def distance_to_kink(p, c):
    """The distance of each sample from a change of the active set, in units of c."""
    s, spread = p.exact(c), c.std(1, keepdim=True)
    return torch.where(s.x > 0, s.x * spread, s.lam[:, 1:]).amin(1, keepdim=True).minimum(spread)


@pytest.mark.parametrize("name", ["V", "gamma"])
def test_derivatives_with_respect_to_the_risk_model(name):
    p, c = instances("targets", 2)
    c = c[nondegenerate(p, c, 1e-2)][:8]
    c, V, gamma = p.params(c)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(c.shape, generator=generator, dtype=c.dtype)
    leaf = (V if name == "V" else gamma).clone().requires_grad_()
    params = (c, leaf, gamma) if name == "V" else (c, V, leaf)
    (vjp,) = torch.autograd.grad(layer(p)(*params)[0], leaf, g)
    d = torch.randn(leaf.shape, generator=generator, dtype=c.dtype) * leaf.detach().abs().mean()
    d = (d + d.mT) / 2 if name == "V" else d

    def objective(h):
        moved = leaf.detach() + h * d
        return float((g * p.exact(c, *((moved, gamma) if name == "V" else (V, moved))).x).sum())

    h = 1e-5
    differences = (8 * (objective(h) - objective(-h)) - objective(2 * h) + objective(-2 * h)) / (12 * h)
    assert float((vjp * d).sum()) == pytest.approx(differences, rel=1e-6)


def test_every_linear_solver_gives_the_same_gradient():
    p, c = instances("predictions", 0)
    g = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=c.dtype)
    gradients = []
    for name in ("auto", "direct", "gmres", "bicgstab", "lfpi"):
        leaf = c.clone().requires_grad_()
        gradients.append(torch.autograd.grad(layer(p, linear_solver=name)(*p.params(leaf))[0], leaf, g)[0])
    for other in gradients[1:]:
        assert ((other - gradients[0]).norm(dim=1) <= 1e-8 * gradients[0].norm(dim=1) + 1e-10).all()


def test_closed_form_model_is_that_of_the_functions():
    p, c = instances("targets", 0)
    s = p.exact(c)
    functions = foldopt.SmoothProgram(
        lambda x, c, V, gamma: -(c * x).sum(1),
        lambda x, c, V, gamma: x.sum(1, keepdim=True) - 1,
        lambda x, c, V, gamma: torch.cat([torch.einsum("bi,ij,bj->b", x, V / gamma, x)[:, None] - 1, -x], 1),
    )
    for mine, general in zip(
        p.sqp_data(*s.state, *p.params(c)), functions.sqp_data(*s.state, *p.params(c)), strict=True
    ):
        assert torch.allclose(mine.expand_as(general), general, rtol=1e-12, atol=1e-14)
    g = torch.randn_like(c)
    gradients = []
    for program in (p, functions):
        leaf = c.clone().requires_grad_()
        gradients.append(torch.autograd.grad(layer_of(program, p)(*p.params(leaf))[0], leaf, g)[0])
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-9 * gradients[0].abs().max())


def layer_of(program, p):
    return foldopt.f_sqp(program, lambda *params: p.exact(*params).state)


def test_gradcheck_of_first_and_second_order():
    _, drawn = problem(n=6)
    p = PortfolioProblem(drawn.V, 0.35 * float(drawn.V.diagonal().mean()))
    c = torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    c = c[nondegenerate(p, c, 0.05)][:3].requires_grad_()
    assert len(c) == 3
    _, V, gamma = p.params(c)

    def primal(c):
        return layer(p)(c, V, gamma)[0]

    assert torch.autograd.gradcheck(primal, (c,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(primal, (c,), eps=1e-6, atol=1e-5)


def test_float32_in_float32_out_at_float64_accuracy():
    p, c = instances("targets", 0)
    leaf = c.float().requires_grad_()
    x = layer(p)(*p.params(leaf))[0]
    assert x.dtype == torch.float32
    assert (x.double() - p.exact(leaf.detach()).x).abs().max() < 1e-7
    (gradient,) = torch.autograd.grad(x.square().sum(), leaf)
    assert gradient.dtype == torch.float32
    leaf64 = leaf.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(layer(p)(*p.params(leaf64))[0].square().sum(), leaf64)
    # With two assets held, the budget and the risk limit fix x, and the vjp is zero up to rounding.
    two_held = expected.norm(dim=1) < 1e-10
    assert 0 < two_held.sum() < 0.3 * len(c)
    assert ((gradient - expected).norm(dim=1) <= 1e-3 * expected.norm(dim=1))[~two_held].all()
    assert gradient[two_held].abs().max() < 1e-10


def test_batched_risk_models_equal_the_shared_one():
    p, c = instances("targets", 0)
    c, V, gamma = p.params(c[:4])
    V = V.expand(4, N, N) * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=c.dtype)[:, None, None]
    gamma = gamma * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=c.dtype)
    assert torch.allclose(p.exact(c, V, gamma).x, p.exact(c).x, atol=1e-12)
    leaf = c.clone().requires_grad_()
    (batched,) = torch.autograd.grad(layer(p)(leaf, V, gamma)[0].square().sum(), leaf)
    (shared,) = torch.autograd.grad(layer(p)(*p.params(leaf))[0].square().sum(), leaf)
    assert torch.allclose(batched, shared, rtol=1e-8)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("kind", ["targets", "predictions"])
def test_exact_solutions_satisfy_the_kkt_conditions(kind, tau):
    p, c = instances(kind, 3, tau=tau)
    s = p.exact(c)
    assert s.ok.all()
    assert s.residual.max() < 1e-11
    assert max(float(v.max()) for v in p.violation(s.x).values()) < 1e-11
    assert (p.regret(s.x, c).abs() < 1e-14).all()


def test_a_warm_start_saves_pivots():
    p, c = instances("targets", 0)
    cold = p.exact(c)
    warm = p.exact(c + 1e-6, warm=cold.x)
    assert torch.allclose(warm.x, cold.x, atol=1e-8)
    assert warm.iterations.double().mean() < 1.1 < 1.3 < cold.iterations.double().mean()


def test_the_samples_of_a_large_batch_are_solved_as_alone():
    p, c = instances("targets", 0)
    c = torch.cat([c + 0.01 * k * c.flip(0) for k in range(4)])
    assert len(c) > 2 * FEW
    whole, alone = p.exact(c), [p.exact(part) for part in c.split(40)]
    for name in ("x", "nu", "lam"):
        parts = torch.cat([getattr(part, name) for part in alone])
        assert (getattr(whole, name) - parts).abs().max() <= 1e-12 * parts.abs().max()
    assert torch.equal(whole.iterations, torch.cat([part.iterations for part in alone]))
    assert whole.iterations.max() > 2, "some were singled out"


def test_a_vertex_has_zero_gradient():
    p, _ = problem()
    loose = PortfolioProblem(p.V, 10 * float(p.V.diagonal().max()))
    c = torch.randn(16, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    x, nu, lam = layer(loose)(*loose.params(c))
    assert torch.equal(x.detach(), torch.nn.functional.one_hot(c.argmax(1), N).double())
    assert (lam[:, 0] == 0).all(), "the risk limit is inactive"
    assert torch.allclose(nu[:, 0], c.amax(1))
    (gradient,) = torch.autograd.grad(x.square().sum() + (x * torch.arange(N)).sum(), c)
    assert (gradient == 0).all()


def test_where_every_feasible_portfolio_is_optimal_there_is_no_derivative_and_the_layer_says_so():
    p, c = instances("targets", 0)
    c = c[:3].clone()
    c[1] = 0.05
    s = p.exact(c)
    assert s.ok.all()
    assert float(p.value(s.x, c)[1]) == pytest.approx(0.05, abs=1e-9)
    leaf = c.requires_grad_()
    with pytest.raises(NotUniqueError, match=r"at 1 of 3 samples, first \[1\]"):
        layer(p)(*p.params(leaf))[0].square().sum().backward()
    masked = layer(p, degenerate="zero")
    masked(*p.params(leaf))[0].square().sum().backward()
    assert (leaf.grad[1] == 0).all()
    assert (leaf.grad[[0, 2]] != 0).any(1).all()
    assert masked.last.verdict == ("differentiable", "not unique", "differentiable")


def test_two_tied_assets_share_what_symmetry_says():
    V = torch.eye(3, dtype=torch.float64)
    p = PortfolioProblem(V, 0.6)
    x = p.exact(torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)).x
    assert float(x[0] @ torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)) == pytest.approx(1.0, abs=1e-9)
    assert p.violation(x)["risk"].max() < 1e-9


def test_gradient_at_a_kink_is_a_one_sided_derivative():
    """An asset is exactly at its bound with zero multiplier; the active set is kept, so that J is one-sided."""
    p, c = instances("targets", 0)
    c = c[nondegenerate(p, c)][:1]
    s = p.exact(c)
    off = int(torch.where(s.x[0] > 0, torch.inf, s.lam[0, 1:]).argmin())
    kink = c.clone()
    kink[0, off] += s.lam[0, 1 + off]
    g = torch.randn(1, N, generator=torch.Generator().manual_seed(1), dtype=c.dtype)
    leaf = kink.clone().requires_grad_()
    with pytest.raises(KinkError, match=rf"inequalities\[{1 + off}\]"):
        torch.autograd.grad(layer(p)(*p.params(leaf))[0], leaf, g)
    (vjp,) = torch.autograd.grad(layer(p, degenerate="one_sided")(*p.params(leaf))[0], leaf, g)
    d = torch.zeros_like(c)
    d[0, off] = 1e-7
    sides = [float((g * (p.exact(kink + sign * d).x - p.exact(kink).x)).sum() / (sign * 1e-7)) for sign in (1, -1)]
    assert min(abs(float(vjp[0, off]) - side) for side in sides) < 1e-4 * max(1.0, *map(abs, sides))


def test_gurobi_agrees_with_the_exact_solver_and_its_multipliers_too():
    p, c = instances("targets", 0)
    exact, gurobi = p.exact(c[:20]), p.gurobi(c[:20])
    assert (gurobi.x - exact.x).abs().max() < 1e-3
    assert ((p.value(exact.x, c[:20]) - p.value(gurobi.x, c[:20])).abs() / p.value(exact.x, c[:20])).max() < 1e-5
    assert (gurobi.lam - exact.lam).abs().max() < 1e-4
    assert (gurobi.nu - exact.nu).abs().max() < 1e-4
    model = p._gurobi._model
    again = p.gurobi(c[:20])
    assert p._gurobi._model is model, "the model is built once"
    assert torch.equal(again.x, gurobi.x)


def test_folding_gurobi_gives_the_gradient_of_the_exact_solution():
    p, c = instances("targets", 0)
    c = c[nondegenerate(p, c, 1e-2)][:16]
    gradients = []
    for solve in (p.exact, p.gurobi):
        leaf = c.clone().requires_grad_()
        x = layer(p, lambda c, *_, solve=solve: solve(c).state, tol=1e-3)(*p.params(leaf))[0]
        gradients.append(torch.autograd.grad(x.square().sum(), leaf)[0])
    errors = (gradients[1] - gradients[0]).norm(dim=1) / gradients[0].norm(dim=1)
    assert errors.median() < 1e-3
    assert errors.max() < 0.1, "Gurobi is right to 1e-6 to 1e-4; curvature there amplifies it"


def test_problems_can_be_pickled_with_their_gurobi_model():
    p, c = instances("targets", 0)
    before = p.gurobi(c[:2]).x
    assert torch.allclose(pickle.loads(pickle.dumps(p)).gurobi(c[:2]).x, before)


def test_solutions_do_not_depend_on_units():
    """The solution does not change when c is scaled and shifted, or V and gamma are scaled."""
    p, c = instances("targets", 1)
    x = p.exact(c).x
    assert torch.allclose(p.exact(1e4 * c + 7).x, x, atol=1e-7)
    assert torch.allclose(PortfolioProblem(1e6 * p.V, 1e6 * p.gamma).exact(c).x, x, atol=1e-11)


def test_one_asset_and_negative_returns():
    assert PortfolioProblem(torch.ones(1, 1), 2.0).exact(torch.tensor([[-3.0]])).x.tolist() == [[1.0]]
    p, c = instances("targets", 0)
    assert p.exact(-c - 1).ok.all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_singular_covariance_is_solved_by_the_interior_point(rank):
    g = torch.Generator().manual_seed(rank)
    root = torch.randn(8, rank, generator=g, dtype=torch.float64)
    V = root @ root.T
    p = PortfolioProblem(V, max(0.5 * float(V.diagonal().mean()), 1.0))
    c = torch.randn(32, 8, generator=g, dtype=torch.float64)
    s = p.exact(c)
    assert s.ok.all()
    assert s.residual.max() < 1e-7
    assert torch.allclose(p.value(s.x, c), p.value(p.gurobi(c).x, c), atol=1e-6)


def test_smallest_variance_of_a_diagonal_covariance():
    variances = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert float(smallest_variance(torch.diag(variances)[None])[0]) == pytest.approx(float(1 / (1 / variances).sum()))


@pytest.mark.parametrize(
    ("V", "gamma", "error", "message"),
    [
        (torch.ones(2, 3), 1.0, InputError, r"V has shape \(2, 3\)"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 1.0, InputError, "V is not symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), 1.0, InputError, "V is not positive semidefinite, its smallest eigen"),
        (torch.full((2, 2), torch.nan), 1.0, InputError, "V of shape .* holds NaN"),
        (torch.eye(2), 0.0, InputError, "gamma=0"),
        (torch.eye(2), -1.0, InputError, "gamma=-1"),
        (torch.eye(2), float("nan"), InputError, "gamma=nan"),
        (
            torch.eye(2),
            0.4,
            InfeasibleError,
            "gamma=0.4: no portfolio has a variance this small, the smallest is 0.5",
        ),
    ],
)
def test_bad_risk_models_are_refused(V, gamma, error, message):
    with pytest.raises(error, match=message):
        PortfolioProblem(V, gamma)


def test_bad_parameters_are_refused():
    p, c = instances("targets", 0)
    broken = c.clone()
    broken[3, 0] = torch.nan
    with pytest.raises(InputError, match=r"c holds NaN or inf in 1 of 80 samples, first \[3\]"):
        p.exact(broken)
    with pytest.raises(InputError, match=r"c has shape \(80, 19\), expected \(B, 20\)"):
        p.gurobi(c[:, :19])
    with pytest.raises(InputError, match=r"warm has shape \(1, 20\)"):
        p.exact(c, warm=c[:1])
    with pytest.raises(InputError, match=r"V has shape \(20, 2\)"):
        p.exact(c, p.V[:, :2])
    with pytest.raises(InputError, match="scaling='huge' is unknown"):
        p.cvxpy("huge")
    gamma = torch.full((80,), p.gamma, dtype=c.dtype)
    gamma[5] = 1e-9
    with pytest.raises(InfeasibleError, match=r"1 samples, first \[5\]") as caught:
        p.exact(c, p.V, gamma)
    assert caught.value.indices == (5,)
