"""Smooth top-k: closed form against high precision, derivative against differences, steps against the closed form."""

import mpmath
import pytest
import torch

import foldopt
from experiments.multilabel.problem import TopKProblem, TopKSQP, TopKStep, loss, multipliers, solve_topk
from foldopt.diagnostics import spectral_radius
from foldopt.errors import InputError, LinearSolveError
from foldopt.solvers.qp import solve_qp
from foldopt.step import record

F64 = torch.float64


def gaussian(batch, n=100, scale=1.0, seed=0):
    return scale * torch.randn(batch, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def unit(batch, temperature, n=100, seed=0):
    return torch.nn.functional.normalize(gaussian(batch, n, seed=seed), dim=1) / temperature


def log_x_of_many_digits(row, k):
    """The solution by bisection on the threshold, which is independent of the closed form.

    With as many digits as it takes to see exp(-1400) beside 1 where the entries are that far apart.
    """
    with mpmath.workdps(40 + int(row.max() - row.min()) // 2):
        c = [mpmath.mpf(float(v)) for v in row]
        low, high = min(c) - mpmath.log(k) - 1, max(c) + mpmath.log(len(c)) + 1
        for _ in range(120):
            middle = (low + high) / 2
            if sum(mpmath.exp(min(0, v - middle)) for v in c) > k:
                low = middle
            else:
                high = middle
        return torch.tensor([float(min(0, v - high)) for v in c], dtype=F64)


CASES = {
    "gaussian": gaussian(3),
    "constant": torch.full((2, 100), 3.25, dtype=F64),
    "saturated": gaussian(3, scale=20.0),
    "far": 700 * (2 * torch.rand(1, 100, generator=torch.Generator().manual_seed(1), dtype=F64) - 1),
    "extremes": torch.where(gaussian(1, seed=2) > 1.5, 700.0, -700.0).to(F64),
    "duplicates": gaussian(3, scale=5.0).round(),
    "one peak": 50 * torch.nn.functional.one_hot(torch.tensor([3]), 100).to(F64),
    "tied at the bound": torch.tensor([[9.0] * 5 + [0.0] * 95, [9.0] * 7 + [0.0] * 93], dtype=F64),
}


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 5, 20])
@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_has_all_digits(case, k):
    c = CASES[case]
    found = solve_topk(c, k)
    for row, log_x in zip(c, found.log_x, strict=True):
        expected = log_x_of_many_digits(row, k)
        torch.testing.assert_close(log_x, expected, rtol=1e-13, atol=1e-12)
    assert float((found.log_x.exp().sum(1) - k).abs().max()) < 1e-11
    assert bool((found.log_x <= 0).all())
    rough = solve_topk(c.float(), k).log_x
    assert rough.dtype == torch.float32
    expected = solve_topk(c.float().double(), k).log_x
    torch.testing.assert_close(rough.double(), expected, rtol=1e-6, atol=1e-6 * float(c.abs().max()) + 1e-6)


def test_a_conic_solver_agrees():
    problem, c = TopKProblem(100, 5), unit(8, 0.05)
    torch.testing.assert_close(problem.solve("cvxpy", c), problem.solve("exact", c), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("k", [1, 5])
def test_the_derivative_against_central_differences(k, scale):
    """Fourth-order differences on 200 instances of each scale, in which no entry crosses the threshold."""
    c, h = gaussian(200, n=20, scale=scale, seed=k), 1e-3
    gen = torch.Generator().manual_seed(7)
    weight, direction = (torch.randn(c.shape, generator=gen, dtype=F64) for _ in range(2))
    leaf = c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weight * solve_topk(leaf, k).log_x).sum(), leaf)

    def along(t):
        found = solve_topk(c + t * h * direction, k)
        return (weight * found.log_x).sum(1), found.free

    values = {t: along(t) for t in (-2, -1, 1, 2)}
    smooth = torch.stack([(free == solve_topk(c, k).free).all(1) for _, free in values.values()]).all(0)
    assert float(smooth.double().mean()) > 0.9
    differences = (8 * (values[1][0] - values[-1][0]) - (values[2][0] - values[-2][0])) / (12 * h)
    error = ((gradient * direction).sum(1) - differences).abs() / (1 + differences.abs())
    assert float(error[smooth].max()) < 1e-8 * max(1.0, scale / 10)


def test_second_derivatives():
    c = gaussian(3, n=7, scale=2.0).requires_grad_()
    assert not bool(solve_topk(c, 2).free.all()), "some entries are at their bound"
    assert torch.autograd.gradgradcheck(lambda c: solve_topk(c, 2).log_x, c)


def test_at_the_threshold_the_derivative_is_a_one_sided_one():
    """k = 2 of (0, -log 2, -log 2): theta is 0, so that the first entry is at its bound without a multiplier."""
    half = -float(torch.tensor(2.0, dtype=F64).log())
    c, first = torch.tensor([[0.0, half, half]], dtype=F64, requires_grad=True), torch.eye(3, dtype=F64)[:1]
    (gradient,) = torch.autograd.grad(solve_topk(c, 2).log_x[0, 0], c)
    sides = [float(solve_topk(c.detach() + h * first, 2).log_x[0, 0]) / h for h in (-1e-6, 1e-6)]
    assert sides == pytest.approx([0.5, 0], abs=1e-5)
    assert min(abs(float(gradient[0, 0]) - side) for side in sides) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize(("optimizer", "tolerance"), [("pgd", 1e-12), ("sqp", 1e-12), ("pgd_a", 3e-6), ("pgd_b", 1e-7)])
def test_folded_steps_have_the_exact_gradient(optimizer, tolerance, temperature):
    problem, c = TopKProblem(30, 5), unit(16, temperature, n=30)
    y = torch.arange(16)[:, None]

    def gradient(layer):
        leaf = c.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).gather(1, y).sum(), leaf)[0]

    def solve(c):
        return problem.state(optimizer, problem.solve("exact", c), c)

    layer = foldopt.fold(solve, problem.optimizers[optimizer]())
    exact = gradient(problem.closed_form)
    folded = gradient(lambda c: problem.decisions(layer(c), c))
    assert float((folded - exact).norm() / exact.norm()) < tolerance
    assert layer.last.backward.ok.all()
    if temperature < 1:
        assert not bool(problem.exact(c).free.all()), "some entries are at their bound"


def test_lfpi_diverges_where_entries_are_small_and_says_so():
    c = unit(16, 0.05).requires_grad_()
    layer = foldopt.fold(lambda c: solve_topk(c, 5).log_x.exp(), TopKStep(5, 0.025), linear_solver="lfpi")
    with pytest.raises(LinearSolveError, match="lfpi"):
        layer(c).square().sum().backward()
    layer.on_failure = "zero"
    (gradient,) = torch.autograd.grad(layer(c).square().sum(), c)
    assert not layer.last.backward.ok.any()
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
def test_the_inverse_of_projected_gradient_in_closed_form(temperature):
    c = unit(4, temperature, n=30)
    x, step = solve_topk(c, 5).log_x.exp(), TopKStep(5, 0.025)
    phi = torch.func.vmap(torch.func.jacrev(lambda x, c: step(x[None], c[None])[0]))(x, c)
    g = gaussian(4, n=30, seed=1)
    for transposed, matrix in ((False, phi.mT), (True, phi)):
        v = step.inverse(g, transposed, step(x, c), x, c)
        residual = torch.einsum("bij,bj->bi", matrix, v) + g - v
        assert float(residual.abs().max()) < 1e-9 * float(v.abs().max() * matrix.abs().max())


def test_the_sqp_step_is_that_of_the_general_solver_also_far_from_the_solution():
    problem, c = TopKProblem(12, 3), gaussian(16, n=12, scale=3.0)
    gen = torch.Generator().manual_seed(3)
    x = 0.05 + 0.9 * torch.rand(16, 12, generator=gen, dtype=F64)
    state = x, torch.zeros(16, 1, dtype=F64), torch.rand(16, 12, generator=gen, dtype=F64)
    data = problem.sqp_data(*state, c)
    model = solve_qp(data.hessian, data.gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g)
    moved, mu, lam = TopKSQP(3)(state, c)
    torch.testing.assert_close(moved, x + model.x, rtol=0, atol=1e-8)
    torch.testing.assert_close(mu, model.nu, rtol=0, atol=1e-7)
    torch.testing.assert_close(lam, model.lam, rtol=0, atol=1e-7)
    cotangent, leaf = gaussian(16, n=12, seed=4), c.clone().requires_grad_()
    gradients = [
        torch.autograd.grad((step(state, leaf)[0] * cotangent).sum(), leaf)[0]
        for step in (TopKSQP(3), foldopt.SQP(problem))
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-8)


def test_sqp_is_newtons_method_at_the_solution():
    c = unit(8, 0.05)
    state = multipliers(solve_topk(c, 5).log_x.exp(), c)
    recorded = record(lambda state, params: TopKSQP(5)(state, *params), state, (c,))
    assert float(spectral_radius(recorded, iterations=10).max()) < 1e-10


def test_the_multipliers_satisfy_the_optimality_conditions():
    c = unit(32, 0.05)
    x, nu, lam = multipliers(solve_topk(c, 5).log_x.exp(), c)
    assert float((x.log() + 1 - c + nu + lam).abs().max()) < 1e-10
    assert float((lam * (1 - x)).abs().max()) < 1e-12
    assert bool((lam >= 0).all())


def test_the_solution_has_the_least_loss():
    c = unit(16, 0.1)
    x = solve_topk(c, 5).log_x.exp()
    best = loss(x, c)
    others = foldopt.projections.capped_simplex(x + 0.05 * gaussian(16, seed=5), 5.0)
    assert bool((loss(others, c) > best).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKProblem(5, 5), "k=5 leaves no choice among n=5"),
        (lambda: TopKProblem(5, 0), "k=0"),
        (lambda: TopKProblem(5, 2, stepsize=0.0), "stepsize=0"),
        (lambda: TopKProblem(5, 2).exact(torch.zeros(3, 4)), r"\(3, 4\), expected \(B, 5\)"),
        (lambda: TopKProblem(5, 2).exact(torch.full((3, 5), torch.nan)), r"NaN or inf in 3 of 3 samples"),
        (lambda: TopKStep(2, 0.1, floor=-1.0), "floor=-1"),
        (lambda: TopKProblem(5, 2, solver="ECOS").solve("cvxpy", torch.zeros(1, 5)), "solver='ECOS' is unknown"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
