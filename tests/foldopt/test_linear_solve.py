"""Every solver of v = Phi^T v + g against a dense solve, sample by sample."""

import pytest
import torch

import foldopt
from foldopt import linear_solve as ls
from foldopt.errors import InputError, LinearSolveError

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


WARM = [ls.LFPI(), ls.Anderson(), ls.GMRES(), ls.BiCGSTAB()]


@pytest.mark.parametrize("inner", WARM, ids=lambda s: type(s).__name__)
def test_warm_start_saves_products_when_little_has_changed(inner):
    phi, g = phi_with_radius(0.9, n=60)
    noise, other = phi_with_radius(1e-6, n=60, seed=5)
    solver = ls.WarmStart(inner)
    cold = solver(product(phi), g)[1]
    v, warm = solver(product(phi + noise), g + 1e-6 * other)
    assert warm.ok.all()
    assert (warm.iterations < cold.iterations).all()
    torch.testing.assert_close(v, exact(phi + noise, g + 1e-6 * other), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inner", WARM, ids=lambda s: type(s).__name__)
def test_warm_start_is_right_whatever_it_remembers(inner):
    phi, g = phi_with_radius(0.8)
    solver = ls.WarmStart(inner)
    for factor in (1.0, -1e6, 1e-6):
        v, info = solver(product(phi), factor * g)
        assert info.ok.all()
        torch.testing.assert_close(v, exact(phi, factor * g), rtol=1e-7, atol=1e-7 * abs(factor))
    for batch, n, dtype in (
        (3, 12, torch.float64),
        (16, 5, torch.float64),
        (16, 5, torch.float32),
        (0, 5, torch.float32),
    ):
        small, h = phi_with_radius(0.8, batch=max(batch, 1), n=n, dtype=dtype)
        small, h = small[:batch], h[:batch]
        v, info = solver(product(small), h)
        assert info.ok.all()
        torch.testing.assert_close(v, exact(small, h), rtol=1e-3, atol=1e-3)


def test_warm_start_knows_samples_by_their_indices():
    phi, g = phi_with_radius(0.9, batch=8, n=60)
    solver = ls.WarmStart(ls.GMRES())
    for chosen in (torch.tensor([6, 0, 3]), torch.tensor([1, 2])):
        with solver.samples(chosen):
            assert int(solver(product(phi[chosen]), g[chosen])[1].iterations.min()) > 5
    mixed = torch.tensor([3, 5, 1])
    with solver.samples(mixed):
        info = solver(product(phi[mixed]), g[mixed])[1]
    assert (info.iterations == 1).tolist() == [True, False, True]


def test_warm_start_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="does not start from anything"):
        ls.WarmStart(ls.Direct())
    solver = ls.WarmStart(ls.GMRES())
    phi, g = phi_with_radius(0.5)
    with solver.samples(torch.arange(3)), pytest.raises(InputError, match="3 indices, but the batch has 16"):
        solver(product(phi), g)
    with pytest.raises(InputError, match=r"expected \(B,\) whole numbers"), solver.samples(torch.tensor([0.5])):
        pass


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


def averaged(size):
    """v -> Phi^T v of Jacobi's step for Poisson's equation on a grid: the mean of the four neighbours, 0 outside."""

    def product(v):
        u = torch.nn.functional.pad(v.view(-1, 1, size, size), (1, 1, 1, 1))
        return ((u[..., 2:, 1:-1] + u[..., :-2, 1:-1] + u[..., 1:-1, 2:] + u[..., 1:-1, :-2]) / 4).flatten(1)

    return product


def by_sines(g):
    """The v that solves v = Phi^T v + g for that step: Phi is diagonal in sines."""
    size = round(g.shape[1] ** 0.5)
    angles = torch.pi * torch.arange(1, size + 1, dtype=torch.float64) / (size + 1)
    sines = (2 / (size + 1)) ** 0.5 * (angles[:, None] * torch.arange(1, size + 1)).sin()
    values = 1 - (angles.cos()[:, None] + angles.cos()) / 2
    return (sines @ ((sines @ g.view(-1, size, size) @ sines) / values) @ sines).flatten(1)


def on_the_grid(size, batch=1):
    g = torch.randn(batch, size**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return g, by_sines(g)


@pytest.fixture
def no_matrix(monkeypatch):
    def refuse(*_):
        raise AssertionError("no matrix is to be made")

    monkeypatch.setattr(ls.Phi, "_keep", refuse)


@pytest.mark.usefixtures("no_matrix")
@pytest.mark.parametrize("size", [46, 200])
def test_auto_solves_large_states_without_a_matrix(size):
    """46: just more numbers than BiCGSTAB takes products. 200: 40,000 numbers, a matrix of 12.8 GB."""
    g, v = on_the_grid(size)
    found, info = ls.Auto()(averaged(size), g)
    assert info.method == "gmres+bicgstab"
    assert info.ok.all()
    assert info.fallback.all()
    assert int(info.iterations) < 1500
    torch.testing.assert_close(found, v, rtol=0, atol=1e-9 * v.abs().max())


def test_auto_assembles_a_small_state_as_before():
    g, v = on_the_grid(44)
    found, info = ls.Auto()(averaged(44), g)
    assert info.method == "gmres+direct"
    torch.testing.assert_close(found, v, rtol=0, atol=1e-10)


def test_auto_goes_on_with_bicgstab_for_the_samples_that_gmres_left():
    """The first is an eigenvector, for which GMRES needs two products; one has a NaN."""
    g, v = on_the_grid(46, batch=3)
    wave = (torch.pi * torch.arange(1, 47, dtype=torch.float64) / 47).sin()
    g[0], g[2, 5] = torch.outer(wave, wave).flatten(), torch.nan
    v[0] = g[0] / (1 - torch.tensor(torch.pi / 47, dtype=torch.float64).cos())
    found, info = ls.Auto(max_bytes=1e6)(averaged(46), g)
    assert info.ok.tolist() == [True, True, False]
    assert info.fallback.tolist() == [False, True, False]
    assert int(info.iterations[0]) < 5
    torch.testing.assert_close(found[:2], v[:2], rtol=0, atol=1e-7)


def shifted(v):
    """Phi^T v for I - Phi a cyclic shift: no Krylov method makes progress before its last step."""
    return v - v.roll(1, 1)


def impulse(n, batch=1):
    g = torch.zeros(batch, n, dtype=torch.float64)
    g[:, 0] = 1
    return g


def test_auto_still_assembles_where_bicgstab_fails_too():
    g = impulse(2050)
    v, info = ls.Auto()(shifted, g)
    assert info.method == "gmres+bicgstab+direct"
    assert info.ok.all()
    torch.testing.assert_close(v, g.roll(-1, 1), rtol=0, atol=1e-12)


def test_auto_does_not_try_bicgstab_where_the_matrix_is_there_already():
    g = impulse(2050)
    phi = ls.Phi.assembled(shifted, g)
    phi.solve(g)
    _, info = ls.Auto()(shifted, g, phi)
    assert info.method == "gmres+direct"


@pytest.mark.usefixtures("no_matrix")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auto_gives_up_on_a_matrix_that_is_too_large_and_says_what_to_do(dtype):
    n = 12_000 if dtype == torch.float64 else 17_000
    v, info = ls.Auto()(shifted, impulse(n).to(dtype))
    assert info.ok.tolist() == [False]
    assert info.residual[0] > 0.1
    assert v.isfinite().all()
    assert info.method == "gmres+bicgstab"
    assert f"N = {n} numbers takes 1.2 GB" in info.remedy
    assert "linear_solver=BiCGSTAB(max_iter=20000)" in info.remedy
    assert ls.LinearSolveInfo.joined([info, info]).remedy == info.remedy


@pytest.mark.parametrize("left", [1, 3, 8])
def test_matrices_of_large_batches_are_assembled_in_parts(monkeypatch, left):
    """Of a batch of 8 some are hard for GMRES, the second singular, the third singular and without a solution."""
    n = 260
    eye = torch.eye(n, dtype=torch.float64)
    shift = eye.roll(1, 0)
    without_a_column = shift * (torch.arange(n) > 0)
    phi, g = 0.1 * eye.repeat(8, 1, 1), impulse(n, 8)
    for row, matrix in zip(range(left), [shift, without_a_column, without_a_column, *[shift] * 5], strict=False):
        phi[row] = eye - matrix
    g[1] = g[1].roll(5)
    sizes = []
    keep = ls.Phi._keep
    monkeypatch.setattr(ls.Phi, "_keep", lambda phi, *args: sizes.append(phi.nbytes) or keep(phi, *args))
    v, info = ls.Auto(max_bytes=3 * n * n * 8)(product(phi), g)
    assert max(sizes) == min(left, 3) * n * n * 8
    solved = [i != 2 or left < 3 for i in range(8)]
    assert info.ok.tolist() == solved
    assert info.fallback.tolist() == [i < left and solved[i] for i in range(8)]
    residual = (g + product(phi)(v) - v).norm(dim=1)
    assert residual[info.ok].max() < 1e-10
    torch.testing.assert_close(info.residual, residual, rtol=1e-3, atol=1e-12)
    whole, _ = ls.Auto()(product(phi), g)
    assert max(sizes) == 8 * n * n * 8
    torch.testing.assert_close(v, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("no_matrix")
@pytest.mark.parametrize("name", ["direct", "least_squares"])
def test_a_matrix_that_is_asked_for_and_too_large_is_refused_before_it_is_made(name):
    g = impulse(40_000)
    solver = ls.linear_solver(name)
    message = (
        rf"linear_solver='{name}' would assemble Phi from 40000 products: 1 x 40000 x 40000 numbers, 12.8 GB, more "
        r"than the 4.3 GB it may take. For a state of N = 40000 numbers choose linear_solver='auto', or BiCGSTAB"
    )
    with pytest.raises(InputError, match=message):
        solver(shifted, g)
    with pytest.raises(InputError, match=message):
        solver(shifted, g, ls.Phi.assembled(shifted, g).transposed())
    with pytest.raises(InputError, match=r"3 x 100 x 100 numbers, 0.0 GB, .* choose \w+\(max_bytes=...\)"):
        type(solver)(max_bytes=1e5)(shifted, impulse(100, 3))


def test_a_matrix_in_closed_form_has_no_limit():
    phi, g = phi_with_radius(3.0)
    v, info = ls.Direct(max_bytes=1)(None, g, ls.Phi(lambda: phi))
    assert info.ok.all()
    torch.testing.assert_close(v, exact(phi, g), rtol=1e-8, atol=1e-8)


def poisson_layer(size, **settings):
    return foldopt.fold(lambda c: by_sines(c / 4), lambda x, c: averaged(size)(x) + c / 4, **settings)


@pytest.mark.usefixtures("no_matrix")
def test_a_layer_of_40000_numbers_is_differentiated_without_a_matrix():
    w, v = on_the_grid(200)
    c = torch.zeros_like(w).requires_grad_()
    layer = poisson_layer(200)
    (gradient,) = torch.autograd.grad(layer(c), c, w)
    torch.testing.assert_close(gradient, v / 4, rtol=0, atol=1e-9 * v.abs().max())
    assert layer.last.backward.method == "gmres+bicgstab"
    tangent = torch.func.jvp(layer, (c.detach(),), (w,))[1]
    torch.testing.assert_close(tangent, v / 4, rtol=0, atol=1e-9 * v.abs().max())


@pytest.mark.usefixtures("no_matrix")
def test_policies_where_a_large_state_is_not_solved_and_refusals_where_a_matrix_is_asked_for():
    c = torch.zeros(2, 12_000, dtype=torch.float64, requires_grad=True)
    g = impulse(12_000, 2)
    g[1] = 0
    step = lambda x, c: shifted(x) + c  # noqa: E731
    solve = lambda c: c.roll(-1, 1)  # noqa: E731
    with pytest.raises(LinearSolveError, match=r"'gmres\+bicgstab' did not solve the adjoint equation") as caught:
        foldopt.fold(solve, step)(c).backward(g)
    assert caught.value.indices == (0,)
    for policy, fine in (("nan", torch.isnan), ("zero", lambda t: t == 0)):
        layer = foldopt.fold(solve, step, on_failure=policy)
        (gradient,) = torch.autograd.grad(layer(c), c, g)
        assert fine(gradient[0]).all()
        assert (gradient[1] == 0).all()
        assert layer.last.backward.remedy.startswith("Phi of a state of N = 12000 numbers takes 1.2 GB")
    for name in ("direct", "least_squares"):
        layer = foldopt.fold(solve, step, linear_solver=name, on_failure="zero")
        many = torch.zeros(4, 12_000, dtype=torch.float64, requires_grad=True)
        with pytest.raises(
            InputError, match=f"linear_solver='{name}' would assemble Phi from 12000 products: 4 x 12000"
        ):
            layer(many).sum().backward()
