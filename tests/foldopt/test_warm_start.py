"""A linear solver that starts from its last answers: fewer products, and right whatever it remembers."""

import pytest
import torch

from foldopt import linear_solve as ls
from foldopt.errors import InputError
from tests.foldopt.steps import exact, phi_with_radius, product

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
    with pytest.raises(InputError, match="cannot start from a given v"):
        ls.WarmStart(ls.Direct())
    solver = ls.WarmStart(ls.GMRES())
    phi, g = phi_with_radius(0.5)
    with solver.samples(torch.arange(3)), pytest.raises(InputError, match="3 indices, but the batch has 16"):
        solver(product(phi), g)
    with pytest.raises(InputError, match=r"expected \(B,\) whole numbers"), solver.samples(torch.tensor([0.5])):
        pass
