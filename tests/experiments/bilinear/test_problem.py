"""The bilinear program: enumeration and smoothed solver against Gurobi, and folded gradients against differences."""

import pytest
import torch
from scipy.optimize import linprog

import foldopt
from data.bilinear import generate, interaction
from experiments.bilinear import problem as bilinear
from experiments.bilinear.problem import BilinearProblem
from experiments.bilinear.smoothing import project
from foldopt.diagnostics import spectral_radius
from foldopt.errors import InputError
from foldopt.step import record

F64 = torch.float64


def instances(batch, n, kappa=0.75, scale=1.0, seed=0, p=1, q=2, **options):
    """A problem with coefficients drawn as in the study, multiplied by `scale`."""
    targets = generate(seed, batch, 1, 1, 2 * n).targets["train"] * scale
    return BilinearProblem(interaction(seed, n), p, q, kappa, **options), *targets.chunk(2, 1)


def layer_of(problem, optimizer="pgd", **options):
    return foldopt.fold(lambda c, d: problem.solve("exact", c, d), problem.optimizers[optimizer](), **options)


def gradient_of(layer, c, d, g):
    c, d = c.clone().requires_grad_(), d.clone().requires_grad_()
    return torch.cat(torch.autograd.grad((layer(c, d) * g).sum(), (c, d)), 1)


def cotangent(B, n, seed=1):
    return torch.randn(B, 2 * n, generator=torch.Generator().manual_seed(seed), dtype=F64)


def clear(problem, z, c, d, margin=1e-3):
    """Samples whose active set is stable: active bounds have a multiplier, other bounds have slack."""
    eps = problem.smoothing.weight
    step = problem.optimizers["block"]().smoothing
    inside = torch.ones(len(z), dtype=torch.bool)
    s = torch.cat([c, d], 1) + torch.cat([z[:, problem.n :] @ problem.Q.mT, z[:, : problem.n] @ problem.Q], 1)
    for part, slope in zip(z.chunk(2, 1), s.chunk(2, 1), strict=True):
        free = (part > 0) & (part < 1)
        inside &= free.any(1)
        theta = torch.where(free, slope - eps * part, 0).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp(min=1)
        raw = (slope - theta) / step.weight
        inside &= (torch.minimum(raw.abs(), (raw - 1).abs()) > margin).all(1)
    return inside


@pytest.mark.parametrize(("n", "p", "q", "batch"), [(8, 1, 2, 120), (7, 3, 2, 60), (9, 2, 5, 60), (20, 1, 2, 20)])
def test_enumeration_is_gurobis_certified_optimum(n, p, q, batch):
    """260 instances; Gurobi stops at a relative gap of 1e-6."""
    pytest.importorskip("gurobipy")
    problem, c, d = instances(batch, n, p=p, q=q)
    found, certified = problem.vertex(c, d), problem.gurobi(c, d, smoothed=False)
    assert not certified.timed_out.any()
    torch.testing.assert_close(found.value, -certified.value, rtol=1e-7, atol=1e-7)
    assert ((found.x == 0) | (found.x == 1)).all()
    assert (found.x.sum(1) == p).all()
    assert (found.y.sum(1) == q).all()
    z = torch.cat([found.x, found.y], 1)
    torch.testing.assert_close(problem.value(z, c, d), found.value)
    torch.testing.assert_close(problem.decide(c, d), z)


def test_enumeration_is_best_response_of_both_blocks_and_any_batch_is_its_parts():
    problem, c, d = instances(6, 10, p=2, q=3)
    found = problem.vertex(c, d)
    for x, y, ci, di in zip(found.x, found.y, c, d, strict=True):
        for cost, total, mine in ((ci + problem.Q @ y, 2, x), (di + problem.Q.mT @ x, 3, y)):
            best = linprog(-cost, A_eq=torch.ones(1, 10), b_eq=[total], bounds=(0, 1))
            assert float(cost @ mine) == pytest.approx(-best.fun)
    one = problem.vertex(c[:1], d[:1])
    assert torch.equal(one.x, found.x[:1])
    assert len(problem.vertex(c[:0], d[:0]).value) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.25, 0.5])
def test_the_smoothed_solver_finds_gurobis_certified_optimum(kappa):
    """60 instances each; certified means that Gurobi's bound is within 1e-4 of our value."""
    pytest.importorskip("gurobipy")
    problem, c, d = instances(60, 6, kappa, time_limit=20.0)
    found, certified = problem.smoothed(c, d), problem.gurobi(c, d)
    assert found.ok.all()
    assert not certified.timed_out.any()
    assert float((-certified.bound - found.value).max()) < 1e-4
    assert float((-certified.value - found.value).max()) < 1e-6, "Gurobi has nothing better, feasible to 1e-9"


def test_a_convex_smoothed_program_is_gurobis_too():
    pytest.importorskip("gurobipy")
    problem, c, d = instances(40, 20, 1.5)
    certified = problem.gurobi(c, d)
    torch.testing.assert_close(problem.smoothed(c, d).value, -certified.value, rtol=1e-6, atol=1e-6)
    z = problem.solve("gurobi", c, d)
    torch.testing.assert_close(z, problem.solve("exact", c, d), rtol=0, atol=1e-9)
    assert problem.timeouts == 0


def test_time_outs_are_capped_counted_and_still_stationary():
    pytest.importorskip("gurobipy")
    problem, c, d = instances(2, 20, 0.9, time_limit=0.3)
    z = problem.solve("gurobi", c, d)
    assert problem.timeouts == 2
    step = problem.optimizers["pgd"]()
    assert float((step(z, c, d) - z).abs().max()) < 1e-9


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy"])
@pytest.mark.parametrize(("p", "q"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("kappa", [0.3, 0.9, 2.0])
def test_every_step_fixes_the_smoothed_optimum_to_machine_precision(kappa, p, q, smoothing):
    problem, c, d = instances(40, 12, kappa, p=p, q=q, smoothing=smoothing)
    found = problem.smoothed(c, d)
    assert found.ok.all()
    z = torch.cat([found.x, found.y], 1)
    torch.testing.assert_close(problem.smoothed_value(z, c, d), found.value)
    for name, make in problem.optimizers.items():
        error = float((make()(z, c, d) - z).abs().max())
        assert error < (1e-6 if name == "pgd_b" else 1e-11), "a projection by interior point is less accurate at kinks"
    if kappa >= 1:
        everywhere = problem.smoothed(c, d, starts=problem.spread(12))
        torch.testing.assert_close(everywhere.value, found.value, rtol=0, atol=1e-9)


def test_the_unsmoothed_optimum_is_a_vertex_and_its_gradient_is_zero():
    """This holds for both steps, and a small change of the coefficients does not change the decision."""
    problem, c, d = instances(60, 10, kappa=0)
    z = problem.solve("exact", c, d)
    assert ((z == 0) | (z == 1)).all()
    for optimizer in ("pgd", "pgd_b"):
        assert float(gradient_of(layer_of(problem, optimizer), c, d, cotangent(60, 10)).abs().max()) < 1e-12
    moved = problem.solve("exact", c + 1e-6 * torch.randn_like(c), d)
    assert torch.equal(moved, z)


@pytest.mark.parametrize("kappa", [0.5, 0.75, 2.0])
def test_gradients_against_finite_differences_and_the_kkt_system(kappa):
    """Gradients in c and d of 200 instances for each kappa, at least 100 of which have a stable active set."""
    n, B = 12, 200
    problem, c, d = instances(B, n, kappa, scale=0.6)
    z, g = problem.solve("exact", c, d), cotangent(B, n)
    keep = clear(problem, z, c, d)
    assert int(keep.sum()) >= 100
    c, d, z, g = c[keep], d[keep], z[keep], g[keep]
    mine = gradient_of(layer_of(problem), c, d, g)

    gen = torch.Generator().manual_seed(2)
    u = torch.randn(len(c), 2 * n, generator=gen, dtype=F64)
    step = 1e-5
    ends = [problem.smoothed(c + s * step * u[:, :n], d + s * step * u[:, n:]) for s in (1, -1)]
    ends = [torch.cat([e.x, e.y], 1) for e in ends]
    differences = ((ends[0] - ends[1]) * g).sum(1) / (2 * step)
    size = mine.norm(dim=1) * u.norm(dim=1)
    assert float(((differences - (mine * u).sum(1)).abs() / size).max()) < 1e-6

    eps = problem.smoothing.weight
    eye = eps * torch.eye(n, dtype=F64)
    H = torch.cat([torch.cat([eye, -problem.Q], 1), torch.cat([-problem.Q.mT, eye], 1)])
    A = torch.eye(2, dtype=F64).repeat_interleave(n, dim=1)
    for row, cot, gradient in zip(z, g, mine, strict=True):
        free = (row > 0) & (row < 1)
        k = int(free.sum())
        K = torch.zeros(k + 2, k + 2, dtype=F64)
        K[:k, :k], K[:k, k:], K[k:, :k] = H[free][:, free], A[:, free].T, A[:, free]
        solved = torch.linalg.lstsq(K, torch.cat([cot[free], torch.zeros(2, dtype=F64)])[:, None], driver="gelsd")
        expected = torch.zeros(2 * n, dtype=F64)
        expected[free] = solved.solution[:k, 0]
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("p", "q", "n", "batch"), [(1, 2, 12, 40), (3, 2, 8, 20), (1, 2, 50, 3)])
def test_the_nested_folding_of_the_paper_is_the_closed_form(p, q, n, batch):
    """f-PGDb, whose projection is a folded ADMM, agrees with the projection in closed form and with GMRES."""
    problem, c, d = instances(batch, n, p=p, q=q)
    g = cotangent(batch, n)
    closed = gradient_of(layer_of(problem, "pgd"), c, d, g)
    for optimizer, solver in (("pgd_b", "auto"), ("pgd", "gmres"), ("pgd", "direct"), ("block", "auto")):
        layer = layer_of(problem, optimizer, linear_solver=solver)
        torch.testing.assert_close(gradient_of(layer, c, d, g), closed, rtol=1e-9, atol=1e-9)


def test_the_folded_projection_has_the_jacobian_of_the_exact_one():
    """The Jacobians agree entry by entry at generic points."""
    problem, c, d = instances(6, 6, p=1, q=2)
    y = problem.solve("exact", c, d) + 0.3 * cotangent(6, 6)
    nested = problem.optimizers["pgd_b"]().prox.projection
    jacobians = [
        torch.autograd.functional.jacobian(lambda v, P=P: P(v, c, d).sum(0), y).transpose(0, 1)
        for P in (nested, lambda z, *_: project(z, problem.totals))
    ]
    torch.testing.assert_close(*jacobians, rtol=0, atol=1e-9)


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy"])
def test_the_closed_form_of_the_adjoint_is_that_of_the_step(smoothing):
    problem, c, d = instances(8, 7, smoothing=smoothing, p=2, q=3)
    z, g = problem.solve("exact", c, d), cotangent(8, 7)
    for name in problem.optimizers.keys() - {"pgd_b"}:
        step = problem.optimizers[name]()
        parts = torch.autograd.functional.jacobian(lambda v, step=step: step(v, c, d).sum(0), z)
        phi = parts.transpose(0, 1)
        for transposed in (False, True):
            A = torch.eye(14, dtype=F64) - (phi if transposed else phi.mT)
            expected = torch.linalg.solve(A, g[:, :, None])[:, :, 0]
            found = step.inverse(g, transposed, step(z, c, d), z, c, d)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_with_entropy_against_differences():
    problem, c, d = instances(100, 10, 0.5, smoothing="entropy")
    g, u, step = cotangent(100, 10), cotangent(100, 10, seed=2), 1e-5
    mine = gradient_of(layer_of(problem, "block"), c, d, g)
    ends = [problem.solve("exact", c + s * step * u[:, :10], d + s * step * u[:, 10:]) for s in (1, -1)]
    differences = ((ends[0] - ends[1]) * g).sum(1) / (2 * step)
    assert float(((differences - (mine * u).sum(1)).abs() / (mine.norm(dim=1) * u.norm(dim=1))).max()) < 1e-6


def test_at_a_weakly_active_bound_the_gradient_is_one_sided():
    """The second coordinate just reaches zero, so that it follows its coefficient only on one side."""
    problem = BilinearProblem(torch.eye(3), 1, 1, 3.0)
    eps, d = problem.smoothing.weight, torch.zeros(1, 3, dtype=F64)
    e = torch.tensor([[0.0, 1.0, 0.0]], dtype=F64)

    def second(c):
        return float(problem.smoothed(c, d).x[0, 1])

    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if second(middle * e - 9 * e.roll(1, 1)) > 0 else (middle, high)
    c, h = low * e - 9 * e.roll(1, 1), 1e-4
    sides = [(second(c + s * h * e) - second(c)) / (s * h) for s in (1, -1)]
    mine = float(gradient_of(layer_of(problem), c, d, torch.cat([e, 0 * e], 1))[0, 1])
    assert sides[1] == pytest.approx(0, abs=1e-9)
    assert sides[0] > 0.1 / eps
    assert min(abs(mine - side) for side in sides) < 1e-6


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy"])
@pytest.mark.parametrize("kappa", [0.6, 3.0])
def test_the_spectral_radius_is_that_of_the_step(kappa, smoothing):
    problem, c, d = instances(20, 10, kappa, smoothing=smoothing)
    z = problem.solve("exact", c, d)
    step = next(iter(problem.optimizers.values()))()
    measured = spectral_radius(record(lambda s, p: (step(s[0], *p),), (z,), (c, d)), iterations=4000)
    torch.testing.assert_close(problem.spectral_radius(z), measured, rtol=1e-3, atol=1e-6)
    assert (measured < 1).all()


def test_too_many_vertices_are_refused_with_a_remedy():
    problem, c, d = instances(1, 40, p=12, q=13)
    with pytest.raises(InputError, match=r"5586853480 vertices are too many to enumerate.*Gurobi instead"):
        problem.vertex(c, d)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"p": 0}, "p=0: expected a whole number of at least 1"),
        ({"q": 8}, "q=8 leaves no choice among n=8"),
        ({"kappa": -0.1}, "kappa=-0.1: the strength"),
        ({"kappa": float("nan")}, "kappa=nan"),
        ({"smoothing": "log"}, r"smoothing='log' is unknown; choose one of \['entropy', 'quadratic'\]"),
        ({"stepsize": 0}, "stepsize=0"),
        ({"stepsize": 2.0}, "stepsize=2.0: projected gradient needs a stepsize below 2"),
        ({"starts": 0}, "starts=0"),
        ({"time_limit": 0}, "time_limit=0"),
        ({"Q": torch.zeros(2, 3)}, r"Q of shape \(2, 3\): expected a finite square"),
        ({"Q": torch.ones(8, 8)}, "so that the program is linear"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(InputError, match=match):
        BilinearProblem(**{"Q": interaction(0, 8), "p": 1, "q": 2, "kappa": 0.5, **options})


def test_bad_coefficients_and_impossible_calls_are_named():
    problem, c, d = instances(3, 8)
    with pytest.raises(InputError, match=r"d has shape \(3, 7\), expected \(B, 8\)"):
        problem.vertex(c, d[:, :7])
    c[1, 2] = torch.nan
    with pytest.raises(InputError, match=r"c holds NaN or inf in 1 of 3 samples, first \[1\]"):
        problem.smoothed(c, d)
    with pytest.raises(InputError, match="kappa=0: there is no smoothed program"):
        instances(1, 8, kappa=0)[0].smoothed(d, d)
    with pytest.raises(InputError, match="smoothing='entropy': Gurobi"):
        instances(1, 8, smoothing="entropy")[0].gurobi(d, d)


def test_a_missing_gurobi_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gurobipy", None)
    problem, c, d = instances(1, 8)
    with pytest.raises(foldopt.errors.MissingDependencyError, match="gurobi"):
        problem.gurobi(c, d)


def test_the_limit_of_the_enumeration_is_where_it_says(monkeypatch):
    monkeypatch.setattr(bilinear, "CHUNK", 50)
    problem, c, d = instances(7, 8, p=2, q=3)
    found = problem.vertex(c, d)
    monkeypatch.undo()
    assert torch.equal(found.value, problem.vertex(c, d).value), "in parts or at once"


@pytest.mark.parametrize("total", [1, 2, 5, 12])
@pytest.mark.parametrize("scale", [1e-8, 1e-2, 1.0, 30.0, 1e8])
@pytest.mark.parametrize("smoothing", ["quadratic", "entropy"])
def test_the_rough_block_is_the_block(smoothing, scale, total):
    """The quadratic one agrees to rounding and the entropy one to its five digits, also with ties."""
    s = scale * torch.randn(200, 20, generator=torch.Generator().manual_seed(total), dtype=F64)
    s[:50] = s[:50].round(decimals=1)
    chosen = bilinear.SMOOTHINGS[smoothing](0.7)
    error = (chosen.rough(s, total) - chosen.block(s, total)).abs().max()
    assert float(error) <= (1e-12 if smoothing == "quadratic" else 1e-5)
