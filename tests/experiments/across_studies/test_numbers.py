"""The exact solvers of the studies on all scales, and with ties, zeros, duplicates, denormals, float32 and NaN."""

from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import foldopt
from experiments.bilinear.problem import BilinearProblem
from experiments.denoising.problem import DenoisingProblem, DenoisingStep, differencing
from experiments.multilabel.problem import TopKProblem, TopKSQP, TopKStep, multipliers, solve_topk
from experiments.portfolio.exact import smallest_variance
from experiments.portfolio.problem import PortfolioProblem
from foldopt.errors import InputError
from tests.drawn import F64, normal, not_finite, points, properties, scales, seeds

N = 5
EPS = torch.finfo(F64).eps
SMALLEST = 1e-290  # smallest max |c|; below it multipliers are denormal and have few digits


@st.composite
def portfolios(draw):
    """V and c with random scales, two identical assets in some, the risk limit from very tight to inactive."""
    root = normal(draw(seeds), N, draw(st.sampled_from([N, N - 2])))
    if draw(st.booleans()):
        root[1] = root[0]
    V = draw(scales) * (root @ root.T + 1e-3 * torch.eye(N, dtype=F64))
    excess = draw(st.sampled_from([1e-4, 1e-2, 0.3, 3.0, 100.0]))
    return PortfolioProblem(V, float(smallest_variance(V[None])[0]) * (1 + excess)), draw(points())


def solved(problem, c):
    """The solutions and c of the samples whose multipliers are not denormal; all of these must be solved."""
    found, size = problem.exact(c), c.abs().amax(1)
    assert found.x[~found.ok].isnan().all()
    keep = (size == 0) | (size > SMALLEST)
    assert found.ok[keep].all()
    return [part[keep] for part in found.state], c[keep]


def has_one_solution(x, lam, c):
    """Samples whose optimal x is unique: the risk limit is active, or a single asset is best."""
    best = c.topk(2, dim=1).values
    margin = 1e-3 * c.abs().amax(1)
    return (lam[:, 0] > margin) | ((best[:, 0] - best[:, 1] > margin) & (x.amax(1) == 1))


@properties
@given(portfolios())
def test_portfolios_satisfy_their_kkt_conditions(instance):
    problem, c = instance
    (x, nu, lam), c = solved(problem, c)
    pull = x @ problem.V / problem.gamma
    size = torch.maximum(c.abs().amax(1), lam.amax(1)).clamp(min=torch.finfo(F64).tiny)[:, None]
    slack = torch.cat([1 - (pull * x).sum(1, keepdim=True), x], 1)
    assert (slack >= -1e-7).all()
    assert ((x.sum(1) - 1).abs() <= 1e-11).all()
    assert (lam >= -1e-7 * size).all()
    assert ((nu + 2 * lam[:, :1] * pull - lam[:, 1:] - c).abs() <= 1e-7 * size).all()
    assert ((lam * slack).abs() <= 1e-7 * size).all()


@properties
@given(portfolios())
def test_a_step_of_sqp_fixes_the_portfolio_where_it_is_the_only_one_and_its_return_elsewhere(instance):
    problem, c = instance
    (x, nu, lam), c = solved(problem, c)
    moved = foldopt.SQP(problem)((x, nu, lam), *problem.params(c))[0]
    one = has_one_solution(x, lam, c)
    assert ((moved - x).abs()[one] <= 1e-6).all()
    assert (((moved - x) * c).sum(1).abs() <= 1e-6 * c.abs().amax(1)).all()


def slopes_and_differences(call, p, h, g, d):
    """For each sample: the vjp with g along d, the central difference of step h, and whether no kink is near.

    p, g and d are (B, .) and h (B, 1); call(p) is (B, .).
    """
    p = p.clone().requires_grad_()
    y = call(p)
    (pulled,) = torch.autograd.grad((g * y).sum(), p)
    with torch.no_grad():
        ahead, behind = call(p + h * d), call(p - h * d)
    smooth = (ahead + behind - 2 * y.detach()).abs().amax(1) <= 1e-3 * (ahead - behind).abs().amax(1) + 1e-9 * h[:, 0]
    return (pulled * d).sum(1), (g * (ahead - behind)).sum(1) / (2 * h[:, 0]), smooth


@properties
@given(portfolios(), seeds)
def test_gradients_of_portfolios_agree_with_finite_differences(instance, seed):
    problem, c = instance
    (x, _, lam), c = solved(problem, c)
    keep = has_one_solution(x, lam, c)
    assume(keep.any())
    c, size = c[keep], c[keep].abs().amax(1, keepdim=True)
    layer = foldopt.f_sqp(problem, lambda *params: problem.exact(*params).state, on_failure="zero")
    got, expected, smooth = slopes_and_differences(
        lambda c: layer(*problem.params(c))[0], c, 1e-7 * size, normal(seed, *c.shape), normal(seed + 1, *c.shape)
    )
    assume(smooth.any())
    got, expected = ((t * size[:, 0])[smooth] for t in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@st.composite
def bilinears(draw, largest=8):
    """Q of random scale with few or many distinct values; c and d are 1e-8 to 10^largest times as large."""
    size = draw(scales)
    Q = normal(draw(seeds), N, N)
    Q = size * (Q.round() + torch.eye(N, dtype=F64) if draw(st.booleans()) else Q)
    totals = draw(st.sampled_from([(1, 2), (3, 2)]))
    problem = BilinearProblem(
        Q, *totals, draw(st.sampled_from([0.3, 0.9, 1.5])), draw(st.sampled_from(["quadratic", "entropy"]))
    )
    near = st.integers(-8, largest).map(lambda k: size * 10.0**k)
    return problem, draw(points(scales=near)), draw(points(scales=near))


def vertices(total):
    return torch.stack([torch.eye(N, dtype=F64)[list(ones)].sum(0) for ones in combinations(range(N), total)])


@properties
@given(bilinears())
def test_no_pair_of_vertices_is_better_than_the_one_enumerated(instance):
    problem, c, d = instance
    found = problem.vertex(c, d)
    x, y = (vertices(total) for total in problem.totals)
    values = (c @ x.T)[:, :, None] + (x @ problem.Q @ y.T) + (d @ y.T)[:, None, :]
    size = torch.stack([c.abs().amax(1), d.abs().amax(1), problem.Q.abs().max().expand(len(c))]).amax(0)
    assert ((found.value - values.flatten(1).amax(1)).abs() <= 50 * EPS * size).all()
    z = torch.cat([found.x, found.y], 1)
    assert ((z == 0) | (z == 1)).all()
    assert ((problem.value(z, c, d) - found.value).abs() <= 50 * EPS * size).all()


@properties
@given(bilinears())
def test_smoothed_bilinear_solutions_are_feasible_stationary_and_fixed_by_every_step(instance):
    problem, c, d = instance
    found = problem.smoothed(c, d)
    assert found.ok.all()
    z = torch.cat([found.x, found.y], 1)
    assert ((z >= 0) & (z <= 1)).all()
    size = torch.cat([c.abs(), d.abs(), problem.Q.abs().max().expand(len(c), 1)], 1).amax(1)
    accuracy = 1e-9 + 100 * EPS * size / problem.smoothing.weight
    for part, other, slope, Q, total in (
        (found.x, found.y, c, problem.Q.T, problem.totals[0]),
        (found.y, found.x, d, problem.Q, problem.totals[1]),
    ):
        assert ((part.sum(1) - total).abs() <= 1e-11).all()
        if (
            problem.kind == "quadratic"
        ):  # to first order no vertex is better; the slope of entropy is infinite at the bounds
            s = slope + other @ Q - problem.smoothing.weight * part
            assert (s.topk(total, dim=1).values.sum(1) - (s * part).sum(1) <= accuracy * size * N).all()
    for name in problem.optimizers.keys() - {"pgd_b"}:
        assert ((problem.optimizers[name]()(z, c, d) - z).abs().amax(1) <= accuracy).all(), name


@properties
@given(bilinears(largest=3), seeds)
def test_gradients_of_smoothed_bilinear_solutions_agree_with_finite_differences(instance, seed):
    problem, c, d = instance
    step = problem.optimizers["block"]()
    layer = foldopt.fold(lambda c, d: problem.solve("exact", c, d), step, on_failure="zero")
    h = torch.full((len(c), 1), 1e-5 * problem.smoothing.weight, dtype=F64)
    got, expected, smooth = slopes_and_differences(
        lambda p: layer(*p.chunk(2, 1)), torch.cat([c, d], 1), h, normal(seed, 3, 2 * N), normal(seed + 1, 3, 2 * N)
    )
    assume(smooth.any())
    got, expected = (problem.smoothing.weight * t[smooth] for t in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@st.composite
def signals(draw):
    """A problem, its operator D and signals d of length 6, with random scales."""
    n = N + 1
    learned = draw(st.sampled_from([0.0, 0.05, 0.5])) * normal(draw(seeds), n - 1, n)
    return DenoisingProblem(draw(scales), n), draw(scales) * (differencing(n) + learned), draw(points(columns=n))


@properties
@given(signals())
def test_denoised_signals_satisfy_their_optimality_conditions_and_the_step_fixes_them(instance):
    problem, D, d = instance
    found = problem.exact(D, d)
    assert found.ok.all()
    a = D.abs().max()
    size = d.abs().amax(1, keepdim=True) + problem.weight * a
    assert ((found.x - d - found.w @ D).abs() <= 50 * EPS * size).all()
    assert (found.w.abs() <= problem.weight).all()
    Dx = found.x @ D.T
    free = found.w.abs() < problem.weight
    assert (torch.where(free, Dx.abs(), 0) <= 1e-11 * a * size).all()
    assert (torch.where(free, 0, Dx * found.w) <= 1e-11 * a * size * problem.weight).all()
    moved = DenoisingStep()(found.w, D, d, torch.tensor(problem.weight, dtype=F64))
    assert (((moved - found.w) @ D).abs() <= 1e-11 * size).all()


@properties
@given(signals(), seeds)
def test_gradients_of_denoised_signals_agree_with_finite_differences(instance, seed):
    problem, D, d = instance
    layer = foldopt.fold(lambda D, d, _: problem.exact(D, d).w, DenoisingStep(), on_failure="zero")
    # The active set changes at differences as large as the weight. Steps are smaller, but do not vanish beside d.
    largest, reach = d.abs().amax(1, keepdim=True), problem.weight * D.abs().max()
    h = 1e-5 * torch.where(largest > 1e-290, torch.minimum(largest, reach), reach)

    def denoised(d):
        params = problem.params((D, d))
        return problem.decisions(layer(*params), *params)

    got, expected, smooth = slopes_and_differences(denoised, d, h, normal(seed, *d.shape), normal(seed + 1, *d.shape))
    smooth &= layer.last.ok & (h > 1e-11 * largest)[:, 0]
    assume(smooth.any())
    torch.testing.assert_close(got[smooth], expected[smooth], rtol=1e-3, atol=1e-3)


@properties
@given(c=points(), k=st.integers(1, N - 1))
def test_the_smooth_top_k_is_feasible_and_optimal(c, k):
    log_x, free = solve_topk(c, k)
    x = log_x.exp()
    assert (log_x <= 0).all()
    rounding = EPS * (100 + c.abs().amax(1))
    assert ((x.sum(1) - k).abs() <= 10 * k * rounding).all()
    multiplier = c - log_x  # the same for all free entries, and at least that for entries at the bound
    theta = torch.where(free, multiplier, -torch.inf).amax(1, keepdim=True)
    assert ((multiplier - theta).abs()[free] <= (10 * rounding[:, None]).expand_as(c)[free]).all()
    assert (multiplier >= theta - 10 * rounding[:, None])[~free].all()


small = st.integers(-8, 1).map(lambda k: 10.0**k)


@properties
@given(c=points(scales=small), k=st.integers(1, N - 1))
def test_steps_fix_the_smooth_top_k(c, k):
    x = solve_topk(c, k).log_x.exp()
    assert (TopKStep(k, 0.025)(x, c) - x).abs().amax() <= 1e-11
    state = multipliers(x, c)
    assert (TopKSQP(k)(state, c)[0] - state[0]).abs().amax() <= 1e-9


@properties
@given(c=points(scales=small), k=st.integers(1, N - 1), seed=seeds)
def test_gradients_of_the_smooth_top_k_agree_with_finite_differences(c, k, seed):
    h = torch.full((len(c), 1), 1e-5, dtype=F64)
    got, expected, smooth = slopes_and_differences(
        lambda c: solve_topk(c, k).log_x, c, h, normal(seed, *c.shape), normal(seed + 1, *c.shape)
    )
    assume(smooth.any())
    torch.testing.assert_close(got[smooth], expected[smooth], rtol=1e-3, atol=1e-3)


@properties
@given(c=points(), k=st.integers(1, N - 1))
def test_the_smooth_top_k_in_float32_is_within_its_rounding_of_float64(c, k):
    got, expected = solve_topk(c.float(), k).log_x, solve_topk(c.float().double(), k).log_x
    assert got.dtype == torch.float32
    assert ((got - expected).abs() <= 10 * torch.finfo(torch.float32).eps * (10 + c.abs().amax())).all()


PORTFOLIO = PortfolioProblem(normal(0, N, N) @ normal(0, N, N).T + torch.eye(N, dtype=F64), 3.0)
BILINEAR = BilinearProblem(normal(1, N, N), 1, 2, 0.9)
DENOISING = DenoisingProblem(0.5, N)
SOLVERS = {
    "portfolio": PORTFOLIO.exact,
    "bilinear, enumerated": lambda c: BILINEAR.vertex(c, c),
    "bilinear, smoothed": lambda c: BILINEAR.smoothed(c, c),
    "denoising": lambda d: DENOISING.exact(differencing(N), d),
}


@pytest.mark.parametrize("name", SOLVERS)
@properties
@given(c=points())
def test_float32_is_solved_in_float64(name, c):
    for got, expected in zip(SOLVERS[name](c.float()), SOLVERS[name](c.float().double()), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*SOLVERS, "topk"])
@properties
@given(c=points(), place=st.tuples(st.integers(0, 2), st.integers(0, N - 1)), bad=not_finite)
def test_nan_or_inf_raises_with_its_row(name, c, place, bad):
    c[place] = bad
    with pytest.raises(InputError, match=rf"holds NaN or inf in 1 of 3 \w+, first \[{place[0]}\]"):
        {**SOLVERS, "topk": TopKProblem(N, 2).exact}[name](c)
