"""Right layers pass `check`, wrong ones are named with what is wrong; Theorem 1 and its rate; the stepsize study."""

import math

import pytest
import torch

import foldopt
from foldopt import diagnostics
from foldopt.diagnostics import agreement, backward_trace, check, spectral_radius, stepsize_study
from foldopt.errors import InputError, KinkError
from foldopt.linear_solve import LFPI
from foldopt.step import record
from tests.foldopt.steps import F64, heron, iterate, problem, tanh_step


def detached(x, c, W):
    return tanh_step(x, c.detach(), W)


def negated(x, c, W):
    return tanh_step(x, -c, W)


def ignored(x, c, W):
    return tanh_step(x, c, W.detach())


def test_a_right_layer_passes_and_the_report_reads_well():
    layer = foldopt.fold(iterate(tanh_step), tanh_step)
    report = check(layer, *problem())
    text = str(report)
    assert report.ok
    assert [c.name for c in report.gradients] == ["0", "1"]
    assert max(c.error for c in report.gradients) < 1e-6
    assert all(info.ok.all() for info in report.solvers.values())
    assert set(report.solvers) == set(foldopt.linear_solve.SOLVERS)
    for words in ("LFPI converges", "gmres           100%", "0 coordinates", "no problem found"):
        assert words in text


@pytest.mark.parametrize(
    ("step", "wrong", "words"),
    [
        (detached, {"0"}, "parameter 0"),
        (ignored, {"1"}, "parameter 1"),
        (negated, {"0", "1"}, "does not fix the solution"),
    ],
)
def test_a_wrong_layer_is_told_what_is_wrong(step, wrong, words):
    layer = foldopt.fold(iterate(tanh_step), step)
    report = check(layer, *problem())
    assert not report.ok
    assert {c.name for c in report.gradients if c.error > 1e-3} == wrong
    assert "PROBLEM" in str(report)
    assert any(words in p for p in report.problems)
    assert layer.on_failure == "raise"
    assert layer.last is None


def test_kinks_are_found_where_they_are():
    layer = foldopt.fold(lambda c: c.clamp(0, 1), lambda x, c: (x - 0.3 * (x - c)).clamp(0, 1))
    c = torch.tensor([[0.2, 1.0, 1.5], [0.0, -1.0, 0.7]], dtype=F64)
    assert check(layer, c).degenerate.tolist() == [[0, 1], [1, 0]]


def test_an_underdetermined_step_is_called_singular():
    layer = foldopt.fold(lambda c: c, lambda x, c: x + 0 * c)
    report = check(layer, torch.rand(2, 3, dtype=F64))
    assert any("singular at samples [0, 1]" in p for p in report.problems)


def test_weights_are_checked_and_left_as_they_were():
    net = torch.nn.Linear(3, 3, dtype=F64)
    before = [p.detach().clone() for p in net.parameters()]

    def update(x, c):
        return 0.5 * x + 0.5 * torch.tanh(net(c))

    report = check(foldopt.fold(lambda c: torch.tanh(net(c)), update), torch.randn(4, 3, dtype=F64))
    assert report.ok
    assert len(report.gradients) == 3
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_ready_layers_are_examined_through_their_folded_part():
    gen = torch.Generator().manual_seed(0)
    Q = torch.randn(4, 4, generator=gen, dtype=F64)
    p, G, h = torch.randn(5, 4, generator=gen, dtype=F64), torch.eye(4, dtype=F64), torch.full((4,), 0.2, dtype=F64)
    report = check(foldopt.QPLayer(), Q @ Q.T + torch.eye(4), p, G, h)
    assert report.ok, str(report)
    assert len(report.gradients) == 4
    nlp = foldopt.NLPLayer(
        lambda x, c: (x - c).square().sum(1), lambda x, c: x.sum(1, keepdim=True), start=torch.zeros(4)
    )
    assert check(nlp, p).ok
    with pytest.raises(InputError, match="Linear is not a folded layer"):
        check(torch.nn.Linear(2, 2), p)


@pytest.mark.parametrize("kind", ["coo", "scipy"])
def test_a_sparse_program_is_examined_by_the_layer_of_its_pattern_and_keeps_its_policies(kind):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    Q = scipy_sparse.identity(3) if kind == "scipy" else torch.eye(3, dtype=F64).to_sparse_coo()
    p, A, b = torch.tensor([[0.3, -0.2, 0.1]], dtype=F64), torch.ones(1, 3, dtype=F64), torch.ones(1, dtype=F64)
    layer = foldopt.QPLayer()
    report = check(layer, Q, p, None, None, A, b)
    assert report.ok
    assert [c.name for c in report.gradients] == ["1", "4", "5"]
    tied = torch.tensor([[1.0, 0.0, -1.0]], dtype=F64, requires_grad=True)
    x = layer(Q, -tied, torch.eye(3, dtype=F64) * -1, torch.zeros(3, dtype=F64), A, b)
    with pytest.raises(KinkError):  # and not one side of it, as `check` takes
        x[0, 1].backward()
    if kind == "coo":
        with pytest.raises(InputError, match=r"parameter 0 is a sparse tensor of shape \(3, 3\) that requires"):
            check(layer, Q.clone().requires_grad_(), p, None, None, A, b)


def test_a_cvxpy_problem_is_examined():
    cp = pytest.importorskip("cvxpy")
    x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    layer = foldopt.CvxpyLayer(cp.Problem(cp.Maximize(c @ x), [cp.norm(x) <= r]), [c, r], [x])
    report = check(layer, torch.tensor([1.0, 2, 3], dtype=F64), torch.tensor(2.0, dtype=F64))
    assert report.ok
    assert [c.name for c in report.gradients] == ["0", "1"]
    assert max(c.error for c in report.gradients) < 1e-6


def test_the_spectral_radius_is_that_of_the_matrix():
    """200 random matrices, most of them with a complex dominant pair."""
    gen = torch.Generator().manual_seed(0)
    M = torch.randn(200, 5, 5, generator=gen, dtype=F64) / 4
    x = torch.zeros(200, 5, dtype=F64)
    recorded = record(lambda x, c: (torch.einsum("bij,bj->bi", M, x[0]) + c[0],), (x,), (x,))
    exact = torch.linalg.eigvals(M).abs().amax(1)
    estimate = spectral_radius(recorded)
    assert float(((estimate - exact) / exact).abs().quantile(0.95)) < 0.02


def test_theorem_1_unrolled_backward_is_lfpi():
    """After k steps both gradients are the same to 1e-12, on 200 samples, before either has converged."""
    c, W = problem(batch=200, n=6)
    solve = iterate(tanh_step)
    for k in (2, 5, 12):
        unfolded = foldopt.unfold(solve, tanh_step, iterations=k)(c, W)
        expected = torch.autograd.grad(unfolded.square().sum(), (c, W))
        one_product_each = LFPI(tol=1e-300, max_iter=k - 1)
        layer = foldopt.fold(solve, tanh_step, linear_solver=one_product_each, on_failure="warn")
        loss = layer(c, W).square().sum()
        with pytest.warns(RuntimeWarning, match="lfpi"):
            folded = torch.autograd.grad(loss, (c, W))
        for a, b in zip(folded, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_theorem_1_tail_rate_is_the_spectral_radius():
    """A symmetric Phi: complex pairs would make the error oscillate about the rate."""
    gen = torch.Generator().manual_seed(1)
    M = torch.randn(6, 6, generator=gen, dtype=F64)
    M = (M + M.T) / 8
    c = torch.randn(3, 6, generator=gen, dtype=F64)
    layer = foldopt.fold(lambda c: torch.linalg.solve(torch.eye(6, dtype=F64) - M, c.T).T, lambda x, c: x @ M + c)
    rho = float(torch.linalg.eigvalsh(M).abs().max())
    trace = backward_trace(layer, c, iterations=60)
    assert trace.rate() == pytest.approx(-math.log(rho), rel=0.1)
    assert float(trace.forward.max()) < 1e-14


def test_a_trace_from_elsewhere_converges_forward_and_back():
    c, W = problem(n=6)
    trace = backward_trace(foldopt.fold(iterate(tanh_step), tanh_step), c, W, iterations=60, start=torch.zeros_like(c))
    assert float(trace.forward[0]) > 0.05
    assert float(trace.forward[-1]) < 1e-12
    assert float(trace.backward[0]) > 0.05
    assert float(trace.backward[-1]) < 1e-8


def test_unroll_unfold_and_fold_agree():
    layer = foldopt.fold(iterate(tanh_step), tanh_step)
    distances = agreement(layer, *problem(), iterations=150, start=lambda c, W: torch.zeros_like(c))
    assert set(distances) == {"unfold", "lfpi", "unroll"}
    assert max(distances.values()) < 1e-12
    assert agreement(layer, *problem(), iterations=3)["lfpi"] > 1e-3
    with pytest.raises(InputError, match="iterations=1: expected a whole number of at least 2"):
        agreement(layer, *problem(), iterations=1)


def test_stepsizes_change_the_work_not_the_answer():
    def make(alpha):
        curvature = torch.tensor([1.0, 3.0], dtype=F64)
        objective = lambda x, c: (curvature * (x - c).square()).sum(1)  # noqa: E731
        return foldopt.fold(
            lambda c: c.clamp(0, 1), foldopt.ProjectedGradient(objective, lambda y, c: y.clamp(0, 1), alpha)
        )

    c = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    small, good, large = stepsize_study(make, [0.05, 0.2, 0.5], c)
    assert small.spectral_radius == pytest.approx(0.9, rel=1e-6)
    assert small.lfpi_products > 2 * good.lfpi_products
    assert (good.lfpi_solved, large.lfpi_solved) == (1.0, 0.0)
    assert large.spectral_radius == pytest.approx(2.0, rel=1e-6)
    assert max(row.gmres_products for row in (small, good, large)) <= 6


def test_float32_layers_are_judged_by_their_own_precision():
    layer = foldopt.fold(lambda c: c.sqrt(), heron)
    report = diagnostics.check(layer, torch.tensor([[4.0, 2.0], [9.0, 5.0]]))
    assert report.ok, str(report)


@pytest.mark.slow
def test_the_root_cause_comes_first():
    """Of a sample without a solution or without a derivative, before what follows from it."""
    eye, zeros = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64)
    p = torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=F64)
    report = check(foldopt.QPLayer(), eye, p, -eye, zeros)
    assert "has a kink" in report.problems[0]
    assert "at sample 1: G[0]" in report.problems[0]
    apart = torch.cat([eye, -eye]), torch.tensor([[1.0, 1, 1, 1], [-1, -1, 0, 0]], dtype=F64)
    report = check(foldopt.QPLayer(), eye, p, *apart)
    assert report.problems == [
        "samples without a solution: infeasible at [1]. Mend these programs before looking at gradients."
    ]
    assert check(foldopt.QPLayer(), eye, p + 0.5, None, None, torch.ones(1, 2, dtype=F64), zeros[:1]).ok
