"""Sparse I - Phi that is singular, of a network whose potentials are free: found out, sample by sample."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch

import foldopt
from foldopt.errors import LinearSolveError
from tests.foldopt.sparse_programs import to_torch

F64 = torch.float64


class Network:
    """Potentials of a resistor network without a ground, u <- u - (L u - c): they are unique up to a constant."""

    def __init__(self, matrix):
        self.matrix = to_torch(matrix)

    def __call__(self, u, c):
        return u - (self.matrix @ u.T).T + c

    def jacobian(self, u, c):
        n = u.shape[1]
        eye = torch.sparse_coo_tensor(torch.arange(n).repeat(2, 1), torch.ones(n, dtype=F64), (n, n))
        return eye - self.matrix


def network(n):
    """Return the Laplacian of a strip of n nodes, three wide, with integer conductances: its null space is of ones."""
    rng = np.random.default_rng(0)
    a = np.concatenate([np.arange(n - 1), np.arange(n - 3)])
    b = np.concatenate([np.arange(1, n), np.arange(3, n)])
    W = sp.coo_matrix((rng.integers(1, 4, len(a)).astype(float), (a, b)), shape=(n, n)).tocsr()
    W = W + W.T
    return (sp.diags(np.asarray(W.sum(1)).ravel()) - W).tocsr()


def grounded(matrix):
    """Return a solver that puts the first node at zero."""
    lu = spl.splu(matrix[1:, 1:].tocsc())

    def solve(c):
        u = np.zeros(c.shape)
        u[:, 1:] = lu.solve(c.numpy()[:, 1:].T).T
        return torch.from_numpy(u)

    return solve


def currents(n, batch=3):
    c = torch.randint(-5, 6, (batch, n), generator=torch.Generator().manual_seed(1)).to(F64)
    c[:, 0] -= c.sum(1)
    return c.requires_grad_()


@pytest.mark.parametrize("n", [12, 20_000])
def test_a_singular_matrix_is_no_harm_where_the_equation_has_solutions(n):
    """Differences of potentials have a derivative along balanced currents."""
    matrix, c = network(n), currents(n)
    layer = foldopt.fold(grounded(matrix), Network(matrix))
    u = layer(c)
    (grad,) = torch.autograd.grad((u[:, 3] - u[:, 7]).sum(), c)
    g = np.zeros(n)
    g[3], g[7] = 1, -1
    expected = np.zeros(n)
    expected[1:] = spl.spsolve(matrix[1:, 1:].tocsc(), g[1:])
    along = grad - torch.from_numpy(expected)  # a constant, which balanced currents do not see
    assert (along - along[:, :1]).abs().max() < 1e-9
    assert layer.last.backward.ok.all()


@pytest.mark.parametrize("n", [12, 3_000])
@pytest.mark.parametrize("solver", ["auto", "direct"])
def test_a_singular_matrix_without_a_solution_is_reported(n, solver):
    matrix, c = network(n), currents(n)
    layer = foldopt.fold(grounded(matrix), Network(matrix), linear_solver=solver)
    with pytest.raises(LinearSolveError, match="linear solver 'direct") as caught:
        layer(c)[:, 3].sum().backward()
    assert caught.value.indices == (0, 1, 2)
    if solver == "auto" and n > 2000:
        assert f"The update's sparse Phi, {n} x {n}, makes I - Phi singular" in str(caught.value)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("policy", ["nan", "zero"])
def test_samples_without_a_solution_do_not_spoil_the_others(policy, batched):
    matrix, c = network(8), currents(8)
    step = Network(matrix)
    if batched:
        shared = step.jacobian
        step.jacobian = lambda u, c: torch.stack([shared(u, c)] * len(u))
    layer = foldopt.fold(grounded(matrix), step, on_failure=policy)
    u = layer(c)
    loss = (u[0, 3] - u[0, 5]) + u[1, 3] + (u[2, 3] - u[2, 5])
    (grad,) = torch.autograd.grad(loss, c)
    assert layer.last.backward.ok.tolist() == [True, False, True]
    assert grad[1].isnan().all() if policy == "nan" else (grad[1] == 0).all()
    assert (grad[0] - grad[2]).abs().max() == 0
    expected = spl.spsolve(matrix[1:, 1:].tocsc(), np.eye(7)[2] - np.eye(7)[4])
    torch.testing.assert_close((grad[0] - grad[0, 0])[1:], torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_an_empty_batch_and_a_pickled_layer():
    layer = pickle.loads(pickle.dumps(foldopt.fold(torch.zeros_like, Network(network(6)))))
    c = torch.zeros(0, 6, dtype=F64, requires_grad=True)
    layer(c).sum().backward()
    assert c.grad.shape == (0, 6)
