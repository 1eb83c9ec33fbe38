"""Projections, proximal operators, solvers and steps over scales, ties, zeros, duplicates and denormals."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import foldopt
from foldopt import projections, prox
from foldopt.errors import InputError
from foldopt.solvers.interior_point import solve_qcqp
from foldopt.solvers.qp import solve_qp
from foldopt.updates import ADMM, SQP, DualProximalGradient, ProjectedGradient, ProximalGradient, SmoothProgram
from tests.drawn import F64, normal, not_finite, points, properties, scales, seeds

F32 = torch.float32
N = 5
EPS = {F32: torch.finfo(F32).eps, F64: torch.finfo(F64).eps}
A, G = normal(1, 2, N), normal(3, 4, N)


def sum_is(total):
    return lambda y: torch.cat([(y.sum(1) - total).abs()[:, None], -y], 1).amax(1)


# Of the scale k of the set: the projection, and how far y is outside.
SETS = {
    "box": lambda k: (lambda x: projections.box(x, -k, 2 * k), lambda y: torch.maximum(-k - y, y - 2 * k).amax(1)),
    "simplex": lambda k: (lambda x: projections.simplex(x, k), sum_is(k)),
    "capped simplex": lambda k: (
        lambda x: projections.capped_simplex(x, 2.5 * k, k),
        lambda y: torch.maximum(sum_is(2.5 * k)(y), (y - k).amax(1)),
    ),
    "affine": lambda k: (
        lambda x: projections.affine(x, A.to(x), k * torch.ones(2).to(x)),
        lambda y: (y @ A.T.to(y) - k).abs().amax(1),
    ),
    "half space": lambda k: (
        lambda x: projections.half_space(x, G[0].to(x), k),
        lambda y: (y @ G[0].to(y) - k).clamp(min=0),
    ),
    "second-order cone": lambda k: (
        lambda x: torch.cat([z if z.dim() > 1 else z[:, None] for z in second_order_cone(x)], 1),
        lambda y: y[:, :-1].norm(dim=1) - y[:, -1],
    ),
    "polyhedron": lambda k: (
        lambda x: projections.polyhedron(
            x, A[:1].to(x), torch.zeros(1).to(x), G.to(x), torch.full((4,), k, dtype=x.dtype)
        ),
        lambda y: torch.cat([(y @ A[:1].T.to(y)).abs(), y @ G.T.to(y) - k], 1).amax(1),
    ),
}


def second_order_cone(x):
    return projections.second_order_cone(x[:, :-1], x[:, -1])


@pytest.mark.parametrize("name", SETS)
@properties
@given(x=points(), w=points(), k=scales)
def test_projections_are_feasible_optimal_idempotent_and_nonexpansive(name, x, w, k):
    project, outside = SETS[name](k)
    y, z = project(x), project(w)
    size = torch.stack([x, w, y, z]).abs().amax() + k
    tol = 50 * EPS[F64] * size
    assert y.isfinite().all()
    assert (outside(y) <= tol).all()
    assert ((x - y) * (z - y)).sum(1).amax() <= tol * size, "the angle to every point of the set is obtuse"
    assert (project(y) - y).abs().amax() <= tol
    assert ((y - z).norm(dim=1) <= (x - w).norm(dim=1) + tol).all()


@properties
@given(x=points(), k=scales, upper=st.sampled_from([0.6, 1.0, torch.inf]))
def test_sums_and_bounds_hold_however_large_x_is(x, k, upper):
    y = projections.capped_simplex(x, 2.5 * k, upper * k)
    assert (y >= 0).all()
    assert (y <= upper * k).all()
    torch.testing.assert_close(y.sum(1), torch.full((3,), 2.5 * k, dtype=F64), rtol=1e-14, atol=0)


# Of the weight t: the operator and its function, per sample.
OPERATORS = {
    "soft_threshold": (prox.soft_threshold, lambda y: y.abs().sum(1)),
    "l2_norm": (prox.l2_norm, lambda y: y.norm(dim=1)),
    "group_soft_threshold": (lambda x, t: prox.group_soft_threshold(x, t, 5), lambda y: y.abs().sum(1)),
    "entropy": (prox.entropy, lambda y: torch.special.xlogy(y, y).sum(1)),
}


@pytest.mark.parametrize("name", OPERATORS)
@properties
@given(x=points(), w=points(), t=scales)
def test_proximal_operators_are_optimal_and_firmly_nonexpansive(name, x, w, t):
    operator, g = OPERATORS[name]
    y, z = operator(x, t), operator(w, t)
    size = torch.stack([x, w, y, z]).abs().amax() + t * (1 + abs(torch.tensor(t, dtype=F64).log()))
    tol = 1e3 * EPS[F64] * size**2
    assert y.isfinite().all()
    assert (t * (g(z) - g(y)) >= ((x - y) * (z - y)).sum(1) - tol).all(), "x - y is t times a subgradient at y"
    assert ((y - z).square().sum(1) <= ((x - w) * (y - z)).sum(1) + tol).all()


CALLS = {
    **{name: (lambda x, k, name=name: SETS[name](k)[0](x)) for name in SETS},
    **{name: operator for name, (operator, _) in OPERATORS.items()},
}


@pytest.mark.parametrize("name", CALLS)
@properties
@given(x=points(), k=scales)
def test_float32_is_within_its_rounding_of_float64(name, x, k):
    x = x.to(F32)
    got, expected = CALLS[name](x, k), CALLS[name](x.double(), float(torch.tensor(k, dtype=F32)))
    assert got.dtype == F32
    size = x.abs().amax() + expected.abs().amax() + k
    assert (got - expected).abs().amax() <= 200 * EPS[F32] * size


@pytest.mark.parametrize("name", CALLS)
@properties
@given(
    x=points(),
    place=st.tuples(st.integers(0, 2), st.integers(0, N - 1)),
    bad=not_finite,
)
def test_nan_or_inf_raises_and_inside_a_layer_stays_in_its_sample(name, x, place, bad):
    sound = CALLS[name](x, 1.0)
    spoilt = x.clone()
    spoilt[place] = bad
    with pytest.raises(InputError, match=rf"holds NaN or inf, first in rows \[{place[0]}\]"):
        CALLS[name](spoilt, 1.0)
    layer = foldopt.fold(
        lambda c: CALLS[name](torch.where(c.isnan(), 0, c), 1.0), _step(name, place[0]), on_failure="zero"
    )
    c = x.clone().requires_grad_()
    layer(c)
    others = [i for i in range(3) if i != place[0]]
    assert not layer.last.ok[place[0]]
    assert layer.last.ok[others].all()
    assert sound.isfinite().all()


def _step(name, row):
    """The operator as the step that its value is a fixed point of, NaN in one row."""

    def step(y, c):
        spoilt = torch.zeros_like(c)
        spoilt[row] = torch.nan
        return CALLS[name](c + spoilt, 1.0)

    return step


@pytest.mark.parametrize("name", CALLS)
@properties
@given(x=points(scales=st.just(1.0)), d=seeds.map(lambda seed: normal(seed, 3, N)), k=scales)
def test_gradients_agree_with_finite_differences(name, x, d, k):
    x, h, call = (k * x).requires_grad_(), 1e-5 * k, CALLS[name]
    y = call(x, k)
    dummy = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, dummy, create_graph=True)
    (slope,) = torch.autograd.grad(pulled, dummy, d)
    with torch.no_grad():
        forward, backward = call(x + h * d, k), call(x - h * d, k)
    smooth = (forward + backward - 2 * y).abs().amax(1) <= 1e-3 * h  # elsewhere a kink is near
    assume(smooth.any())
    torch.testing.assert_close(slope[smooth], ((forward - backward) / (2 * h))[smooth], rtol=1e-3, atol=1e-3)


@st.composite
def programs(draw):
    """A feasible QP: curvature, slope and solution at scales of their own; some rows of G twice, some of H singular."""
    seed, a, k = draw(seeds), draw(scales), draw(scales)
    root = normal(seed, 3, N, draw(st.sampled_from([N, N - 2])))
    H = a * (root @ root.mT + 1e-3 * torch.eye(N, dtype=F64))
    inside, q = k * normal(seed + 1, 3, N), a * k * normal(seed + 2, 3, N)
    rows = normal(seed + 3, 3, 4, N)
    rows[:, 3] = rows[:, 2] if draw(st.booleans()) else rows[:, 3]
    A, b = rows[:, :1], (rows[:, :1] @ inside[:, :, None])[:, :, 0]
    G, h = rows[:, 1:], (rows[:, 1:] @ inside[:, :, None])[:, :, 0] + k * draw(st.sampled_from([0.0, 0.3]))
    return (H, q, A, b, G, h), a, k


def kkt(data, x, nu, lam, a, k):
    """The largest violation of each KKT condition, relative to the scales a of the curvature and k of x."""
    H, q, A, b, G, h = data
    slack = h - (G @ x[:, :, None])[:, :, 0]
    stationarity = (H @ x[:, :, None] + A.mT @ nu[:, :, None] + G.mT @ lam[:, :, None])[:, :, 0] + q
    size = 1 + x.abs().amax() / k + lam.abs().amax() / (a * k)
    return max(
        float(v) / float(size)
        for v in (
            stationarity.abs().amax() / (a * k),
            ((A @ x[:, :, None])[:, :, 0] - b).abs().amax() / k,
            (-slack).amax() / k,
            (-lam).amax() / (a * k),
            (lam * slack).abs().amax() / (a * k * k),
        )
    )


@properties
@given(programs())
def test_quadratic_programs_satisfy_their_kkt_conditions(program):
    data, a, k = program
    found = solve_qp(*data)
    assert found.ok.all()
    assert kkt(data, found.x, found.nu, found.lam, a, k) < 1e-6
    point = solve_qcqp(*data)
    assert point.ok.all()
    assert kkt(data, point.x, point.equality_dual, point.inequality_dual, a, k) < 1e-6


@properties
@given(programs())
def test_steps_of_admm_and_sqp_fix_the_solution(program):
    (H, q, A, b, G, h), a, k = program
    found = solve_qp(H, q, A, b, G, h)
    admm = ADMM(rho=a)
    state = admm.state(found.x, found.lam, G)
    for moved, kept in zip(admm(state, H, q, G, h, A, b), state, strict=True):
        assert (moved - kept).abs().amax() <= 1e-6 * (k + found.x.abs().amax() + found.lam.abs().amax() / a)
    assert (admm.primal(state, H, q, G, h, A, b) - found.x).abs().amax() <= 1e-6 * (k + found.x.abs().amax())
    sqp = SQP(
        SmoothProgram(
            lambda x: 0.5 * torch.einsum("bi,bij,bj->b", x, H, x) + (q * x).sum(1),
            lambda x: torch.einsum("bpn,bn->bp", A, x) - b,
            lambda x: torch.einsum("bmn,bn->bm", G, x) - h,
        )
    )
    moved = sqp((found.x, found.nu, found.lam))
    assert (moved[0] - found.x).abs().amax() <= 1e-6 * (k + found.x.abs().amax())


@properties
@given(c=points(), stepsize=st.sampled_from([1e-3, 0.5, 1.0]), k=scales)
def test_gradient_steps_fix_the_solution_and_only_it(c, stepsize, k):
    def distance(x):
        return 0.5 * (x - c).square().sum(1)

    size = c.abs().amax() + k
    steps = {
        ProjectedGradient(distance, lambda x: projections.simplex(x, k), stepsize): projections.simplex(c, k),
        ProximalGradient(distance, lambda x, t: prox.soft_threshold(x, k * t), stepsize): prox.soft_threshold(c, k),
    }
    for step, solution in steps.items():
        assert (step(solution) - solution).abs().amax() <= 20 * EPS[F64] * size
        elsewhere = step(solution + k)
        assert (elsewhere - solution - k).abs().amax() >= 1e-4 * k
    dual = DualProximalGradient(lambda v, t, D, d: prox.soft_threshold(v, k * t))
    D = torch.eye(N, dtype=F64)
    w = dual.dual(prox.soft_threshold(c, k), D, c)
    assert (dual(w, D, c) - w).abs().amax() <= 20 * EPS[F64] * size
