"""Smooth programs (objective, inequalities, equalities), their start and random parameters, for the tests of NLP."""

import torch

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
