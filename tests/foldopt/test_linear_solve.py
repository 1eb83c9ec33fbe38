"""Every solver of v = Phi^T v + g against a dense solve, sample by sample."""

import pytest
import torch

from foldopt import linear_solve as ls
from foldopt.errors import InputError

SOLVERS = {
    "lfpi": ls.LFPI(tol=1e-12),
    "gmres": ls.GMRES(tol=1e-12),
    "gmres restarted": ls.GMRES(tol=1e-12, restart=5),
    "bicgstab": ls.BiCGSTAB(tol=1e-12),
    "direct": ls.Direct(),
    "auto": ls.Auto(),
}


def phi_with_radius(rho, batch=16, n=12, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    phi = torch.randn(batch, n, n, generator=gen, dtype=torch.float64)
    radius = torch.linalg.eigvals(phi).abs().amax(1)
    g = torch.randn(batch, n, generator=gen, dtype=torch.float64)
    return (phi * (rho / radius)[:, None, None]).to(dtype), g.to(dtype)


def product(phi):
    return lambda v: torch.einsum("bij,bi->bj", phi, v)


def exact(phi, g):
    return torch.linalg.solve((torch.eye(g.shape[1], dtype=g.dtype) - phi).mT, g)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_agrees_with_dense_solve_where_lfpi_converges(name, rho):
    phi, g = phi_with_radius(rho)
    v, info = SOLVERS[name](product(phi), g)
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gmres", "direct", "auto"])
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


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "direct", "auto", "lfpi"])
def test_one_variable_and_contraction_one_half(name):
    """U = 0.5 x + c with n = 1: the Krylov space is exhausted after one vector."""
    g = torch.tensor([[3.0], [-1.0]], dtype=torch.float64)
    v, info = SOLVERS[name](lambda v: 0.5 * v, g)
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


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "direct", "auto", "lfpi"])
def test_singular_sample_is_reported_and_spoils_nothing(name):
    phi, g = phi_with_radius(0.5, batch=3)
    phi[1] = torch.eye(12)
    v, info = SOLVERS[name](product(phi), g)
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
        v, info = solver(refuse, g, lambda: phi)
        assert info.ok.all()
        torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "direct", "auto", "lfpi"])
def test_float32_and_empty_batch(name):
    solver = ls.linear_solver(name.split()[0])
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.GMRES(tol=0.0), r"GMRES\(tol=0.0\)"),
        (lambda: ls.LFPI(max_iter=0), r"LFPI\(max_iter=0\)"),
        (lambda: ls.GMRES(restart=0), r"GMRES\(restart=0\)"),
        (lambda: ls.Direct(tol=2.0), r"Direct\(tol=2.0\)"),
        (lambda: ls.linear_solver("gmers"), "linear_solver='gmers' is unknown; choose one of"),
        (lambda: ls.linear_solver(3), "linear_solver=3 is not callable"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
