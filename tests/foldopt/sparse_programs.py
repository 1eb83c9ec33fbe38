"""Smooth programs with sparse derivatives, and `NLPLayer` of them with a dense and with a sparse KKT system."""

import numpy as np
import torch

import foldopt
from tests.foldopt.programs import F64


def chain(x, c):
    return 0.25 * (x**4).sum(1) + 0.5 * ((x[:, 1:] - x[:, :-1]) ** 2).sum(1) + (x * c).sum(1)


def saddle(x, c):
    return (x * c).sum(1) - 0.5 * (x**2).sum(1) + 0.5 * (x[:, :1] * x).sum(1)


def total(x, c):
    return x.sum(1, keepdim=True) - c[:, :1]


def square(x, c):
    return x**2 - 1


def spheres(x, c):
    return (x.view(len(x), -1, 3) ** 2).sum(2) - 1 - 0.2 * c[:, ::3].tanh()


PROGRAMS = {
    "no constraints": (chain, None, None),
    "equality": (chain, None, total),
    "inequalities": (chain, square, None),
    "both": (chain, square, total),
    "curved equalities": (chain, square, spheres),
    "indefinite Hessian": (saddle, square, total),
}


def problem(name, n=9, batch=3):
    """Return a dense layer, a sparse one in front of which it stands, and their parameter."""
    objective, inequalities, equalities = PROGRAMS[name]
    c = 2 * torch.randn(batch, n, generator=torch.Generator().manual_seed(3), dtype=F64)
    dense = foldopt.NLPLayer(objective, inequalities, equalities, start=lambda c: 0.5 - 0.1 * c)

    def solver(c):
        x = dense(c).detach()
        return (x, *dense.multipliers)

    sparse = foldopt.NLPLayer(objective, inequalities, equalities, solver=solver, sparsity=True)
    return dense, sparse, c.requires_grad_()


def shared_state(name="both", **options):
    """Return a layer that is given its solution, and that solution."""
    dense, _, c = problem(name)
    x = dense(c).detach()
    state = [x, *dense.multipliers]
    objective, inequalities, equalities = PROGRAMS[name]
    options = {"sparsity": True, **options}
    return foldopt.NLPLayer(objective, inequalities, equalities, solver=lambda c: tuple(state), **options), state, c


def to_torch(matrix):
    """A SciPy matrix as a torch one, COO."""
    coo = matrix.tocoo()
    places = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    return torch.sparse_coo_tensor(places, torch.from_numpy(coo.data), coo.shape, check_invariants=True)
