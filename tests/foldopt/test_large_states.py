"""The adjoint equation of large states: solved without a matrix, or refused before one is made."""

import pytest
import torch

import foldopt
from foldopt import linear_solve as ls
from foldopt.errors import InputError, LinearSolveError
from tests.foldopt.steps import exact, phi_with_radius, product


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
