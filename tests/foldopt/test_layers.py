"""The ready layers: programs given by functions, and projected gradient on a polyhedron."""

import inspect
import sys

import pytest
import torch

import foldopt
from foldopt import NLPLayer, QPLayer, f_fdpg, f_pgd_a, f_pgd_b, f_sqp
from foldopt.errors import FixedPointError, InputError, KinkError, MissingDependencyError
from foldopt.layers import ADMMLayer, FDPGLayer
from foldopt.prox import soft_threshold
from tests.foldopt.programs import (
    F64,
    PROGRAMS,
    hock_schittkowski_71,
    indefinite_in_a_box,
    made,
    quadratic,
    solution_by_kkt,
)


def directional(layer, params, weight, eps=1e-5, seed=3):
    """Central differences of weight.layer(params) along one random direction of each parameter."""
    gen = torch.Generator().manual_seed(seed)
    directions = [torch.randn(p.shape, generator=gen, dtype=F64) for p in params]
    slopes = []
    for i, d in enumerate(directions):
        ends = [
            (layer(*[p + s * eps * d if i == j else p for j, p in enumerate(params)]) * weight).sum() for s in (1, -1)
        ]
        slopes.append(float(ends[0] - ends[1]) / (2 * eps))
    return directions, slopes


def check_gradient(layer, params, rel):
    params = [p.detach().clone().requires_grad_() for p in params]
    x = layer(*params)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    gradients = torch.autograd.grad((x * weight).sum(), params)
    with torch.no_grad():
        directions, slopes = directional(layer, params, weight)
    for gradient, direction, slope in zip(gradients, directions, slopes, strict=True):
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=rel, abs=rel)


@pytest.mark.parametrize("make", PROGRAMS)
def test_nlp_layer_against_differences_and_the_kkt_system(make):
    """200 instances; the second opinion is the implicit function theorem on the equations of the active set."""
    objective, inequalities, equalities, start, params = made(make, batch=200)
    layer = NLPLayer(objective, inequalities, equalities, start=start)
    params = [p.requires_grad_() for p in params]
    x = layer(*params)
    exact = solution_by_kkt(layer.program, x.detach(), *layer.multipliers, *params)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    folded, expected = (torch.autograd.grad((y * weight).sum(), params) for y in (x, exact))
    for mine, other in zip(folded, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sqp", "slsqp", "trust-constr", "function"])
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0")
def test_any_black_box_will_do(solver):
    objective, inequalities, equalities, start, params = made(hock_schittkowski_71, batch=3)
    if solver == "function":
        inner = NLPLayer(objective, inequalities, equalities, start=start)
        layer = NLPLayer(objective, inequalities, equalities, solver=lambda c: inner(c).float().double())
    else:
        pytest.importorskip("scipy")
        layer = NLPLayer(objective, inequalities, equalities, start=start, solver=solver)
    check_gradient(layer, params, rel=1e-5)


def test_gurobi_in_front_of_an_indefinite_program():
    """Its global minimum, folded like any other: better than the local ones, with the derivative of its active set."""
    gp = pytest.importorskip("gurobipy")
    objective, inequalities, _, start, params = made(indefinite_in_a_box, batch=10)

    def solve(Q, q):
        with gp.Env(params={"OutputFlag": 0, "NonConvex": 2, "MIPGap": 0}) as env:
            return torch.stack([minimize(H.numpy(), row.numpy(), env) for H, row in zip(Q, q, strict=True)])

    def minimize(H, row, env):
        with gp.Model(env=env) as model:
            x = model.addMVar(len(row), lb=0, ub=1)
            model.setObjective(0.5 * (x @ H @ x) + row @ x)
            model.optimize()
            return torch.tensor(x.X, dtype=F64)

    layer = NLPLayer(objective, inequalities, solver=solve)
    params = [p.requires_grad_() for p in params]
    x, local = layer(*params), NLPLayer(objective, inequalities, start=start)(*params)
    gain = objective(local, *params) - objective(x, *params)
    assert float(gain.min()) > -1e-8
    assert float(gain.max()) > 1e-2
    exact = solution_by_kkt(layer.program, x.detach(), *layer.multipliers, *params)
    for mine, other in zip(*(torch.autograd.grad(y.square().sum(), params) for y in (x, exact)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_a_wrong_answer_is_reported_not_polished():
    objective, inequalities, equalities, start, params = made(hock_schittkowski_71, batch=3)
    inner = NLPLayer(objective, inequalities, equalities, start=start)
    wrong = torch.tensor([[0.0], [0.1], [0.0]], dtype=F64)
    layer = NLPLayer(objective, inequalities, equalities, solver=lambda c: inner(c) + wrong)
    with pytest.raises(FixedPointError) as error:
        layer(*params)
    assert error.value.indices == (1,)


def test_a_learned_objective_is_found():
    net = torch.nn.Linear(3, 2, dtype=F64)

    class Distance(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, c):
            return (x - self.net(c)).square().sum(1)

    layer = NLPLayer(Distance(), lambda x, c: x - 0.1, start=torch.zeros(2))
    c = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    layer(c).sum().backward()
    free = (net(c) < 0.1).to(F64)
    torch.testing.assert_close(net.bias.grad, free.sum(0))
    torch.testing.assert_close(net.weight.grad, free.mT @ c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["zero", "nan"])
def test_policies_act_on_every_parameter_of_their_sample_and_on_no_other(policy, dtype):
    """min |x - c|^2 / 2, x <= b, x >= a: the first sample is at a kink, the second is infeasible."""
    c = torch.tensor([[1.0, 0.0], [2.0, 0.5], [3.0, 0.5], [0.0, 0.25]], dtype=dtype)
    b = torch.tensor([[1.0], [-3.0], [1.0], [1.0]], dtype=dtype)
    a = torch.full((4, 1), -2.0, dtype=dtype)
    layer = NLPLayer(
        lambda x, c, b, a: (x - c).square().sum(1) / 2,
        lambda x, c, b, a: torch.cat([x - b, a - x], 1),
        solver=lambda c, b, a: torch.maximum(torch.minimum(c, b), a),
        degenerate=policy,
        on_failure=policy,
    )
    params = [p.requires_grad_() for p in (c, b, a)]
    x = layer(*params)
    assert x.dtype == dtype
    found = torch.autograd.grad(x.sum(), params)
    assert layer.last is layer.fold.last
    assert layer.last.solved.tolist() == [True, False, True, True]
    assert layer.last.ok.tolist() == [False, False, True, True]  # the derivative counts too
    assert layer.last.verdict == ("kink", "not solved", "differentiable", "differentiable")
    expected = [[[0.0, 1.0], [1.0, 1.0]], [[1.0], [0.0]], [[0.0], [0.0]]]
    for gradient, right in zip(found, expected, strict=True):
        bad = gradient[:2]
        assert bad.isnan().all() if policy == "nan" else (bad == 0).all()
        torch.testing.assert_close(gradient[2:], torch.tensor(right, dtype=dtype))


def test_a_kink_of_an_nlp_layer_is_refused_unless_a_side_is_chosen():
    c = torch.tensor([[0.0, -1.0], [2.0, -1.0]], dtype=F64, requires_grad=True)

    def layer(**options):
        return NLPLayer(lambda x, c: (x - c).square().sum(1), lambda x, c: x, start=-torch.ones(2), **options)

    with pytest.raises(KinkError, match=r"inequalities\[0\]"):
        layer()(c).sum().backward()
    (gradient,) = torch.autograd.grad(layer(degenerate="one_sided")(c).sum(), c)
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, 1.0], dtype=F64))
    assert float(gradient[0, 0]) in (0.0, 1.0)
    with pytest.raises(InputError, match="degenerate='both' is unknown"):
        layer(degenerate="both")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"solver": "newton", "start": torch.zeros(2)}, "solver='newton' is unknown"),
        ({}, "solver='sqp' needs start="),
        ({"start": torch.zeros(2), "polish": -1}, "polish=-1"),
    ],
)
def test_arguments_of_the_nlp_layer_are_checked(kwargs, match):
    with pytest.raises(InputError, match=match):
        NLPLayer(lambda x, c: x.square().sum(1), **kwargs)


@pytest.mark.parametrize(("solver", "module"), [("ipopt", "cyipopt"), ("slsqp", "scipy.optimize")])
def test_a_missing_solver_says_what_to_install(monkeypatch, solver, module):
    monkeypatch.setitem(sys.modules, module, None)
    layer = NLPLayer(lambda x, c: x.square().sum(1), start=torch.zeros(2), solver=solver)
    with pytest.raises(MissingDependencyError, match="pip install"):
        layer(torch.zeros(1, 2))


def polyhedral(batch=25, n=6, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=F64)

    root = normal(n, n)
    return (
        root @ root.mT + torch.eye(n, dtype=F64),
        normal(batch, n),
        normal(8, n),
        normal(8).abs(),
        normal(2, n),
        0 * normal(2),
    )


def pgd(make, **options):
    layer = make(
        lambda x, Q, p, *_: quadratic(x, Q.expand(len(x), *Q.shape), p),
        lambda Q, p, G, h, A, b: (G, h, A, b),
        QPLayer(),
        stepsize=0.1,
        **options,
    )
    return lambda Q, *rest: layer((Q + Q.mT) / 2, *rest)


@pytest.mark.parametrize("make", [f_fdpg, f_pgd_a, f_pgd_b, f_sqp, ADMMLayer, FDPGLayer])
def test_layers_name_every_option_of_fold(make):
    shown, options = inspect.signature(make).parameters, inspect.signature(foldopt.fold).parameters
    names = [name for name, option in options.items() if option.kind is option.KEYWORD_ONLY]
    assert len(names) == 6
    assert set(names) <= set(shown)
    assert all(shown[name].default == options[name].default for name in names if name != "dtype")
    assert shown["dtype"].default == (None if make in (f_fdpg, FDPGLayer) else torch.float64)


@pytest.mark.parametrize(("make", "rel"), [(f_pgd_a, 1e-3), (f_pgd_b, 1e-6)])
def test_projected_gradient_on_a_polyhedron(make, rel):
    """Every parameter is shared but p; qpth's own derivative is right to about 1e-5 only."""
    if make is f_pgd_a:
        pytest.importorskip("qpth")
    check_gradient(pgd(make), polyhedral(), rel)


def test_nested_folding_is_the_derivative_of_the_qp():
    params = [p.requires_grad_() for p in polyhedral()]
    nested, plain = pgd(f_pgd_b)(*params), QPLayer()((params[0] + params[0].mT) / 2, *params[1:])
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(5), dtype=F64)
    mine, other = (torch.autograd.grad((x * weight).sum(), params) for x in (nested, plain))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))


def test_a_polyhedron_without_equalities_and_a_wrong_one():
    layer = f_pgd_b(
        lambda x, c: (x - c).square().sum(1),
        lambda c: (torch.eye(2), torch.ones(2), None, None),
        lambda c: c.clamp(max=1),
        0.1,
    )
    c = torch.tensor([[2.0, 0.5]], dtype=F64, requires_grad=True)
    layer(c).sum().backward()
    torch.testing.assert_close(c.grad, torch.tensor([[0.0, 1.0]], dtype=F64))
    wrong = f_pgd_b(lambda x, c: (x - c).square().sum(1), lambda c: (c, c), lambda c: c, 0.1)
    with pytest.raises(InputError, match="polyhedron returned 2 values"):
        wrong(c)


def test_qpth_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qpth.qp", None)
    with pytest.raises(MissingDependencyError, match=r"foldopt\[qpth\]"):
        pgd(f_pgd_a)(*polyhedral())


def test_fdpg_layer_on_fused_signals_and_the_dual_of_a_primal():
    """n = 2, D = [1, -1]: x moves each entry towards the other by at most the weight."""
    D = torch.tensor([[1.0, -1.0]], dtype=F64)
    d = torch.tensor([[3.0, 1.0], [0.2, 0.0]], dtype=F64, requires_grad=True)
    weight = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def solve(D, d, weight):
        w = -torch.einsum("mn,bn->bm", D, d) / 2
        return w.clamp(-weight, weight)

    layer = f_fdpg(lambda v, t, D, d, weight: soft_threshold(v, t * weight), solve)
    x = layer(D, d, weight)
    torch.testing.assert_close(x, torch.tensor([[2.5, 1.5], [0.1, 0.1]], dtype=F64))
    torch.testing.assert_close(layer.update.dual(x, D, d), solve(D, d, weight))
    grad_d, grad_weight = torch.autograd.grad(x[:, 0].sum(), (d, weight))
    torch.testing.assert_close(grad_d, torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=F64))
    assert float(grad_weight) == pytest.approx(-1.0)
    assert layer.last is layer.fold.last
    assert layer.last.ok.tolist() == [True, True]


def test_a_layer_inside_of_a_step_has_its_certificates_too():
    params = [p.double() for p in polyhedral(batch=4)]
    layer = ADMMLayer()
    assert layer.last is None
    layer(*params)
    assert layer.last.ok.shape == layer.last.solved.shape == (4,)
    assert layer.last.ok.all()


def test_admm_recovers_its_dual_from_a_primal_solution():
    params = polyhedral(batch=50)
    update = foldopt.ADMM(2.0)
    state = update.recover(QPLayer()(*params), *params)
    for before, after in zip(state, update(state, *params), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
