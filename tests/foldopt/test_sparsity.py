"""The places of the entries of sparse derivatives: found from products, given by the user, or refused."""

import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foldopt
from foldopt import SmoothProgram
from foldopt._decompression import Decompression, Derivative
from foldopt._sparsity import Sparsity
from foldopt.errors import InputError, MissingDependencyError
from foldopt.qp.matrix import Pattern
from tests.foldopt.programs import F64
from tests.foldopt.sparse_programs import chain, shared_state


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 12), st.floats(0, 0.5))
def test_matrices_are_read_off_their_products(seed, m, n, density):
    rng = np.random.default_rng(seed)
    there = rng.random((m, n)) < density
    J = torch.from_numpy(np.where(there, rng.normal(size=(2, m, n)), 0))
    rows, columns = (torch.from_numpy(part) for part in np.nonzero(there))
    reading = Decompression(Pattern(rows, columns, (m, n)))
    products = Derivative(lambda s: (s[:, None] @ J)[:, 0], lambda t: (J @ t[:, :, None])[:, :, 0])
    found = reading.matrix(products, torch.zeros(2, 1, dtype=F64))
    for i in range(2):
        assert np.array_equal(found.to_scipy(i).toarray(), J[i].numpy())
    assert reading.products <= min(m, n)


@pytest.mark.parametrize(
    ("places", "most"),
    [
        (sp.diags([1.0, 1.0, 1.0], [-1, 0, 1], shape=(500, 500)), 3),
        (sp.bmat([[None, np.ones((1, 499))], [np.ones((499, 1)), sp.identity(499)]]), 3),  # an arrow
        (np.ones((1, 500)), 1),
        (np.ones((500, 1)), 1),
        (sp.kron(sp.identity(20), np.ones((25, 1))), 1),
        (sp.hstack([sp.kron(sp.identity(20), np.ones((25, 1))), sp.identity(500)]), 2),  # y_ij <= x_i
        (sp.vstack([np.ones((1, 500)), sp.identity(500)]), 2),
    ],
    ids=["tridiagonal", "arrow", "row", "column", "blocks", "groups", "sum and bounds"],
)
def test_few_products_are_enough(places, most):
    coo = sp.coo_matrix(places)
    rows, columns = (torch.from_numpy(part.astype(np.int64)) for part in (coo.row, coo.col))
    assert Decompression(Pattern(rows, columns, coo.shape)).products <= most


LINE = sp.diags([1.0, 1.0], [0, 1], shape=(9, 9))


@pytest.mark.parametrize("kind", ["scipy", "torch", "torch dense", "numpy"])
def test_the_places_may_be_given(kind):
    """One triangle of the Hessian is enough."""
    to = {
        "scipy": lambda M: M,
        "torch": lambda M: torch.from_numpy(M.toarray()).to_sparse_csr(),
        "torch dense": lambda M: torch.from_numpy(M.toarray() != 0),
        "numpy": lambda M: M.toarray(),
    }[kind]
    given = Sparsity(to(LINE + sp.identity(9)), to(sp.identity(9)), to(sp.coo_matrix(np.ones((1, 9)))))
    layer, _, c = shared_state(sparsity=given)
    (grad,) = torch.autograd.grad(layer(c).sin().sum(), c)
    found, _, _ = shared_state()
    torch.testing.assert_close(grad, torch.autograd.grad(found(c).sin().sum(), c)[0], rtol=1e-12, atol=1e-12)
    assert given.products == (3, 2)


@pytest.mark.parametrize(
    ("hessian", "inequalities", "equalities", "message"),
    [
        (sp.identity(9), sp.identity(9), np.ones((1, 9)), "sparsity= misses entries of the Hessian"),
        (LINE + sp.identity(9), sp.identity(9), np.eye(1, 9), "sparsity= misses entries of the Hessian"),
        (sp.identity(8), sp.identity(8), np.ones((1, 8)), "has 8 variables, 1 equalities and 8 inequalities, but"),
        (LINE, sp.identity(9), None, "has 9 variables, 0 equalities and 9 inequalities, but the program has 9, 1"),
    ],
)
def test_places_that_do_not_fit_are_refused(hessian, inequalities, equalities, message):
    layer, _, c = shared_state(sparsity=Sparsity(hessian, inequalities, equalities))
    with pytest.raises(InputError, match=message):
        layer(c)


def test_arguments_are_checked():
    with pytest.raises(InputError, match=r"equalities of shape \(1, 8\) does not fit a Hessian of 9 columns"):
        Sparsity(LINE, None, np.ones((1, 8)))
    with pytest.raises(InputError, match=r"hessian of shape \(8, 9\) does not fit"):
        Sparsity(np.ones((8, 9)))
    with pytest.raises(InputError, match=r"inequalities has shape \(9,\), expected a matrix"):
        Sparsity(LINE, np.ones(9))
    with pytest.raises(InputError, match="solver='sqp' works with dense matrices: with sparsity= take solver='ipopt'"):
        foldopt.NLPLayer(chain, sparsity=True, start=torch.zeros(9))
    with pytest.raises(InputError, match=r"stepsize=0.5: with sparsity= the step is a full one"):
        foldopt.f_sqp(SmoothProgram(chain), lambda c: c, stepsize=0.5, sparsity=True)
    with pytest.raises(InputError, match="degenerate='never' is unknown"):
        foldopt.f_sqp(SmoothProgram(chain), lambda c: c, degenerate="never", sparsity=True)
    with pytest.raises(InputError, match=r"sparse derivatives are those of a foldopt.SmoothProgram"):
        foldopt.f_sqp(object(), lambda c: c, sparsity=True)


def test_without_qdldl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdldl", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[qp\]'"):
        foldopt.NLPLayer(chain, solver=lambda c: c, sparsity=True)


def test_entries_that_come_up_later_are_found():
    """At the first call the weight of a coupling is zero."""

    def objective(x, c, w):
        return (0.5 * x**2 + x * c).sum(1) + w[:, 0] * x[:, 0] * x[:, 2]

    def solver(c, w):
        H = torch.eye(3, dtype=F64).repeat(len(c), 1, 1)
        H[:, 0, 2] = H[:, 2, 0] = w[:, 0]
        return torch.linalg.solve(H, -c)

    layer = foldopt.NLPLayer(objective, solver=solver, sparsity=True)
    c = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64, requires_grad=True)
    for weight, entries in ((0.0, 3), (0.5, 5)):
        w = torch.tensor([[weight]], dtype=F64, requires_grad=True)
        found = torch.autograd.grad(layer(c, w).cos().sum(), (c, w))
        expected = torch.autograd.grad(solver(c, w).cos().sum(), (c, w))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert len(layer.fold.update.sparsity.H.rows) == entries
