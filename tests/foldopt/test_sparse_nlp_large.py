"""`NLPLayer` on programs of thousands of variables, against sparse systems made by hand."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch

import foldopt
from tests.foldopt.programs import F64


class Obstacle:
    """A membrane with a stiffening foundation over an obstacle: min 1/2 x'Ax + 1/4 sum x^4 - f'x, x >= psi."""

    def __init__(self, n):
        self.n = n
        k = round(n**0.5)
        line = sp.diags([-np.ones(k - 1), 2 * np.ones(k), -np.ones(k - 1)], [-1, 0, 1])
        self.k, self.A = k, (sp.kron(line, sp.identity(k)) + sp.kron(sp.identity(k), line)).tocsr()

    def objective(self, x, f, psi):
        grid = torch.nn.functional.pad(x.view(-1, self.k, self.k), (1, 1, 1, 1))
        across, down = grid[:, 1:] - grid[:, :-1], grid[:, :, 1:] - grid[:, :, :-1]
        return 0.5 * ((across**2).sum((1, 2)) + (down**2).sum((1, 2))) + (0.25 * x**4 - f * x).sum(1)

    def inequalities(self, x, f, psi):
        return psi - x

    def solve(self, f, psi):
        """Return (x, contact) of one sample by a primal-dual active set method in scipy."""
        x, lam = np.maximum(np.zeros(self.n), psi), np.zeros(self.n)
        for _ in range(100):
            held = lam + (psi - x) > 0
            free = ~held
            x = np.where(held, psi, x)
            r = self.A @ x + x**3 - f
            if np.abs(r[free]).max() < 1e-13 and (r[held] >= 0).all() and (x >= psi).all():
                return x, held
            K = (self.A + sp.diags(3 * x**2)).tocsr()[free][:, free]
            x[free] -= spl.spsolve(K.tocsc(), r[free])
            lam = np.where(held, self.A @ x + x**3 - f, 0)
        raise AssertionError("no convergence")

    def solver(self, f, psi):
        return torch.from_numpy(np.stack([self.solve(*pair)[0] for pair in zip(f.numpy(), psi.numpy(), strict=True)]))

    def inputs(self, batch=2):
        at = torch.arange(self.n, dtype=F64)
        row, column = at // self.k / self.k, at % self.k / self.k
        psi = 0.6 - 8 * ((row - 0.5) ** 2 + (column - 0.4) ** 2) + torch.zeros(batch, 1, dtype=F64)
        load = -0.02 * torch.arange(1, batch + 1, dtype=F64)[:, None] * (1 + column)
        return load.requires_grad_(), psi.requires_grad_()

    def gradients(self, x, held, g):
        """Return the gradients with respect to f and psi of g'x, by a sparse solve on the free nodes."""
        free = ~held
        K = (self.A + sp.diags(3 * x**2)).tocsr()
        v = np.zeros(self.n)
        v[free] = spl.spsolve(K[free][:, free].tocsc(), g[free])
        return v, np.where(held, g - K @ v, 0)


def test_an_obstacle_problem_of_2025_nodes():
    membrane = Obstacle(2025)
    layer = foldopt.NLPLayer(membrane.objective, membrane.inequalities, solver=membrane.solver, sparsity=True)
    f, psi = membrane.inputs()
    x = layer(f, psi)
    weights = torch.cos(torch.arange(membrane.n, dtype=F64))
    found = torch.autograd.grad((x * weights).sum(), (f, psi))
    assert layer.last.verdict == ("differentiable",) * 2
    for i in range(2):
        exact, held = membrane.solve(f.detach().numpy()[i], psi.detach().numpy()[i])
        assert 50 < held.sum() < 1500
        np.testing.assert_allclose(x.detach().numpy()[i], exact, rtol=1e-12, atol=1e-12)
        for grad, expected in zip(found, membrane.gradients(exact, held, weights.numpy()), strict=True):
            np.testing.assert_allclose(grad[i], expected, rtol=1e-11, atol=1e-11)
    assert layer.fold.update.sparsity.products[1] == 1
    assert layer.fold.update.sparsity.products[0] < 12


LARGE = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import scipy.sparse as sp
import torch
import foldopt
from foldopt._sparsity import Sparsity
from tests.foldopt.test_sparse_nlp_large import Obstacle
membrane = Obstacle(10_000)
f, psi = membrane.inputs(1)
membrane.solver(f.detach(), psi.detach())
places = Sparsity(membrane.A, sp.identity(membrane.n))
layer = foldopt.NLPLayer(membrane.objective, membrane.inequalities, solver=membrane.solver, sparsity=places)
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB; ru_maxrss is the parent's
before = peak()
x = layer(f, psi)
g = np.cos(np.arange(membrane.n))
found = torch.autograd.grad((x * torch.from_numpy(g)).sum(), (f, psi))
print((peak() - before) / 1024)
exact, held = membrane.solve(f.detach().numpy()[0], psi.detach().numpy()[0])
for grad, expected in zip(found, membrane.gradients(exact, held, g)):
    np.testing.assert_allclose(grad[0], expected, rtol=1e-10, atol=1e-10)
"""


@pytest.mark.slow
def test_10000_variables_take_memory_for_the_factors_only(request):
    """The Hessian alone would take 800 MB as a dense matrix, and the Jacobian again."""
    script = LARGE.format(root=str(request.config.rootpath))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300


class Pendulum:
    """Swing-up of a pendulum with a bounded torque, N steps of Euler: x = (angle, velocity, torque) for each step."""

    def __init__(self, steps):
        self.steps, self.dt = steps, 6 / steps

    def parts(self, x):
        return x.view(len(x), self.steps, 3).unbind(2)

    def objective(self, x, start, weight):
        angle, velocity, torque = self.parts(x)
        return self.dt * (0.5 * weight * (1 - angle.cos()) + 0.05 * velocity**2 + 0.1 * torque**2).sum(1)

    def equalities(self, x, start, weight):
        angle, velocity, torque = self.parts(x)
        before = [torch.cat([start[:, i : i + 1], part[:, :-1]], 1) for i, part in ((0, angle), (1, velocity))]
        moved = angle - before[0] - self.dt * velocity, velocity - before[1] - self.dt * (angle.sin() + torque)
        return torch.stack(moved, 2).flatten(1)

    def inequalities(self, x, start, weight):
        torque = self.parts(x)[2]
        return torch.cat([torque - 1.5, -torque - 1.5], 1)

    def solve(self, start, weight):
        """Return (z, nu, lam, K, at the bound) of one sample by Newton's method on an active set, in scipy."""
        N, dt, k = self.steps, self.dt, np.arange(self.steps)
        z, nu, lam = np.zeros((N, 3)), np.zeros(2 * N), np.zeros(N)
        z[:, 0] = start[0] * np.exp(-dt * k)
        a, v, u, of_a, of_v = 3 * k, 3 * k + 1, 3 * k + 2, 2 * k, 2 * k + 1
        for _ in range(40):
            angle, velocity, torque = z.T
            before = np.r_[start[0], angle[:-1]], np.r_[start[1], velocity[:-1]]
            h = [angle - before[0] - dt * velocity, velocity - before[1] - dt * (np.sin(angle) + torque)]
            one, less = np.ones(N), -np.ones(N - 1)
            entries = np.r_[one, -dt * one, less, one, -dt * np.cos(angle), -dt * one, less]
            rows = np.r_[of_a, of_a, of_a[1:], of_v, of_v, of_v, of_v[1:]]
            J = sp.csr_matrix((entries, (rows, np.r_[a, v, a[:-1], v, a, u, v[:-1]])), shape=(2 * N, 3 * N))
            slope = dt * np.stack([0.5 * weight * np.sin(angle), 0.1 * velocity, 0.2 * torque], 1).ravel() + J.T @ nu
            H = np.zeros((N, 3))
            H[:, 0] = dt * (0.5 * weight * np.cos(angle) + nu[1::2] * np.sin(angle))
            H[:, 1:] = 0.1 * dt, 0.2 * dt
            high, low = lam + torque > 1.5, lam + torque < -1.5
            held = high | low
            E = sp.identity(3 * N, format="csr")[u[held]]
            slope[u] += np.where(held, lam, 0)
            r = np.r_[slope, np.stack(h, 1).ravel(), (torque - np.where(high, 1.5, -1.5))[held]]
            K = sp.bmat([[sp.diags(H.ravel()), J.T, E.T], [J, None, None], [E, None, None]], format="csc")
            if np.abs(np.r_[r, lam[~held]]).max() < 1e-13:
                return z.ravel(), nu, lam, K, held
            step = spl.spsolve(K, -r)
            step *= 1 / max(1, np.abs(step[: 3 * N]).max())
            z = z + step[: 3 * N].reshape(N, 3)
            nu = nu + step[3 * N : 5 * N]
            lam = np.where(held, lam, 0)
            lam[held] += step[5 * N :]
        raise AssertionError("no convergence")


@pytest.mark.parametrize("multipliers", [True, False])
def test_optimal_control_of_2001_variables(multipliers):
    """Not convex: the Hessian of the Lagrangian has negative entries on its diagonal."""
    pendulum = Pendulum(667)
    start = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=F64, requires_grad=True)
    weight = torch.tensor([[2.0], [1.0]], dtype=F64, requires_grad=True)
    solved = [pendulum.solve(s, float(w)) for s, w in zip(start.detach().numpy(), weight, strict=True)]
    x, nu, lam = (torch.from_numpy(np.stack([one[i] for one in solved])) for i in range(3))
    state = (x, nu, torch.cat([lam.clamp(min=0), (-lam).clamp(min=0)], 1)) if multipliers else x
    layer = foldopt.NLPLayer(
        pendulum.objective, pendulum.inequalities, pendulum.equalities, solver=lambda *_: state, sparsity=True
    )
    weights = torch.cos(torch.arange(2001, dtype=F64))
    found = torch.autograd.grad((layer(start, weight) * weights).sum(), (start, weight))
    assert layer.last.verdict == ("differentiable",) * 2
    torch.testing.assert_close(layer.multipliers[0], nu, rtol=1e-9, atol=1e-9)
    curvature = solved[0][3].diagonal()[:2001]
    assert (curvature < 0).sum() > 100
    assert solved[0][4].sum() > 100
    for i, (z, _, _, K, _) in enumerate(solved):
        right = np.zeros(K.shape[0])
        right[:2001] = weights.numpy()
        v = spl.spsolve(K, right)
        np.testing.assert_allclose(found[0][i], v[2001:2003], rtol=1e-8)
        np.testing.assert_allclose(found[1][i], -0.5 * pendulum.dt * (v[0:2001:3] * np.sin(z[0::3])).sum(), rtol=1e-8)
