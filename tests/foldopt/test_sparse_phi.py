"""Folding with a sparse Phi: an implicit Euler step of reaction and diffusion, and resistor networks."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch
from torch.func import jacfwd, jacrev, vmap

import foldopt
from foldopt import linear_solve as ls
from foldopt.errors import InputError, LinearSolveError, MissingDependencyError
from tests.foldopt.sparse_programs import to_torch

F64 = torch.float64


def laplacian(k):
    """Return that of a k x k grid with zero walls, scipy's csr."""
    line = sp.diags([np.ones(k - 1), -2 * np.ones(k), np.ones(k - 1)], [-1, 0, 1])
    return (sp.kron(line, sp.identity(k)) + sp.kron(sp.identity(k), line)).tocsr()


class Reaction:
    """Picard's step for u = c + dt (Delta u - kappa u^3): its spectral radius is far above 1."""

    def __init__(self, k, dt=3.0, layout="coo"):
        self.k, self.dt, self.layout = k, dt, layout
        self.pattern = to_torch(laplacian(k)).coalesce()

    def __call__(self, u, c, kappa):
        grid = torch.nn.functional.pad(u.view(-1, self.k, self.k), (1, 1, 1, 1))
        around = grid[:, 2:, 1:-1] + grid[:, :-2, 1:-1] + grid[:, 1:-1, 2:] + grid[:, 1:-1, :-2]
        return c + self.dt * (around.reshape(u.shape) - 4 * u - kappa * u**3)

    def jacobian(self, u, c, kappa):
        places, values = self.pattern.indices(), self.pattern.values().to(u)
        batch, n = u.shape
        slopes = -3 * kappa * u**2
        on_diagonal = places[0] == places[1]
        entries = self.dt * (values.expand(batch, -1) + torch.where(on_diagonal, slopes[:, places[0]], 0))
        if self.layout == "dense":
            out = u.new_zeros(batch, n, n)
            out[:, places[0], places[1]] = entries
            return out
        sample = torch.arange(batch).repeat_interleave(places.shape[1])
        where = torch.cat([sample[None], places.repeat(1, batch)])
        coo = torch.sparse_coo_tensor(where, entries.flatten(), (batch, n, n))
        if self.layout == "twice":  # every place twice, in no order
            order = torch.randperm(2 * where.shape[1], generator=torch.Generator().manual_seed(0))
            halves = (entries.flatten() / 2).repeat(2)
            return torch.sparse_coo_tensor(where.repeat(1, 2)[:, order], halves[order], (batch, n, n))
        dense = {"csr": "to_sparse_csr", "csc": "to_sparse_csc"}.get(self.layout)
        return coo if dense is None else getattr(coo.to_dense(), dense)()


def equilibrium(step):
    """Return a solver by Newton's method, one sample at a time, in scipy."""

    def solve(c, kappa):
        A = sp.identity(c.shape[1]) - step.dt * laplacian(step.k)
        found = []
        for b, weight in zip(c.double().numpy(), kappa.double().expand_as(c).numpy(), strict=True):
            u = np.zeros_like(b)
            for _ in range(60):
                r = A @ u + step.dt * weight * u**3 - b
                if np.abs(r).max() < 1e-13:
                    break
                u = u - spl.spsolve((A + sp.diags(3 * step.dt * weight * u**2)).tocsc(), r)
            found.append(torch.from_numpy(u))
        return torch.stack(found).to(c)

    return solve


def layer_of(k, layout="coo", **options):
    step = Reaction(k, layout=layout)
    return foldopt.fold(equilibrium(step), step, **options)


def inputs(k, batch=3, dtype=F64):
    gen = torch.Generator().manual_seed(0)
    c = 20 * torch.randn(batch, k * k, generator=gen, dtype=F64)
    kappa = 0.5 + torch.rand(batch, 1, generator=gen, dtype=F64)
    return c.to(dtype).requires_grad_(), kappa.to(dtype).requires_grad_()


@pytest.mark.parametrize("solver", ["auto", "direct", "least_squares"])
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "twice"])
def test_sparse_and_dense_give_the_same_gradients(layout, solver):
    c, kappa = inputs(5)
    gradients = []
    for kind in (layout, "dense"):
        layer = layer_of(5, kind, linear_solver=solver)
        gradients.append(torch.autograd.grad(layer(c, kappa).sin().sum(), (c, kappa)))
        assert layer.last.backward.ok.all()
        assert not layer.last.backward.fallback.any()
        assert layer.last.backward.residual.max() < 1e-13
    for sparse, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    layer, (c, kappa) = layer_of(5), inputs(5)
    weights = torch.linspace(-1, 1, 25, dtype=F64)
    grads = torch.autograd.grad((layer(c, kappa) * weights).sum(), (c, kappa))
    solve, eps = equilibrium(Reaction(5)), 1e-5
    for i, grad in enumerate(grads):
        gen = torch.Generator().manual_seed(i)
        direction = torch.randn(grad.shape, generator=gen, dtype=F64)
        ends = []
        for side in (1, -1):
            moved = [p.detach() + side * eps * direction * (i == j) for j, p in enumerate((c, kappa))]
            ends.append((solve(*moved) * weights).sum())
        slope = (ends[0] - ends[1]) / (2 * eps)
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-7, atol=1e-7)


def test_higher_derivatives_and_transforms():
    layer, params = layer_of(3), inputs(3, batch=2)
    assert torch.autograd.gradcheck(layer, params, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, params)
    dense, plain = layer_of(3, "dense"), tuple(p.detach() for p in params)
    expected = jacrev(dense, (0, 1))(*plain)
    for jacobian in (jacrev(layer, (0, 1)), jacfwd(layer, (0, 1))):
        for a, b in zip(jacobian(*plain), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    many = torch.stack([plain[0], 2 * plain[0]])
    found = vmap(jacrev(lambda c: layer(c, plain[1]).sum()))(many)
    for c, gradient in zip(many, found, strict=True):
        torch.testing.assert_close(gradient, jacrev(lambda c: dense(c, plain[1]).sum())(c), rtol=1e-12, atol=1e-12)
    hessian = torch.func.hessian(lambda k: layer(plain[0], k).sum())(plain[1])
    torch.testing.assert_close(
        hessian, torch.func.hessian(lambda k: dense(plain[0], k).sum())(plain[1]), rtol=1e-9, atol=1e-12
    )


def test_one_factorization_serves_every_derivative_at_a_point(monkeypatch):
    factored = []
    splu = spl.splu
    monkeypatch.setattr(spl, "splu", lambda *args, **kwargs: factored.append(1) or splu(*args, **kwargs))
    layer, (c, kappa) = layer_of(4), inputs(4)
    u = layer(c, kappa)
    for _ in range(3):
        (first,) = torch.autograd.grad(u.square().sum(), c, create_graph=True)
    torch.autograd.grad(first.square().sum(), (c, kappa))
    assert len(factored) == 3  # one for each sample
    assert layer.last.backward.method == "direct"


def test_a_matrix_shared_by_the_batch_is_factored_once(monkeypatch):
    factored = []
    splu = spl.splu
    monkeypatch.setattr(spl, "splu", lambda *args, **kwargs: factored.append(1) or splu(*args, **kwargs))

    class Diffusion(Reaction):
        def jacobian(self, u, c, kappa):
            return self.dt * self.pattern

    step = Diffusion(4)
    c, _ = inputs(4, batch=5)
    none = torch.zeros(5, 1, dtype=F64)
    for batch in (5, 1):
        factored.clear()
        grads = [
            torch.autograd.grad(foldopt.fold(equilibrium(step), one)(c[:batch], none[:batch]).cos().sum(), c)[0]
            for one in (step, Reaction(4, layout="dense"))
        ]
        assert len(factored) == 1
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_float32_in_and_out():
    c, kappa = inputs(5, dtype=torch.float32)
    exact = torch.autograd.grad(layer_of(5)(c.double(), kappa.double()).sum(), (c, kappa))
    for options in ({}, {"dtype": F64}):
        layer = layer_of(5, **options)
        u = layer(c, kappa)
        found = torch.autograd.grad(u.sum(), (c, kappa))
        assert u.dtype == found[0].dtype == torch.float32
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def direct_case(matrices, g, solver=None):
    phi = ls.Phi(lambda: torch.stack([torch.eye(len(m), dtype=F64) - m for m in matrices]).to_sparse_coo())
    v, info = (solver or ls.Auto())(None, g, phi)
    left = g - torch.stack([m.T @ x for m, x in zip(matrices, v, strict=True)])
    return v, info, left


def test_defective_matrices_need_least_squares():
    """A shift does not help where zero is an eigenvalue with a Jordan block."""
    nilpotent = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 2]], dtype=F64)
    regular = torch.tensor([[3, 1, 0], [0, 1, 0], [1, 0, 2]], dtype=F64)
    g = torch.tensor([[0, 4, 2], [1, 2, 3]], dtype=F64)
    _, info, left = direct_case([nilpotent, regular], g)
    assert info.ok.all()
    assert left.abs().max() < 1e-12
    assert info.fallback.tolist() == [True, False]
    _, info, _ = direct_case([nilpotent, regular], g, ls.Direct())
    assert info.ok.tolist() == [False, True]
    _, info, _ = direct_case([nilpotent, regular], torch.ones(2, 3, dtype=F64))
    assert info.ok.tolist() == [False, True]


def test_numbers_that_are_not_finite_stay_in_their_sample():
    nan = torch.eye(3, dtype=F64) * torch.nan
    good = torch.tensor([[2, 1, 0], [0, 1, 0], [1, 0, 2]], dtype=F64)
    g = torch.ones(3, 3, dtype=F64)
    v, info, left = direct_case([good, nan, good], g)
    assert info.ok.tolist() == [True, False, True]
    assert left[[0, 2]].abs().max() < 1e-14
    assert torch.equal(v[0], v[2])


@pytest.mark.parametrize("layout", ["coo", "dense"])
def test_a_closed_form_that_is_not_that_of_the_step_is_found_out(layout):
    """The transpose of Phi, which is the likeliest mistake."""

    class Convection(Reaction):
        def __call__(self, u, c, kappa):
            return super().__call__(u, c, kappa) + self.dt * torch.nn.functional.pad(u[:, 1:] - u[:, :-1], (0, 1))

        def jacobian(self, u, c, kappa):
            n = u.shape[1]
            upwind = torch.zeros(n, n, dtype=F64)
            upwind.diagonal(1)[:] = 1
            upwind.diagonal()[:-1] = -1
            phi = (Reaction(self.k, self.dt, "dense").jacobian(u, c, kappa) + self.dt * upwind).mT
            return phi if self.layout == "dense" else phi.to_sparse()

    step = Convection(3, layout=layout)
    c, kappa = inputs(3)

    def solve(c, kappa):
        u = torch.zeros_like(c)
        for _ in range(15):
            r = step(u, c, kappa) - u
            J = torch.stack([x.T for x in step.jacobian(u, c, kappa).to_dense()]) - torch.eye(9, dtype=F64)
            u = u - torch.linalg.solve(J, r)
        return u

    layer = foldopt.fold(solve, step)
    with pytest.raises(LinearSolveError, match="method jacobian returns is not the derivative dU/dx"):
        layer(c, kappa).sum().backward()
    with pytest.raises(LinearSolveError, match="method jacobian returns is not the derivative dU/dx"):
        torch.func.jvp(layer, (c.detach(), kappa.detach()), (torch.ones_like(c), torch.ones_like(kappa)))
    right = foldopt.fold(solve, lambda u, c, kappa: step(u, c, kappa))
    right(c, kappa).sum().backward()
    assert right.last.backward.ok.all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9,), r"sparse tensor of shape \(9,\), expected \(B, N, N\), or \(N, N\)"),
        ((9, 8), r"sparse tensor of shape \(9, 8\)"),
        ((8, 8), r"sparse matrices 8 x 8 for 1 samples, but the state has 9 numbers in each of 3 samples"),
        (
            (2, 9, 9),
            r"for 2 samples, but the state has 9 numbers in each of 3 samples; return \(3, 9, 9\), or \(9, 9\)",
        ),
    ],
)
def test_wrong_shapes_are_named(shape, message):
    step = Reaction(3)
    step.jacobian = lambda u, c, kappa: torch.zeros(shape, dtype=F64).to_sparse_coo()
    with pytest.raises(InputError, match=message):
        foldopt.fold(equilibrium(step), step)(*inputs(3)).sum().backward()


def test_dense_dimensions_are_refused():
    step = Reaction(3)
    step.jacobian = lambda u, c, kappa: torch.zeros(3, 9, 9, dtype=F64).to_sparse(2)
    with pytest.raises(InputError, match="every dimension of Phi has to be sparse"):
        foldopt.fold(equilibrium(step), step)(*inputs(3)).sum().backward()


def test_nothing_large_is_made_dense():
    n = 20_000
    phi = ls.Phi(lambda: to_torch(0.5 * sp.identity(n, format="csr")))
    g = torch.ones(2, n, dtype=F64)
    v, info = ls.Direct()(None, g, phi)
    assert info.ok.all()
    assert torch.equal(v, 2 * g)
    message = r"would make the sparse Phi dense: 2 x 20000 x 20000 numbers, 6.4 GB, more than the 4.3 GB it may take"
    with pytest.raises(InputError, match=message):
        ls.LeastSquares()(None, g, phi)


def test_without_scipy_the_extra_is_named(monkeypatch):
    c, kappa = inputs(3)
    u = layer_of(3)(c, kappa)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingDependencyError, match=r"a sparse Phi needs scipy: pip install 'foldopt\[qp\]'"):
        u.sum().backward()


LARGE = """
import sys
sys.path.insert(0, {root!r})
from tests.foldopt.test_sparse_phi import *
k = 142
layer = layer_of(k)
c, kappa = inputs(k, batch=2)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB; ru_maxrss is the parent's
before = peak()
u = layer(c, kappa)
(grad,) = torch.autograd.grad(u[:, ::7].sum(), c)
print((peak() - before) / 1024)
g = np.zeros(k * k)
g[::7] = 1
for row, x, weight in zip(grad, u.detach().numpy(), kappa.detach().numpy()):
    A = sp.identity(k * k) - layer.update.dt * laplacian(k) + sp.diags(3 * layer.update.dt * weight * x**2)
    expected = torch.from_numpy(spl.spsolve(A.T.tocsc(), g))
    torch.testing.assert_close(row, expected, rtol=1e-11, atol=1e-13)
assert layer.last.backward.method == "direct"
"""


@pytest.mark.slow
def test_a_state_of_20000_numbers_takes_memory_for_its_factors_only(request):
    """A dense Phi of one sample would take 3.2 GB; the factors of both samples have some 2 million entries."""
    script = LARGE.format(root=str(request.config.rootpath))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
