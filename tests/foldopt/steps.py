"""Steps and solvers whose derivatives are known, and random Phi with exact adjoints, for the tests of folding."""

import torch

F64 = torch.float64


def heron(x, c):
    return 0.5 * (x + c / x)


def tanh_step(x, c, W):
    return torch.tanh(x @ W + c)


def iterate(step, steps=400):
    def solve(*params):
        x = torch.zeros_like(params[0])
        for _ in range(steps):
            x = step(x, *params)
        return x

    return solve


def problem(batch=3, n=4, seed=0, scale=0.3):
    gen = torch.Generator().manual_seed(seed)
    c = torch.randn(batch, n, generator=gen, dtype=F64).requires_grad_()
    W = (scale * torch.randn(n, n, generator=gen, dtype=F64)).requires_grad_()
    return c, W


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
