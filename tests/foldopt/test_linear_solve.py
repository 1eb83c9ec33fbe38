"""Every solver of v = Phi^T v + g against a dense solve, sample by sample."""

import pytest
import torch

from foldopt import linear_solve as ls
from foldopt.errors import InputError
from tests.foldopt.steps import exact, phi_with_radius, product

SOLVERS = {
    "lfpi": ls.LFPI(tol=1e-12),
    "gmres": ls.GMRES(tol=1e-12),
    "gmres restarted": ls.GMRES(tol=1e-12, restart=5),
    "bicgstab": ls.BiCGSTAB(tol=1e-12),
    "anderson": ls.Anderson(tol=1e-12),
    "direct": ls.Direct(),
    "least_squares": ls.LeastSquares(),
    "auto": ls.Auto(),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_agrees_with_dense_solve_where_lfpi_converges(name, rho):
    phi, g = phi_with_radius(rho)
    v, info = SOLVERS[name](product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gmres", "anderson", "direct", "least_squares", "auto"])
def test_krylov_and_direct_are_right_at_any_spectral_radius(name):
    phi, g = phi_with_radius(41.0)
    v, info = SOLVERS[name](product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


def test_lfpi_reports_divergence_per_sample():
    converging, g = phi_with_radius(0.5, batch=4)
    diverging, _ = phi_with_radius(1.5, batch=4)
    phi = torch.cat([converging, diverging])
    g = torch.cat([g, g])
    v, info = ls.LFPI()(product(phi), g)
    assert info.ok.tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(v[:4], exact(phi, g)[:4], rtol=1e-8, atol=1e-8)


def test_lfpi_iterates_are_the_neumann_series_of_eq_24():
    phi, g = phi_with_radius(0.9)
    for k in (1, 3, 10):
        v, _ = ls.LFPI(tol=1e-15, max_iter=k)(product(phi), g)
        term, total = g, g
        for _ in range(k):
            term = product(phi)(term)
            total = total + term
        torch.testing.assert_close(v, total, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_residual_is_the_one_measured_at_the_answer(name):
    phi, g = phi_with_radius(0.8)
    v, info = SOLVERS[name](product(phi), g)
    true = (g + product(phi)(v) - v).norm(dim=1) / g.norm(dim=1)
    torch.testing.assert_close(info.residual, true, rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_phi_and_zero_cotangent(name):
    g = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    v, info = SOLVERS[name](torch.zeros_like, g)
    assert info.ok.all()
    torch.testing.assert_close(v, g)


@pytest.mark.parametrize("name", ls.SOLVERS)
def test_one_variable_and_contraction_one_half(name):
    """U = 0.5 x + c with n = 1: the Krylov space is exhausted after one vector."""
    g = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    v, info = ls.linear_solver(name)(lambda v: 0.5 * v, g)
    assert info.ok.all()
    torch.testing.assert_close(v, 2 * g)


@pytest.mark.parametrize("name", SOLVERS)
def test_early_breakdown_of_some_samples_leaves_the_others_right(name):
    phi, g = phi_with_radius(0.7, batch=4)
    phi[1] = 0.25 * torch.eye(12)
    phi[2] = 0
    v, info = SOLVERS[name](product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(set(ls.SOLVERS) - {"least_squares"}))
def test_singular_sample_is_reported_and_spoils_nothing(name):
    phi, g = phi_with_radius(0.5, batch=3)
    phi[1] = torch.eye(12)
    v, info = ls.linear_solver(name)(product(phi), g)
    assert info.ok.tolist() == [True, False, True]
    torch.testing.assert_close(v[[0, 2]], exact(phi[[0, 2]], g[[0, 2]]), rtol=1e-8, atol=1e-8)


def test_auto_falls_back_to_direct_and_marks_the_samples():
    """A cyclic shift: GMRES makes no progress at all before its last step."""
    n = 260
    shift = torch.roll(torch.eye(n, dtype=torch.float64), 1, 0)
    phi = torch.stack([torch.eye(n, dtype=torch.float64) - shift, 0.1 * torch.eye(n, dtype=torch.float64)])
    g = torch.zeros(2, n, dtype=torch.float64)
    g[:, 0] = 1
    v, info = ls.Auto()(product(phi), g)
    assert info.ok.all()
    assert info.fallback.tolist() == [True, False]
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


def test_closed_form_jacobian_is_used():
    phi, g = phi_with_radius(3.0)

    def refuse(v):
        raise AssertionError("the closed form makes products unnecessary")

    for solver in (ls.Direct(), ls.Auto()):
        v, info = solver(refuse, g, ls.Phi(lambda: phi))
        assert info.ok.all()
        torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ls.SOLVERS)
def test_float32_and_empty_batch(name):
    solver = ls.linear_solver(name)
    phi, g = phi_with_radius(0.5, dtype=torch.float32)
    v, info = solver(product(phi), g)
    assert v.dtype == torch.float32
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-3, atol=1e-4)
    v, info = solver(product(phi[:0]), g[:0])
    assert v.shape == (0, 12)
    assert info.ok.all()


def test_nan_sample_is_not_ok_and_spoils_nothing():
    phi, g = phi_with_radius(0.5, batch=3)
    phi[0, 0, 0] = torch.nan
    for solver in SOLVERS.values():
        v, info = solver(product(phi), g)
        assert info.ok.tolist() == [False, True, True]
        torch.testing.assert_close(v[1:], exact(phi[1:], g[1:]), rtol=1e-8, atol=1e-8)


def rank_deficient(batch=6, n=12, seed=1):
    """Phi with I - Phi of rank n - 2, a cotangent with solutions for the first half of the batch, and the pinv's v."""
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, n, n - 2, generator=gen, dtype=torch.float64)
    A = A @ torch.randn(batch, n - 2, n, generator=gen, dtype=torch.float64)
    g = torch.randn(batch, n, generator=gen, dtype=torch.float64)
    consistent = torch.einsum("bij,bi->bj", A, g)
    g = torch.where((torch.arange(batch) < batch // 2)[:, None], consistent, g)
    return torch.eye(n, dtype=torch.float64) - A, g, torch.einsum("bji,bj->bi", torch.linalg.pinv(A), g)


def test_least_squares_is_the_pseudoinverse_and_counts_singular_samples():
    phi, g, expected = rank_deficient()
    regular, g_regular = phi_with_radius(3.0, batch=2)
    phi, g = torch.cat([phi, regular]), torch.cat([g, g_regular])
    v, info = ls.LeastSquares()(product(phi), g)
    torch.testing.assert_close(v[:6], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v[6:], exact(regular, g_regular), rtol=1e-8, atol=1e-8)
    assert info.fallback.tolist() == [True] * 6 + [False] * 2
    assert info.ok.all()
    assert (info.residual < 1e-10).tolist() == [True] * 3 + [False] * 3 + [True] * 2


@pytest.mark.parametrize("closed_form", [True, False])
def test_auto_takes_least_squares_only_where_the_equation_has_solutions(closed_form):
    phi, g, _ = rank_deficient()
    v, info = ls.Auto()(product(phi), g, ls.Phi(lambda: phi) if closed_form else None)
    assert info.ok.tolist() == [True] * 3 + [False] * 3
    residual = (g + product(phi)(v) - v).norm(dim=1) / g.norm(dim=1)
    assert (residual[:3] < 1e-8).all()
    torch.testing.assert_close(info.residual[:3], residual[:3], rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("make", [ls.GMRES, ls.BiCGSTAB])
def test_preconditioner_saves_products_and_changes_no_answer(make):
    """The factorization of a nearby point: what a training loop has at hand."""
    phi, g = phi_with_radius(5.0)
    noise, _ = phi_with_radius(1e-3, seed=5)
    nearby = ls.Phi(lambda: phi + noise)
    plain, alone = make(tol=1e-12)(product(phi), g)
    v, info = make(tol=1e-12, preconditioner=nearby.solve)(product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)
    if alone.ok.all():
        torch.testing.assert_close(v, plain, rtol=1e-8, atol=1e-8)
    assert int(info.iterations.max()) < int(alone.iterations.min())


def test_a_preconditioner_for_another_batch_is_refused():
    phi, g = phi_with_radius(2.0)
    with pytest.raises(InputError, match=r"preconditioner returned shape \(1, 12\) for a residual of shape \(16, 12\)"):
        ls.GMRES(preconditioner=lambda r: r[:1])(product(phi), g)


@pytest.mark.parametrize("make", [ls.Direct, ls.LeastSquares])
def test_phi_is_made_and_factored_once_and_serves_its_transpose(make, monkeypatch):
    phi, g = phi_with_radius(3.0)
    made, factored = [], []
    factor = torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda a: factored.append(1) or factor(a))
    kept = ls.Phi(lambda: made.append(1) or phi)
    for _ in range(3):
        v, _ = make()(product(phi), g, kept)
    t, info = make()(product(phi.mT), g, kept.transposed())
    assert len(made) == 1
    assert len(factored) == (1 if make is ls.Direct else 0)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(t, exact(phi.mT, g), rtol=1e-8, atol=1e-8)


def test_anderson_takes_fewer_products_than_lfpi_and_converges_where_it_diverges():
    phi, g = phi_with_radius(0.95)
    _, slow = ls.LFPI()(product(phi), g)
    _, fast = ls.Anderson()(product(phi), g)
    assert fast.ok.all()
    assert int(fast.iterations.max()) < int(slow.iterations.min())
    v, info = ls.Anderson(memory=12)(product(3 * phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(3 * phi, g), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("memory", [1, 3])
def test_anderson_with_a_short_memory(memory):
    phi, g = phi_with_radius(0.6)
    v, info = ls.Anderson(memory=memory)(product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.GMRES(tol=0.0), r"GMRES\(tol=0.0\)"),
        (lambda: ls.LFPI(max_iter=0), r"LFPI\(max_iter=0\)"),
        (lambda: ls.GMRES(restart=0), r"GMRES\(restart=0\)"),
        (lambda: ls.Direct(tol=2.0), r"Direct\(tol=2.0\)"),
        (lambda: ls.Direct(max_bytes=0), r"Direct\(max_bytes=0\): expected a number above 0"),
        (lambda: ls.Auto(max_bytes=-1), r"Auto\(max_bytes=-1\): expected a number above 0"),
        (lambda: ls.LeastSquares(cutoff=2.0), r"LeastSquares\(cutoff=2.0\)"),
        (lambda: ls.Anderson(memory=0), r"Anderson\(memory=0\)"),
        (lambda: ls.GMRES(preconditioner=3), "preconditioner=3 is not callable"),
        (lambda: ls.linear_solver("gmers"), "linear_solver='gmers' is unknown; choose one of"),
        (lambda: ls.linear_solver(3), "linear_solver=3 is not callable"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
