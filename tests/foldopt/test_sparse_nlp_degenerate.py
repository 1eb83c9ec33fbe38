"""`NLPLayer` with a sparse KKT system at degenerate points: verdicts, gradients and policies."""

import pytest
import torch

import foldopt
from experiments.benchmark.integer_draws import cotangents, draw
from experiments.benchmark.integer_truth import derivative_of, truth_of
from foldopt.errors import DegenerateError, DependentRowsError, KinkError, NotUniqueError
from tests.foldopt.programs import F64

NAMES = {KinkError: "kink", NotUniqueError: "not unique", DependentRowsError: "dependent rows"}


def small_program(seed):
    """Return a program with small integers: ties, dependent rows, multipliers of zero, curved rows in every fourth."""
    gen = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=gen).to(F64)

    n, m, p = (int(torch.randint(low, high, (1,), generator=gen)) for low, high in ((2, 6), (1, 7), (0, 3)))
    L, inside = integers(n, n), integers(n)
    Q = L @ L.T if seed % 3 else L @ L.T + torch.eye(n, dtype=F64)
    G, A, q = integers(m, n), integers(p, n), integers(n)
    h = G @ inside + torch.randint(0, 2, (m,), generator=gen)
    G = torch.cat([G, torch.eye(n, dtype=F64), -torch.eye(n, dtype=F64)])
    h = torch.cat([h, inside + 2, 2 - inside])

    def objective(x, q, h, b):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, Q, x) + (q * x).sum(1)

    def inequalities(x, q, h, b):
        bent = 0.25 * ((x - inside) ** 2).sum(1, keepdim=True) * (torch.arange(len(G)) % 2)
        return x @ G.T - h + (bent if seed % 4 == 1 else 0)

    def equalities(x, q, h, b):
        return x @ A.T - b

    params = q[None], h[None], (A @ inside)[None]
    return (objective, inequalities, equalities if p else None), params, integers(1, n)


def outcome(layer, params, which, weights):
    params = [p.clone().requires_grad_(i in which) for i, p in enumerate(params)]
    try:
        x = layer(*params)
        found = torch.autograd.grad((x * weights).sum(), [params[i] for i in which], allow_unused=True)
    except DegenerateError as error:
        return type(error), None
    return None, torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.slow
def test_no_derivative_is_claimed_that_the_dense_layer_refuses():
    """Nor another one. Curved rows are among the degenerate ones here."""
    kinds = []
    for seed in range(40):
        functions, params, weights = small_program(seed)
        dense = foldopt.NLPLayer(*functions, start=torch.zeros(weights.shape[1], dtype=F64))
        state = (dense(*params).detach(), *dense.multipliers)
        layers = [foldopt.NLPLayer(*functions, solver=lambda *_, s=state: s, sparsity=s) for s in (False, True)]
        for which in ((0,), (0, 1, 2)):
            (expected, gradient), (kind, found) = (outcome(layer, params, which, weights) for layer in layers)
            assert kind is expected or kind is DependentRowsError, seed
            if kind is None:
                torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
            kinds.append(kind)
    assert kinds.count(None) > 40
    assert kinds.count(DependentRowsError) > 5


def rows_of(program, equality):
    rows = [row for row in program.rows() if row.equality == equality]
    return torch.tensor([row.a for row in rows], dtype=F64).reshape(len(rows), program.n)


def has_rows_of_zeros(program):
    return not all(any(row.a) for row in program.rows())


@pytest.mark.parametrize("seed", [seed for seed in range(45) if not has_rows_of_zeros(draw(seed))])
def test_verdicts_and_gradients_on_degenerate_programs_are_exact(seed):
    """Truth is in rational arithmetic; see `experiments.benchmark.integer_truth`."""
    program = draw(seed)
    truth = truth_of(program)

    def vector(values):
        return torch.tensor([[float(value) for value in values]], dtype=F64)

    equal = [i for i, row in enumerate(truth.rows) if row.equality]
    other = [i for i, row in enumerate(truth.rows) if not row.equality]
    Q, A, G = vector(sum(program.Q, ())).view(program.n, -1), rows_of(program, True), rows_of(program, False)
    y = vector(truth.point.y)
    state = vector(truth.point.x), y[:, equal], y[:, other]
    right = vector([row.c for row in truth.rows])
    params = vector(program.p), right[:, equal], right[:, other]
    layer = foldopt.NLPLayer(
        lambda x, p, b, h: 0.5 * ((x @ Q) * x).sum(1) + (p * x).sum(1),
        lambda x, p, b, h: x @ G.T - h,
        lambda x, p, b, h: x @ A.T - b,
        solver=lambda *_: state,
        sparsity=True,
    )
    for g in cotangents(program, seed):
        exact = derivative_of(truth, g)
        for which, verdict in (((0,), exact.verdict), ((0, 1, 2), exact.verdict_rows)):
            kind, found = outcome(layer, params, which, vector(g))
            accepted = ("kink", "not unique") if exact.isolated else (verdict,)
            assert {None: "differentiable", **NAMES}[kind] in accepted
            if kind is not None or truth.lines:
                continue
            expected = vector(exact.gradient)[0]
            if len(which) > 1:
                weights = vector(exact.multipliers)[0]
                expected = torch.cat([expected, weights[equal], weights[other]])
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_choice_of_multipliers_is_no_harm_where_constraints_are_not_curved():
    """min x1 + (x2 - x1 - c)^2, x1 >= 0 twice; a term in the second row makes its multiplier enter the curvature."""

    def layer_of(bend):
        def inequalities(x, c):
            return torch.stack([-x[:, 0], -x[:, 0] + bend * (x[:, 1] - 2) ** 2], 1)

        state = torch.tensor([[0.0, 2.0]], dtype=F64), torch.zeros(1, 0), torch.tensor([[0.5, 0.5]], dtype=F64)
        objective = lambda x, c: x[:, 0] + (x[:, 1] - x[:, 0] - c[:, 0]) ** 2  # noqa: E731
        return foldopt.NLPLayer(objective, inequalities, solver=lambda c: state, sparsity=True)

    c = torch.tensor([[2.0]], dtype=F64, requires_grad=True)
    layer = layer_of(0)
    (grad,) = torch.autograd.grad(layer(c)[:, 1].sum(), c)
    assert layer.last.verdict == ("differentiable",)
    assert abs(float(grad) - 1) < 1e-12
    layer = layer_of(1)
    with pytest.raises(DependentRowsError, match=r"inequalities\[0\], inequalities\[1\]"):
        layer(c)[:, 1].sum().backward()


@pytest.mark.parametrize("degenerate", ["one_sided", "least_norm", "nan", "zero"])
def test_policies_at_a_kink(degenerate):
    """x = max(c, 0) at c = 0 and elsewhere."""
    c = torch.tensor([[0.0], [2.0], [-1.0]], dtype=F64, requires_grad=True)
    layer = foldopt.NLPLayer(
        lambda x, c: 0.5 * ((x - c) ** 2).sum(1),
        lambda x, c: -x,
        solver=lambda c: c.clamp(min=0),
        sparsity=True,
        degenerate=degenerate,
    )
    (grad,) = torch.autograd.grad(layer(c).sum(), c)
    assert layer.last.verdict == ("kink", "differentiable", "differentiable")
    expected = {"nan": torch.nan, "zero": 0.0}.get(degenerate, 1.0)
    torch.testing.assert_close(grad[:, 0], torch.tensor([expected, 1, 0], dtype=F64), equal_nan=True)
