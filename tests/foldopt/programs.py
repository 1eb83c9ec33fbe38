"""Smooth programs (objective, inequalities, equalities), their start and random parameters, for the tests of NLP."""

import torch

from foldopt.solvers.qp import solve_qp

F64 = torch.float64


def _none(x):
    return x.new_zeros(len(x), 0)


def quadratic(x, Q, q):
    return torch.einsum("bi,bij,bj->b", x, Q, x) / 2 + (q * x).sum(1)


def _symmetric(batch, n, gen):
    Q = torch.randn(batch, n, n, generator=gen, dtype=F64)
    return (Q + Q.mT) / 2, torch.randn(batch, n, generator=gen, dtype=F64)


def hock_schittkowski_71(batch, gen):
    """Nonconvex in objective and constraints; an inequality, an equality and bounds (Hock and Schittkowski, 1981)."""
    return (
        lambda x, c: x[:, 0] * x[:, 3] * (x[:, 0] + x[:, 1] + x[:, 2]) + x[:, 2],
        lambda x, c: torch.cat([c[:, :1] - x.prod(1, keepdim=True), 1 - x, x - 5], 1),
        lambda x, c: x.square().sum(1, keepdim=True) - c[:, 1:],
        torch.tensor([1.0, 5.0, 5.0, 1.0], dtype=F64),
        [torch.tensor([25.0, 40.0], dtype=F64) + torch.rand(batch, 2, generator=gen, dtype=F64)],
    )


def rosenbrock_in_a_disc(batch, gen):
    return (
        lambda x, c: (c[:, 0] - x[:, 0]).square() + 10 * c[:, 1] * (x[:, 1] - x[:, 0].square()).square(),
        lambda x, c: x.square().sum(1, keepdim=True) - 1.5,
        None,
        torch.zeros(2, dtype=F64),
        [0.2 + 2 * torch.rand(batch, 2, generator=gen, dtype=F64)],
    )


def indefinite_on_a_sphere(batch, gen):
    """A trust-region problem: the Hessian is indefinite and the equality is not convex."""
    Q, q = _symmetric(batch, 6, gen)
    return (
        quadratic,
        None,
        lambda x, Q, q: x.square().sum(1, keepdim=True) - 1,
        torch.randn(batch, 6, generator=gen, dtype=F64),
        [Q, q],
    )


def indefinite_in_a_box(batch, gen):
    Q, q = _symmetric(batch, 5, gen)
    return (
        quadratic,
        lambda x, Q, q: torch.cat([x - 1, -x], 1),
        None,
        torch.full((5,), 0.5, dtype=F64),
        [Q, q],
    )


def outside_a_disc(batch, gen):
    """At the start the linearized constraints contradict each other: the step has to relax them."""
    return (
        lambda x, c: (x - c).square().sum(1),
        lambda x, c: torch.cat([1 - x.square().sum(1, keepdim=True), x - 2], 1),
        None,
        torch.full((2,), 0.01, dtype=F64),
        [0.1 + 0.4 * torch.rand(batch, 2, generator=gen, dtype=F64)],
    )


PROGRAMS = [
    hock_schittkowski_71,
    rosenbrock_in_a_disc,
    indefinite_on_a_sphere,
    indefinite_in_a_box,
    outside_a_disc,
]


def made(program, batch=20, seed=0):
    return program(batch, torch.Generator().manual_seed(seed))


def newton(equations, z, *params):
    """The root of equations(z, *params) = 0, (B, N), by one step at `z`, which is one: differentiable by its inverse.

    This is the implicit function theorem with a Jacobian by forward mode, which has nothing of folding.
    """
    with torch.no_grad():
        fixed = [p.detach() for p in params]
        columns = [
            torch.func.jvp(lambda z: equations(z, *fixed), (z,), (e.expand_as(z),))[1]
            for e in torch.eye(z.shape[1], dtype=z.dtype)
        ]
        J = torch.stack(columns, 2)
    return z - torch.linalg.solve(J, equations(z, *params)[:, :, None])[:, :, 0]


def solution_by_kkt(program, x, nu, lam, *params):
    """The solution as a differentiable function: stationarity, equalities, active inequalities (else lam = 0)."""
    active = lam > -program.values(x, *(p.detach() for p in params))[2]

    def lagrangian(x, nu, lam, *c):
        f, h, g = program.values(x, *c)
        return (f + (nu * h).sum(1) + (lam * g).sum(1)).sum()

    def equations(z, *c):
        x, nu_, lam_ = z.split([x_.shape[1] for x_ in parts], 1)
        stationarity = torch.func.grad(lambda y: lagrangian(y, nu_, lam_, *c))(x)
        _, h, g = program.values(x, *c)
        return torch.cat([stationarity, h, torch.where(active, g, lam_)], 1)

    parts = x, nu, lam
    return newton(equations, torch.cat(parts, 1), *params)[:, : x.shape[1]]


def quadratic_programs(B=200, n=8, m=10, k=2, seed=0):
    """Shared Q, G, A and b; p and h of each sample."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    root, G, A, inside = normal(n, n), normal(m, n), normal(k, n), normal(n)
    h = G @ inside + 0.2 + torch.rand(B, m, generator=g, dtype=F64)
    Q = root @ root.T / n + 0.1 * torch.eye(n, dtype=F64)
    return [t.requires_grad_() for t in (Q, normal(B, n), G, h, A, A @ inside)]


def solve_by_kkt(Q, p, G, h, A, b):
    B, n = p.shape
    parts = Q.expand(B, n, n), p, A.expand(B, *A.shape[-2:]), b.expand(B, len(b)), G.expand(B, *G.shape[-2:]), h
    found = solve_qp(*parts)
    assert found.ok.all()
    return found
