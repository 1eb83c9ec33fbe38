"""`NLPLayer` with a sparse KKT system: against the dense one, differences, and sparse systems made by hand."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacfwd, jacrev, vmap

import foldopt
from experiments.benchmark.integer_draws import cotangents, draw
from experiments.benchmark.integer_truth import derivative_of, truth_of
from foldopt._sparsity import Derivative, Reading, Sparsity
from foldopt.errors import (
    DegenerateError,
    DependentRowsError,
    FixedPointError,
    InputError,
    KinkError,
    MissingDependencyError,
    NotUniqueError,
)
from foldopt.qp.matrix import Pattern
from foldopt.updates.sqp import SmoothProgram

F64 = torch.float64


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_sparse_and_dense_agree(name):
    dense, sparse, c = problem(name)
    weights = torch.linspace(-1, 1, c.shape[1], dtype=F64)
    values, gradients = [], []
    for layer in (dense, sparse):
        x = layer(c)
        values.append((x.detach(), *layer.multipliers))
        gradients.append(torch.autograd.grad((x * weights).sin().sum(), c)[0])
        assert layer.last.verdict == ("differentiable",) * 3
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert sparse.last.backward.residual.max() < 1e-12
    assert sparse.last.backward.method == "closed form"


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_those_of_finite_differences(name):
    _, layer, c = problem(name, batch=2)
    weights = torch.linspace(-1, 1, c.shape[1], dtype=F64)
    (grad,) = torch.autograd.grad((layer(c) * weights).sum(), c)
    direction, eps = torch.randn(c.shape, generator=torch.Generator().manual_seed(0), dtype=F64), 1e-5
    ends = [(layer(c.detach() + side * eps * direction) * weights).sum() for side in (1, -1)]
    torch.testing.assert_close((grad * direction).sum(), (ends[0] - ends[1]) / (2 * eps), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_higher_derivatives_and_transforms():
    dense, _, c = problem("curved equalities", n=6, batch=2)
    plain = c.detach()
    state = (dense(plain).detach(), *dense.multipliers)

    def nearby(c):  # Newton's steps, of the layer itself, do the rest
        same = [(c[:, None] - plain).norm(dim=2).argmin(1)]
        return tuple(part[same] for part in state)

    objective, inequalities, equalities = PROGRAMS["curved equalities"]
    layer = foldopt.NLPLayer(objective, inequalities, equalities, solver=nearby, sparsity=True, polish=4)
    assert torch.autograd.gradcheck(layer, c, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, c)
    expected = jacrev(dense)(plain)
    for jacobian in (jacrev(layer), jacfwd(layer)):
        torch.testing.assert_close(jacobian(plain), expected, rtol=1e-10, atol=1e-10)
    many = torch.stack([plain, 1.0001 * plain])
    found = vmap(jacrev(lambda c: layer(c).sum()))(many)
    for one, gradient in zip(many, found, strict=True):
        torch.testing.assert_close(gradient, jacrev(lambda c: dense(c).sum())(one), rtol=1e-10, atol=1e-10)


def test_gradients_reach_modules_and_float32_is_answered_in_float32():
    class Cost(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5, 0.5, 2.0], dtype=F64))

        def forward(self, x, c):
            return (self.weight * (x - c) ** 2).sum(1)

    cost = Cost()
    c = torch.tensor([[0.3, -0.2, 0.5], [1.0, 2.0, 3.0]], requires_grad=True)

    def solver(c):  # min sum w (x - c)^2, sum x = 1, in closed form
        inverse = 1 / cost.weight
        return c + (1 - c.sum(1, keepdim=True)) * inverse / inverse.sum()

    layer = foldopt.NLPLayer(cost, equalities=lambda x, c: x.sum(1, keepdim=True) - 1, solver=solver, sparsity=True)
    x = layer(c)
    found = torch.autograd.grad((x * torch.arange(3)).sum(), (c, cost.weight))
    expected = torch.autograd.grad((solver(c.double()) * torch.arange(3)).sum(), (c, cost.weight))
    assert x.dtype == found[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-6, atol=1e-6)


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


def shared_state(name="both", **options):
    """Return a layer that is given its solution, and that solution."""
    dense, _, c = problem(name)
    x = dense(c).detach()
    state = [x, *dense.multipliers]
    objective, inequalities, equalities = PROGRAMS[name]
    options = {"sparsity": True, **options}
    return foldopt.NLPLayer(objective, inequalities, equalities, solver=lambda c: tuple(state), **options), state, c


def infeasible(state):
    state[0][1] += 0.1


def wrong_sign(state):
    state[2][1, int((state[0][1].abs() < 0.9).nonzero()[0, 0])] = -0.3


def not_active(state):
    state[2][1, int((state[0][1].abs() < 0.9).nonzero()[0, 0])] = 0.3


def not_finite(state):
    state[0][1, 2] = torch.nan


@pytest.mark.parametrize("spoil", [infeasible, wrong_sign, not_active, not_finite])
@pytest.mark.parametrize("polish", [0, 1])
def test_a_state_that_is_no_solution_is_found_out_and_spoils_no_other(spoil, polish):
    layer, state, c = shared_state(polish=polish, on_failure="nan")
    right = torch.autograd.grad(layer(c).sin().sum(), c)[0]
    exact = state[0].clone()
    spoil(state)
    x = layer(c)
    mended = polish and spoil in (wrong_sign, not_active)
    assert layer.last.ok.tolist() == [True, bool(mended), True]
    (grad,) = torch.autograd.grad(x.sin().sum(), c)
    torch.testing.assert_close(grad[[0, 2]], right[[0, 2]], rtol=1e-12, atol=1e-12)
    if mended:
        torch.testing.assert_close(x.detach(), exact, rtol=1e-12, atol=1e-12)
    else:
        assert grad[1].isnan().all()
        strict, *_ = shared_state(polish=polish)
        strict.solver = lambda c: tuple(state)
        with pytest.raises(FixedPointError) as caught:
            strict(c)
        assert caught.value.indices == (1,)


def test_a_loose_answer_is_polished_and_multipliers_are_found():
    layer, state, c = shared_state()
    exact = [part.clone() for part in state]
    (right,) = torch.autograd.grad(layer(c).sin().sum(), c)
    noise = torch.randn(exact[0].shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    layer.solver = lambda c: exact[0] + 1e-7 * noise
    x = layer(c)
    (grad,) = torch.autograd.grad(x.sin().sum(), c)
    torch.testing.assert_close(x.detach(), exact[0], rtol=1e-11, atol=1e-11)
    for found, expected in zip(layer.multipliers, exact[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9)


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


def test_layers_are_copied_and_pickled():
    layer = foldopt.NLPLayer(chain, square, total, solver=picklable_solver, sparsity=True)
    c = problem("both")[2]
    (expected,) = torch.autograd.grad(layer(c).sum(), c)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        (grad,) = torch.autograd.grad(clone(c).sum(), c)
        assert torch.equal(grad, expected)


def picklable_solver(c):
    return problem("both")[0](c).detach()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 12), st.floats(0, 0.5))
def test_matrices_are_read_off_their_products(seed, m, n, density):
    rng = np.random.default_rng(seed)
    there = rng.random((m, n)) < density
    J = torch.from_numpy(np.where(there, rng.normal(size=(2, m, n)), 0))
    rows, columns = (torch.from_numpy(part) for part in np.nonzero(there))
    reading = Reading(Pattern(rows, columns, (m, n)))
    products = Derivative(lambda s: (s[:, None] @ J)[:, 0], lambda t: (J @ t[:, :, None])[:, :, 0])
    found = reading.matrix(products, torch.zeros(2, 1, dtype=F64))
    for i in range(2):
        assert np.array_equal(found.to_scipy(i).toarray(), J[i].numpy())
    assert reading.products <= min(m, n)


@pytest.mark.parametrize(
    ("places", "most"),
    [
        (sp.diags([1.0, 1.0, 1.0], [-1, 0, 1], shape=(500, 500)), 3),
        (sp.bmat([[None, np.ones((1, 499))], [np.ones((499, 1)), sp.identity(499)]]), 3),  # an arrow
        (np.ones((1, 500)), 1),
        (np.ones((500, 1)), 1),
        (sp.kron(sp.identity(20), np.ones((25, 1))), 1),
        (sp.hstack([sp.kron(sp.identity(20), np.ones((25, 1))), sp.identity(500)]), 2),  # y_ij <= x_i
        (sp.vstack([np.ones((1, 500)), sp.identity(500)]), 2),
    ],
    ids=["tridiagonal", "arrow", "row", "column", "blocks", "groups", "sum and bounds"],
)
def test_few_products_are_enough(places, most):
    coo = sp.coo_matrix(places)
    rows, columns = (torch.from_numpy(part.astype(np.int64)) for part in (coo.row, coo.col))
    assert Reading(Pattern(rows, columns, coo.shape)).products <= most


LINE = sp.diags([1.0, 1.0], [0, 1], shape=(9, 9))


@pytest.mark.parametrize("kind", ["scipy", "torch", "torch dense", "numpy"])
def test_the_places_may_be_given(kind):
    """One triangle of the Hessian is enough."""
    to = {
        "scipy": lambda M: M,
        "torch": lambda M: torch.from_numpy(M.toarray()).to_sparse_csr(),
        "torch dense": lambda M: torch.from_numpy(M.toarray() != 0),
        "numpy": lambda M: M.toarray(),
    }[kind]
    given = Sparsity(to(LINE + sp.identity(9)), to(sp.identity(9)), to(sp.coo_matrix(np.ones((1, 9)))))
    layer, _, c = shared_state(sparsity=given)
    (grad,) = torch.autograd.grad(layer(c).sin().sum(), c)
    found, _, _ = shared_state()
    torch.testing.assert_close(grad, torch.autograd.grad(found(c).sin().sum(), c)[0], rtol=1e-12, atol=1e-12)
    assert given.products == (3, 2)


@pytest.mark.parametrize(
    ("hessian", "inequalities", "equalities", "message"),
    [
        (sp.identity(9), sp.identity(9), np.ones((1, 9)), "sparsity= misses entries of the Hessian"),
        (LINE + sp.identity(9), sp.identity(9), np.eye(1, 9), "sparsity= misses entries of the Hessian"),
        (sp.identity(8), sp.identity(8), np.ones((1, 8)), "is of 8 variables, 1 equalities and 8 inequalities, but"),
        (LINE, sp.identity(9), None, "is of 9 variables, 0 equalities and 9 inequalities, but the program has 9, 1"),
    ],
)
def test_places_that_do_not_fit_are_refused(hessian, inequalities, equalities, message):
    layer, _, c = shared_state(sparsity=Sparsity(hessian, inequalities, equalities))
    with pytest.raises(InputError, match=message):
        layer(c)


def test_arguments_are_checked():
    with pytest.raises(InputError, match=r"equalities of shape \(1, 8\) does not fit a Hessian of 9 columns"):
        Sparsity(LINE, None, np.ones((1, 8)))
    with pytest.raises(InputError, match=r"hessian of shape \(8, 9\) does not fit"):
        Sparsity(np.ones((8, 9)))
    with pytest.raises(InputError, match=r"inequalities has shape \(9,\), expected a matrix"):
        Sparsity(LINE, np.ones(9))
    with pytest.raises(InputError, match="solver='sqp' works with dense matrices: with sparsity= pass a function"):
        foldopt.NLPLayer(chain, sparsity=True, start=torch.zeros(9))
    with pytest.raises(InputError, match=r"stepsize=0.5: with sparsity= the step is a full one"):
        foldopt.f_sqp(SmoothProgram(chain), lambda c: c, stepsize=0.5, sparsity=True)
    with pytest.raises(InputError, match="degenerate='never' is unknown"):
        foldopt.f_sqp(SmoothProgram(chain), lambda c: c, degenerate="never", sparsity=True)
    with pytest.raises(InputError, match=r"sparse derivatives are those of a foldopt.SmoothProgram"):
        foldopt.f_sqp(object(), lambda c: c, sparsity=True)


def test_without_qdldl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdldl", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[qp\]'"):
        foldopt.NLPLayer(chain, solver=lambda c: c, sparsity=True)


def test_entries_that_come_up_later_are_found():
    """At the first call the weight of a coupling is zero."""

    def objective(x, c, w):
        return (0.5 * x**2 + x * c).sum(1) + w[:, 0] * x[:, 0] * x[:, 2]

    def solver(c, w):
        H = torch.eye(3, dtype=F64).repeat(len(c), 1, 1)
        H[:, 0, 2] = H[:, 2, 0] = w[:, 0]
        return torch.linalg.solve(H, -c)

    layer = foldopt.NLPLayer(objective, solver=solver, sparsity=True)
    c = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64, requires_grad=True)
    for weight, entries in ((0.0, 3), (0.5, 5)):
        w = torch.tensor([[weight]], dtype=F64, requires_grad=True)
        found = torch.autograd.grad(layer(c, w).cos().sum(), (c, w))
        expected = torch.autograd.grad(solver(c, w).cos().sum(), (c, w))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert len(layer.fold.update.sparsity.H.rows) == entries


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
from tests.foldopt.test_sparse_nlp import *
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
