"""The table of problems by which layers are judged: random instances, a layer, its exact solution by other means."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import foldopt
from foldopt import projections, prox
from foldopt.solvers.qp import solve_qp
from tests.foldopt import programs, steps
from tests.foldopt.programs import F64, quadratic


@dataclass(frozen=True)
class Case:
    """One row.

    params(gen, B): random parameters in float64, batched ones of length B and shared ones. layer(**options): the layer.
    exact(*params): the solution as a differentiable function that knows nothing of folding.
    unrolled(*params): the solution by many recorded steps from elsewhere, None where the step does not converge.
    unsolved: linear solvers that cannot solve its adjoint equation.
    symmetric: places of the parameters that are symmetric matrices, of whose gradient only that part counts.
    batched: places of the batched parameters.
    """

    params: Callable
    layer: Callable
    exact: Callable
    unrolled: Callable | None
    batched: tuple[int, ...]
    unsolved: tuple[str, ...] = ()
    symmetric: tuple[int, ...] = ()


def normal(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=F64)


def definite(gen, *shape, least=0.1):
    root = normal(gen, *shape, shape[-1])
    return root @ root.mT / shape[-1] + least * torch.eye(shape[-1], dtype=F64)


def kkt(Q, p, G, h, A, b):
    """The solution of a QP, differentiable through the linear system of its active constraints."""
    B = len(p)
    found = solve_qp(*(t.expand(B, *t.shape[-d:]) for t, d in ((Q, 2), (p, 1), (A, 2), (b, 1), (G, 2), (h, 1))))
    assert found.ok.all()
    return found.x


def sparse_coding():
    def step(x, c, w):
        return prox.soft_threshold(x - 0.5 * (x - c), 0.5 * w)

    return Case(
        params=lambda gen, B: [normal(gen, B, 6), torch.tensor(0.5, dtype=F64)],
        layer=lambda **options: foldopt.fold(prox.soft_threshold, step, **options),
        exact=lambda c, w: c.sign() * torch.relu(c.abs() - w),
        unrolled=foldopt.unroll(lambda c, w: torch.zeros_like(c), step, iterations=60),
        batched=(0,),
    )


def equation():
    """x = tanh(W x + c), the deep equilibrium of one layer."""
    solve = steps.iterate(steps.tanh_step)

    def exact(c, W):
        return programs.newton(lambda x, c, W: x - steps.tanh_step(x, c, W), solve(c.detach(), W.detach()), c, W)

    return Case(
        params=lambda gen, B: [normal(gen, B, 6), 0.3 * normal(gen, 6, 6)],
        layer=lambda **options: foldopt.fold(solve, steps.tanh_step, **options),
        exact=exact,
        unrolled=foldopt.unroll(lambda c, W: torch.zeros_like(c), steps.tanh_step, iterations=400),
        batched=(0,),
    )


def on_the_simplex(H, q):
    n = q.shape[1]
    bounds = -torch.eye(n).to(q), q.new_zeros(n)
    return kkt((H + H.mT) / 2, q, *bounds, q.new_ones(1, n), q.new_ones(1))


def simplex():
    update = foldopt.ProjectedGradient(quadratic, lambda x, H, q: projections.simplex(x), 0.2)
    return Case(
        params=lambda gen, B: [definite(gen, B, 5), normal(gen, B, 5)],
        layer=lambda **options: foldopt.fold(on_the_simplex, update, **options),
        exact=on_the_simplex,
        unrolled=foldopt.unroll(lambda H, q: torch.full_like(q, 0.2), update, iterations=1500),
        batched=(0, 1),
        symmetric=(0,),
    )


def softmax():
    """Entropy on the simplex by a gradient step so long that iterating it diverges; its fixed point is the softmax."""
    update = foldopt.ProjectedGradient(
        lambda x, c: (x * x.log() - c * x).sum(1), lambda x, c: projections.simplex(x), 0.5
    )
    return Case(
        params=lambda gen, B: [normal(gen, B, 5)],
        layer=lambda **options: foldopt.fold(lambda c: c.softmax(1), update, **options),
        exact=lambda c: c.exp() / c.exp().sum(1, keepdim=True),
        unrolled=None,
        batched=(0,),
        unsolved=("lfpi",),
    )


def total_variation():
    def solve(D, d, weight):
        m = len(D)
        eye = torch.eye(m).to(d)
        box = torch.cat([eye, -eye]), weight.expand(2 * m)
        return kkt(D @ D.mT, d @ D.mT, *box, d.new_zeros(0, m), d.new_zeros(0))

    def operator(v, t, D, d, weight):
        return prox.soft_threshold(v, t * weight)

    def primal(w, D, d):
        return d + w @ D

    def params(gen, B):
        difference = torch.eye(8, dtype=F64)[:-1] - torch.eye(8, dtype=F64)[1:]
        return [difference + 0.1 * normal(gen, 7, 8), normal(gen, B, 8), torch.tensor(0.4, dtype=F64)]

    def unrolled(D, d, weight):
        step = foldopt.DualProximalGradient(operator, 0.15)
        zero = foldopt.unroll(lambda D, d, weight: d.new_zeros(len(d), len(D)), step, iterations=4000)
        return primal(zero(D, d, weight), D, d)

    return Case(
        params=params,
        layer=lambda **options: foldopt.f_fdpg(operator, solve, **options),
        exact=lambda D, d, weight: primal(solve(D, d, weight), D, d),
        unrolled=unrolled,
        batched=(1,),
    )


def inequalities(gen, B, n, m, k):
    """G, h, A, b of a set with an interior; h is each sample's own."""
    G, A, inside = normal(gen, m, n), normal(gen, k, n), normal(gen, n)
    return [G, G @ inside + 0.2 + torch.rand(B, m, generator=gen, dtype=F64), A, A @ inside]


def unrolled_admm(iterations):
    update = foldopt.ADMM()

    def start(Q, p, G, h, A, b):
        return p.new_zeros(len(p), G.shape[-2]), p.new_zeros(len(p), G.shape[-2])

    def solution(*params):
        return update.primal(foldopt.unroll(start, update, iterations=iterations)(*params), *params)

    return solution


def qp(n, m, k):
    """With at most n rows in all, Q is factored and the active set is found among the rows; with more it is not."""
    return Case(
        params=lambda gen, B: [definite(gen, n), normal(gen, B, n), *inequalities(gen, B, n, m, k)],
        layer=foldopt.QPLayer,
        exact=kkt,
        unrolled=unrolled_admm(2000),
        batched=(1, 3),
        symmetric=(0,),
    )


def markowitz():
    """Returns of 10% with variances of 1e-4 on the simplex: numbers that users have, far from 1."""

    def params(gen, B):
        n = 8
        simplex = -torch.eye(n, dtype=F64), torch.zeros(n, dtype=F64), torch.ones(1, n, dtype=F64), torch.ones(1)
        G, h, A, b = simplex
        return [1e-4 * definite(gen, n), -1e-4 * (1 + normal(gen, B, n)), G, h, A, b.to(F64)]

    return Case(params=params, layer=foldopt.QPLayer, exact=kkt, unrolled=None, batched=(1,), symmetric=(0,))


def nested():
    """f-PGDb: the step projects with a folded ADMM."""

    def layer(**options):
        return foldopt.f_pgd_b(
            lambda x, Q, p, *_: quadratic(x, ((Q + Q.mT) / 2).expand(len(x), *Q.shape), p),
            lambda Q, p, *polyhedron: polyhedron,
            lambda *params: kkt(*params),
            0.3,
            **options,
        )

    return Case(
        params=lambda gen, B: [definite(gen, 5), normal(gen, B, 5), *inequalities(gen, B, 5, 5, 1)],
        layer=layer,
        exact=kkt,
        unrolled=None,
        batched=(1, 3),
        symmetric=(0,),
    )


def nonlinear(make, batched):
    """Smooth programs, most of them nonconvex; near their solution SQP is Newton's method."""

    def functions(B=1):
        return make(B, torch.Generator().manual_seed(0))

    objective, inequalities, equalities, start, _ = functions()

    def layer(**options):
        begin = start if start.dim() == 1 else start[0]
        return foldopt.NLPLayer(objective, inequalities, equalities, start=begin, **options)

    def exact(*params):
        solving = layer()
        x = solving(*(p.detach() for p in params))
        return programs.solution_by_kkt(solving.program, x.detach(), *solving.multipliers, *params)

    def unrolled(*params):
        solving = layer()
        x = solving(*(p.detach() for p in params)).detach()
        noise = 1e-3 * normal(torch.Generator().manual_seed(9), *x.shape)
        near = foldopt.unroll(lambda *_: (x + noise, *solving.multipliers), solving.fold.update, iterations=8)
        return near(*params)[0]

    return Case(params=lambda gen, B: make(B, gen)[4], layer=layer, exact=exact, unrolled=unrolled, batched=batched)


CASES = {
    "sparse coding": sparse_coding(),
    "equation": equation(),
    "simplex": simplex(),
    "softmax": softmax(),
    "total variation": total_variation(),
    "qp": qp(6, 8, 2),
    "qp_few_rows": qp(10, 6, 2),
    "markowitz": markowitz(),
    "nested": nested(),
    **{
        make.__name__: nonlinear(make, batched)
        for make, batched in (
            (programs.hock_schittkowski_71, (0,)),
            (programs.rosenbrock_in_a_disc, (0,)),
            (programs.indefinite_on_a_sphere, (0, 1)),
            (programs.indefinite_in_a_box, (0, 1)),
        )
    },
}
