"""What a user of QPLayer gets where samples fail or have no derivative, and through every transform of torch."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

import foldopt
from foldopt import errors
from tests.drawn import properties, seeds
from tests.foldopt.qp.programs import ARGUMENTS, F32, F64, Program, null_space, stacked, tensor, truth

inf, nan = torch.inf, torch.nan
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
I3, ONES = np.eye(3), np.ones((1, 3))
WEIGHT = [1.0, 2.0, 4.0]


def call(layer, args):
    return layer(args["Q"], args["p"], **{name: part for name, part in args.items() if name not in ("Q", "p")})


def asked(args, weight=WEIGHT, wrt=ARGUMENTS, **options):
    """Return the layer, x and the gradients of weight'x in `wrt`, by name."""
    args = {name: part.clone().requires_grad_(name in wrt) for name, part in args.items()}
    layer = foldopt.QPLayer(**options)
    x = call(layer, args)
    wrt = [name for name in args if name in wrt]
    gradients = torch.autograd.grad((x * torch.tensor(weight, dtype=x.dtype)).sum(), [args[name] for name in wrt])
    return layer, x.detach(), dict(zip(wrt, gradients, strict=True))


def arguments(program):
    return {name: part[0] for name, part in stacked([program]).items()}


def regular(seed, upper=2.0):
    """Three variables, a row, an equality and bounds; strictly complementary."""
    draws = np.random.default_rng(seed)
    R = draws.normal(size=(3, 3))
    Q, p, G = R @ R.T + 0.5 * I3, 2 * draws.normal(size=3), draws.normal(size=(1, 3))
    return Program(Q, p, G, G.sum(1) / 3 + 0.05, ONES, [1], lower=np.zeros(3), upper=np.full(3, upper))


FAILURES = {
    "infeasible": (Program(I3, WEIGHT, -ONES, [-2], ONES, [1], np.zeros(3), np.ones(3)), errors.InfeasibleError),
    "unbounded": (
        Program(0 * I3, [-1, 1, 0], ONES, [9], ONES, [1], np.full(3, -np.inf), np.full(3, np.inf)),
        errors.UnboundedError,
    ),
    "nonconvex": (
        Program(np.diag([1, -2, 1]), WEIGHT, ONES, [9], ONES, [1], np.zeros(3), np.ones(3)),
        errors.NonconvexError,
    ),
}


def with_failures(causes, dtype):
    """Return a batch of 7 with a failure at 2, and the second of `causes` at 5; and the places of the failures."""
    programs, places = [regular(i) for i in range(7)], (2, 5)[: len(causes)]
    for place, cause in zip(places, causes, strict=True):
        programs[place] = FAILURES[cause][0]
    return stacked(programs, dtype), places


def same(found, expected, tol=1e-14):
    atol = tol * (1 + float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol if expected.dtype == F64 else 1e-6 * (atol / tol))


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("causes", [("infeasible",), ("unbounded",), ("nonconvex",), ("unbounded", "infeasible")])
@pytest.mark.parametrize("policy", ["nan", "zero", "warn", "raise"])
def test_a_failure_is_what_its_policy_says_and_the_others_never_know(policy, causes, dtype):
    args, bad = with_failures(causes, dtype)
    keep = [i for i in range(7) if i not in bad]
    _, x_good, expected = asked({name: part[keep] for name, part in args.items()})
    if policy == "raise":
        with pytest.raises(errors.SolverError) as caught:
            asked(args)
        assert set(caught.value.indices) <= set(bad)
        assert isinstance(caught.value, tuple(FAILURES[cause][1] for cause in causes))
        if len(causes) == 1:
            assert caught.value.indices == bad
        return
    if policy == "warn":
        with pytest.warns(RuntimeWarning, match=str(bad[0])):
            layer, x, gradients = asked(args, on_failure=policy)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer, x, gradients = asked(args, on_failure=policy)
    assert x.dtype == dtype
    assert layer.last.ok.tolist() == [i in keep for i in range(7)]
    assert layer.last.status == tuple(causes[bad.index(i)] if i in bad else "solved" for i in range(7))
    assert x[list(bad)].isnan().all()
    same(x[keep], x_good)
    for name, gradient in gradients.items():
        same(gradient[keep], expected[name])
        if policy == "zero":
            assert (gradient[list(bad)] == 0).all(), name
        if policy == "nan":
            assert gradient[list(bad)].isnan().all(), name


@DTYPES
def test_zero_leaves_the_sum_over_the_good_samples_in_what_the_batch_shares_and_nan_spoils_it(dtype):
    """h is each sample's own; the third asks x_1 + x_2 + x_3 <= -1 of x >= 0."""
    shared = {"Q": torch.eye(3), "G": torch.ones(1, 3), "lower": torch.zeros(3), "upper": torch.full((3,), 2.0)}
    own = {"p": -(1 + torch.arange(15.0).view(5, 3)) / 10, "h": torch.tensor([[1.0], [1.1], [-1.0], [1.2], [1.3]])}
    args = {name: part.to(dtype) for name, part in {**shared, **own}.items()}
    good = [0, 1, 3, 4]
    _, _, expected = asked({**args, **{name: args[name][good] for name in own}})
    _, _, zero = asked(args, on_failure="zero")
    _, _, spoilt = asked(args, on_failure="nan")
    for name in shared:
        same(zero[name], expected[name])
        assert spoilt[name].isnan().all(), name
    for name in own:
        same(zero[name][good], expected[name])
        assert (zero[name][2] == 0).all()


def test_zero_is_zero_where_no_sample_is_solved_and_the_numbers_are_large():
    """Nonconvex; one right-hand side is far from the others."""
    Q = [[0.5, 1.5, 0.5, 1.25, 0], [1.5, 0.5, 0.75, 0.75, 0], [0.5, 0.75, 0, -0.25, 1.5]]
    Q = [*Q, [1.25, 0.75, -0.25, 0.5, 0.5], [0, 0, 1.5, 0.5, 2]]
    A = [[-1, 0, -1, 0.5, 0.5], [-1, 0.5, -1, 1, 0.5], [-1, -1, -1, 0.5, -1]]
    for b in ([-1, 0, 0], [-1e8, 0, 0], [-1e8, 0, 1e-300]):
        args = arguments(Program(Q, [0.5, 1, 1, -1, 1], A=A, b=b))
        for degenerate in ("raise", "one_sided"):
            layer, x, gradients = asked(args, np.ones(5), on_failure="zero", degenerate=degenerate)
            assert layer.last.status == ("nonconvex",)
            assert x.isnan().all()
            assert all((gradient == 0).all() for gradient in gradients.values())


# Of one shape, so that they fit in a batch: where x is, and what its derivative is in all arguments, or in p alone.
LIMIT = {"A": ONES, "b": [1], "lower": np.zeros(3), "upper": np.full(3, 2.0)}
FREE = {"G": [[1, 0, 0]], "h": [5]}
DEGENERATE = {
    "kink": (Program(I3, [-1, 0, 0], **FREE, **LIMIT), errors.KinkError),
    "dependent rows": (Program(I3, [0.1, 0.2, 0.3], ONES, [1], **LIMIT), errors.DependentRowsError),
    "not unique": (Program(0 * I3, [1, 1, 2], **FREE, **LIMIT), errors.NotUniqueError),
}


def with_degenerate(dtype, names=tuple(DEGENERATE)):
    programs = [Program(I3, [0.1, 0.2 + 0.01 * i, 0.3], **FREE, **LIMIT) for i in range(5)]
    for place, name in enumerate(names, start=1):
        programs[place] = DEGENERATE[name][0]
    return stacked(programs, dtype)


def test_the_degenerate_ones_are_what_they_are_called():
    weight = np.array(WEIGHT)
    assert truth(DEGENERATE["kink"][0]).verdict(weight)[0] == "kink"
    assert truth(DEGENERATE["not unique"][0]).verdict(weight)[0] == "not unique"
    found = truth(DEGENERATE["dependent rows"][0])
    assert found.verdict(weight)[0] == "differentiable"
    assert len(found.strong) == 2
    assert np.linalg.matrix_rank(found.strong) == 1


@DTYPES
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_sample_raises_by_its_cause_and_only_when_it_is_asked_for(name, dtype):
    args, cause = with_degenerate(dtype, (name,)), DEGENERATE[name][1]
    with pytest.raises(cause) as caught:
        asked(args)
    assert caught.value.indices == (1,)
    if name == "dependent rows":
        layer, _, gradients = asked(args, wrt=("Q", "p"))
        assert layer.last.verdict == ("differentiable",) * 5
        mean = sum(WEIGHT) / 3
        torch.testing.assert_close(gradients["p"][1], torch.tensor([mean - w for w in WEIGHT], dtype=dtype))
    else:
        with pytest.raises(cause):
            asked(args, wrt=("p",))
    layer, _, gradients = asked(args, weight=[1.0, 1.0, 1.0], wrt=("p",))  # the sum is fixed
    assert layer.last.verdict == ("differentiable",) * 5
    assert float(gradients["p"].abs().max()) < 1e-6


@DTYPES
@pytest.mark.parametrize("policy", ["one_sided", "least_norm", "warn", "nan", "zero", "raise"])
def test_degenerate_samples_under_each_policy(policy, dtype):
    args, places = with_degenerate(dtype), [1, 2, 3]
    keep = [0, 4]
    _, _, expected = asked({name: part[keep] for name, part in args.items()})
    if policy == "raise":
        with pytest.raises(errors.DegenerateError) as caught:
            asked(args)
        assert set(caught.value.indices) <= set(places)
        return
    if policy == "warn":
        with pytest.warns(RuntimeWarning, match="1"):
            layer, x, gradients = asked(args, degenerate=policy)
        _, _, one_sided = asked(args, degenerate="one_sided")
        for name in gradients:
            same(gradients[name], one_sided[name])
    else:
        layer, x, gradients = asked(args, degenerate=policy)
    assert layer.last.status == ("solved",) * 5
    assert layer.last.verdict == ("differentiable", "kink", "dependent rows", "not unique", "differentiable")
    torch.testing.assert_close(x[2], torch.tensor([13, 10, 7], dtype=dtype) / 30)
    torch.testing.assert_close(x[1], torch.tensor([1.0, 0, 0], dtype=dtype))
    for name, gradient in gradients.items():
        same(gradient[keep], expected[name], tol=1e-13)
        if policy == "zero":
            assert (gradient[places] == 0).all(), name
        elif policy == "nan":
            assert gradient[places].isnan().all(), name
        else:
            assert gradient.isfinite().all(), name
    if policy in ("one_sided", "warn"):
        pieces = []
        for held in ([], [1], [2], [1, 2]):  # which of the two bounds that carry nothing is kept
            N = null_space(np.concatenate([ONES, I3[held]]), 3)
            pieces.append(-N @ N.T @ WEIGHT)
        found = gradients["p"][1].double().numpy()
        assert min(np.abs(found - piece).max() for piece in pieces) < 1e-5
    if policy in ("one_sided", "warn", "least_norm"):  # rows that depend on each other and move alike
        mean = sum(WEIGHT) / 3
        assert float(gradients["b"][2].sum() + gradients["h"][2].sum()) == pytest.approx(mean, rel=1e-5)
        torch.testing.assert_close(gradients["p"][2], torch.tensor([mean - w for w in WEIGHT], dtype=dtype))


def test_the_policies_for_failures_and_for_degenerate_samples_are_independent():
    programs = [regular(0), FAILURES["infeasible"][0], DEGENERATE["kink"][0], regular(1)]
    args = stacked(programs)
    layer, x, gradients = asked(args, on_failure="nan", degenerate="zero", wrt=("p",))
    assert layer.last.status == ("solved", "infeasible", "solved", "solved")
    assert [layer.last.verdict[i] for i in (0, 2, 3)] == ["differentiable", "kink", "differentiable"]
    assert x[1].isnan().all()
    assert gradients["p"][1].isnan().all()
    assert (gradients["p"][2] == 0).all()
    with pytest.raises(errors.KinkError):
        asked(args, on_failure="nan", wrt=("p",))
    with pytest.raises(errors.InfeasibleError):
        asked(args, degenerate="zero", wrt=("p",))


# Fuzz: whatever comes in, what comes out is an answer or an error of foldopt.
NUMBERS = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-12, 1e-300, 5e-324, 1e8, -1e8, 1e19, 1e30, -1e30, 1e300, inf, -inf, nan]
ORDINARY = [0.0, 1.0, -1.0, 2.0, 0.5]


def noise(draws, shape, wild):
    values = NUMBERS if draws.random() < wild else ORDINARY
    return torch.tensor(draws.choice(values, size=shape), dtype=F32 if draws.random() < 0.2 else F64)


def anything(seed):
    draws = np.random.default_rng(seed)
    n, m, k, B = draws.integers(1, 6), draws.integers(0, 5), draws.integers(0, 4), draws.integers(1, 4)
    wild = draws.choice([0.0, 0.3])
    shapes = {"p": (n,), "G": (m, n), "h": (m,), "A": (k, n), "b": (k,), "lower": (n,), "upper": (n,)}
    args = {}
    for name, shape in shapes.items():
        batched = draws.random() < 0.5
        args[name] = noise(draws, (B, *shape) if batched else shape, wild)
    R = noise(draws, (n, n), wild)
    args["Q"] = R.T @ R if draws.random() < 0.8 else R
    for pair in (("G", "h"), ("A", "b"), ("lower",), ("upper",)):
        if draws.random() < 0.3:
            for name in pair:
                del args[name]
    if draws.random() < 0.05:
        name = draws.choice(sorted(set(args) - {"Q", "p"}) or ["p"])
        args[name] = args[name][..., :-1]
    return args


@settings(properties, max_examples=80)
@given(
    seed=seeds,
    on_failure=st.sampled_from(["raise", "nan", "zero"]),
    degenerate=st.sampled_from(["raise", "one_sided", "least_norm", "nan", "zero"]),
)
def test_no_error_but_foldopts_own_leaves_the_layer(seed, on_failure, degenerate):
    args = anything(seed)
    leaves = {name: part.requires_grad_() for name, part in args.items()}
    layer = foldopt.QPLayer(on_failure=on_failure, degenerate=degenerate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = call(layer, leaves)
            assert len(layer.last.status) == len(x)
            gradients = torch.autograd.grad(x.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        except errors.FoldoptError:
            return
    ok = layer.last.solved
    assert x[ok].isfinite().all()
    assert x[~ok].isnan().all()
    assert set(layer.last.status) <= {"solved", "infeasible", "unbounded", "nonconvex", "limit reached"}
    if on_failure == "zero" and degenerate != "nan":
        assert all(gradient.isfinite().all() for gradient in gradients)
    tol = 1e-6 * (1 + x[ok].detach().abs().amax(1, keepdim=True))
    for name, side in (("lower", 1), ("upper", -1)):
        if name in args and args[name].numel() and ok.any():
            bound = args[name].detach().expand(x.shape)[ok]
            assert (side * (x[ok] - bound) >= -tol).all() or not bound.abs().max() < 1e8


# A batch whose rows depend on each other (transport with both marginals) and whose x and derivative in Q, p exist.
def transport(B=3, k=2, m=3, seed=0):
    draws = np.random.default_rng(seed)
    A = np.concatenate([np.kron(np.eye(k), np.ones(m)), np.kron(np.ones(k), np.eye(m))])
    programs = []
    for _ in range(B):
        supply, demand = draws.random(k) + 0.3, draws.random(m) + 0.3
        R = draws.normal(size=(k * m, k * m))
        Q, b = R @ R.T / (k * m) + 0.3 * np.eye(k * m), np.r_[supply / supply.sum(), demand / demand.sum()]
        programs.append(Program(Q, 0.5 * draws.normal(size=k * m), A=A, b=b, lower=np.zeros(k * m)))
    return programs


PROGRAMS = transport()
STACKED = stacked(PROGRAMS)
TRUTHS = []


def closed_form(Q, p):
    """x(Q, p) near the data of `PROGRAMS`, by an orthonormal basis of what their active rows leave free."""
    if not TRUTHS:
        TRUTHS.extend(truth(program) for program in PROGRAMS)
    found = []
    for one, Q_, p_ in zip(TRUTHS, Q, p, strict=True):
        x, N = tensor(one.x), tensor(null_space(one.strong, len(one.x)))
        found.append(x - N @ torch.linalg.solve(N.T @ Q_ @ N, N.T @ (Q_ @ x + p_)))
    return torch.stack(found)


def layer_form(layer=None):
    layer = foldopt.QPLayer() if layer is None else layer
    rest = {name: part for name, part in STACKED.items() if name not in ("Q", "p")}
    return lambda Q, p: layer((Q + Q.mT) / 2, p, **rest)


def symmetric(Q):
    return (Q + Q.mT) / 2


def loss(form):
    return lambda Q, p: form(symmetric(Q), p).pow(3).sum()


def near(found, expected, tol=1e-9):
    assert isinstance(found, torch.Tensor) == isinstance(expected, torch.Tensor)
    for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
        if isinstance(a, tuple):
            near(a, b, tol)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=tol * (1 + float(b.abs().max())))


def test_the_batch_is_degenerate_but_differentiable():
    closed_form(STACKED["Q"], STACKED["p"])
    assert all(np.linalg.matrix_rank(one.strong) < len(one.strong) for one in TRUTHS)
    assert any(len(one.strong) > len(PROGRAMS[0].b) for one in TRUTHS), "some bound is active"
    assert all(one.verdict(np.ones(6))[0] == "differentiable" for one in TRUTHS)
    near(layer_form()(STACKED["Q"], STACKED["p"]), closed_form(STACKED["Q"], STACKED["p"]), 1e-12)


def test_gradients_and_second_derivatives_of_a_degenerate_batch():
    at = STACKED["Q"], STACKED["p"]
    found, expected = (torch.func.grad(loss(form), (0, 1))(*at) for form in (layer_form(), closed_form))
    near(found, expected)
    Q, p = (t.clone().requires_grad_() for t in at)
    second = []
    for form in (layer_form(), closed_form):
        first = torch.autograd.grad(loss(form)(Q, p), (Q, p), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), (Q, p)))
    near(*second)
    near(*(hessian(loss(form), 1)(*at) for form in (layer_form(), closed_form)))


def test_forward_mode_jacobians_and_vmap_of_a_degenerate_batch():
    at = STACKED["Q"], STACKED["p"]
    gen = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(t.shape, generator=gen, dtype=F64) for t in at)
    tangents = symmetric(tangents[0]), tangents[1]
    layer = layer_form()
    near(jvp(layer, at, tangents), jvp(closed_form, at, tangents))
    cotangent = torch.randn(3, 6, generator=gen, dtype=F64)
    near(vjp(layer, *at)[1](cotangent)[1], vjp(closed_form, *at)[1](cotangent)[1])
    for jacobian in (jacrev, jacfwd):
        near(jacobian(layer, 1)(*at), jacobian(closed_form, 1)(*at))
    many = STACKED["p"] + 1e-3 * torch.randn(4, 3, 6, generator=gen, dtype=F64)
    near(vmap(layer, (None, 0))(at[0], many), torch.stack([closed_form(at[0], p) for p in many]))
    per = vmap(torch.func.grad(loss(layer), 1), (None, 0))(at[0], many)
    near(per, torch.stack([torch.func.grad(loss(closed_form), 1)(at[0], p) for p in many]))


def test_gradcheck_in_every_argument():
    """Central differences along random directions; forward mode and batched too. Rows, an equality and bounds."""
    args = stacked([regular(0), regular(3)])
    leaves = [part.clone().requires_grad_() for part in args.values()]
    layer = foldopt.QPLayer()

    def x(*parts):
        parts = dict(zip(args, parts, strict=True))
        return call(layer, {**parts, "Q": symmetric(parts["Q"])})

    checks = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(x, leaves, **checks)
    assert torch.autograd.gradgradcheck(x, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_compiled_pickled_and_copied_layers_answer_as_the_layer_does():
    at = STACKED["Q"], STACKED["p"]
    layer = foldopt.QPLayer(on_failure="nan", degenerate="one_sided")
    expected = torch.func.grad(loss(layer_form(layer)), (0, 1))(*at)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), foldopt.QPLayer(**{})):
        near(torch.func.grad(loss(layer_form(clone)), (0, 1))(*at), expected, 1e-14)
    rest = {name: part for name, part in STACKED.items() if name not in ("Q", "p")}
    compiled = torch.compile(lambda Q, p: layer(Q, torch.sin(p), **rest).pow(3).sum(), backend="eager")
    p = torch.asin(at[1].clamp(-0.99, 0.99)).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(compiled(at[0], p), p)
        (direct,) = torch.autograd.grad(layer(at[0], torch.sin(p), **rest).pow(3).sum(), p)
        near(found, direct, 1e-14)


@pytest.mark.parametrize("shared", [True, False], ids=["one layer", "a layer each"])
def test_threads(shared):
    """Two threads at once, with a layer each or one between them, and batches of their own sizes and failures."""
    one = foldopt.QPLayer(on_failure="zero", degenerate="one_sided")
    jobs = [stacked(transport(B=4, seed=1)), with_degenerate(F64)]
    jobs[1]["b"] = jobs[1]["b"].clone()
    jobs[1]["b"][4] = -1

    def work(args, layer):
        leaves = {name: part.clone().requires_grad_() for name, part in args.items()}
        x = call(layer, leaves)
        return x.detach(), *torch.autograd.grad(x.nan_to_num().pow(3).sum(), list(leaves.values()))

    expected = [work(args, foldopt.QPLayer(on_failure="zero", degenerate="one_sided")) for args in jobs]
    found, raised = [[], []], []

    def run(place):
        try:
            layer = one if shared else foldopt.QPLayer(on_failure="zero", degenerate="one_sided")
            for _ in range(4):
                found[place].append(work(jobs[place], layer))
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    for place in range(2):
        assert len(found[place]) == 4
        for answer in found[place]:
            for a, b in zip(answer, expected[place], strict=True):
                atol = 1e-13 * (1 + float(b.abs().nan_to_num().max()))
                torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


@DTYPES
def test_multipliers_satisfy_the_optimality_conditions(dtype):
    programs = [regular(i, upper=0.6) for i in range(12)]
    args = stacked(programs, dtype)
    x, duals = call(foldopt.QPLayer(return_duals=True), args)
    assert x.dtype == duals.A.dtype == duals.G.dtype == duals.bounds.dtype == dtype
    assert duals.A.shape == (12, 1)
    assert duals.G.shape == (12, 1)
    assert duals.bounds.shape == (12, 3)
    eps = 1e-5 if dtype == F32 else 1e-11
    assert (duals.G >= 0).all()
    assert (duals.G > 0.01).any()
    assert (duals.bounds > 0.01).any()
    assert (duals.bounds < -0.01).any()
    left = torch.einsum("bij,bj->bi", args["Q"], x) + args["p"] + duals.bounds
    left = left + torch.einsum("bki,bk->bi", args["A"], duals.A) + torch.einsum("bmi,bm->bi", args["G"], duals.G)
    assert float(left.abs().max()) < eps
    slack = args["h"] - torch.einsum("bmi,bi->bm", args["G"], x)
    assert float((duals.G * slack).abs().max()) < eps
    assert float((duals.bounds.clamp(min=0) * (args["upper"] - x)).abs().max()) < eps
    assert float((duals.bounds.clamp(max=0) * (x - args["lower"])).abs().max()) < eps
    none = foldopt.QPLayer(return_duals=True)(args["Q"], args["p"])[1]
    assert (none.A.shape, none.G.shape, none.bounds.shape) == ((12, 0), (12, 0), (12, 3))


def test_derivatives_of_multipliers_against_differences():
    args = stacked([regular(i, upper=0.6) for i in range(6)])
    layer = foldopt.QPLayer(return_duals=True)
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, size, generator=gen, dtype=F64) for size in (3, 1, 1, 3)]

    def value(args):
        x, duals = call(layer, args)
        parts = (x, duals.A, duals.G, duals.bounds)
        return torch.stack([(part * w).sum(1) for part, w in zip(parts, weights, strict=True)])

    for name in args:
        leaf = args[name].clone().requires_grad_()
        d = torch.randn(leaf.shape, generator=gen, dtype=F64)
        d = symmetric(d) if name == "Q" else d
        answers = value({**args, name: leaf})
        for output in range(4):
            (gradient,) = torch.autograd.grad(answers[output].sum(), leaf, retain_graph=True)
            ends = [value({**args, name: args[name] + s * 1e-6 * d})[output].detach() for s in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-6
            found = (gradient * d).flatten(1).sum(1)
            torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


def test_multipliers_of_an_infeasible_sample_are_nan_and_its_gradient_zero():
    args, (bad,) = with_failures(("infeasible",), F64)
    leaves = {name: part.clone().requires_grad_() for name, part in args.items()}
    x, duals = call(foldopt.QPLayer(return_duals=True, on_failure="zero"), leaves)
    assert all(part[bad].isnan().all() for part in (x, duals.A, duals.G, duals.bounds))
    total = sum(part.square().nan_to_num().sum() for part in (x, duals.A, duals.G, duals.bounds))
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert gradient.isfinite().all(), name
        assert (gradient[bad] == 0).all(), name


# The closest feasible program: shift h by s >= 0 and b by t so that a point exists, (s, t) of least norm; then solve.
def closest(program, norm):
    """Return x by two independent solves. Rows that had to shift are met with equality."""
    n, m, k = program.n, len(program.h), len(program.b)
    eye, zero = np.eye(m + k), np.zeros
    if norm == "l2":
        Q, p = np.diag(np.r_[zero(n), np.ones(m + k)]), zero(n + m + k)
        G, h = np.concatenate([program.G, -eye[:m]], 1), program.h
        lower = np.r_[program.lower, zero(m), np.full(k, -np.inf)]
        A, upper = np.concatenate([program.A, -eye[m:]], 1), np.r_[program.upper, np.full(m + k, np.inf)]
    else:  # b + t - r with t, r >= 0
        eye = np.concatenate([eye, -eye[m:]])
        Q, p = zero((n + m + 2 * k,) * 2), np.r_[zero(n), np.ones(m + 2 * k)]
        G, h = np.concatenate([program.G, -eye[:, :m].T], 1), program.h
        A = np.concatenate([program.A, -eye[:, m:].T], 1)
        lower, upper = np.r_[program.lower, zero(m + 2 * k)], np.r_[program.upper, np.full(m + 2 * k, np.inf)]
    found = truth(Program(Q, p, G, h, A, program.b, lower, upper))
    s, t = found.x[n : n + m], found.x[n + m :]
    t = t if norm == "l2" else t[:k] - t[k:]
    shifted = s > 1e-9
    return truth(
        Program(
            program.Q,
            program.p,
            program.G[~shifted],
            program.h[~shifted],
            np.concatenate([program.A, program.G[shifted]]),
            np.r_[program.b + t, (program.h + s)[shifted]],
            program.lower,
            program.upper,
        )
    ).x


def empty(seed):
    """5 rows and an equality that no point of a box of 4 variables satisfies; generic, so the least shift is unique."""
    draws = np.random.default_rng(seed)
    G, A = draws.normal(size=(5, 4)), draws.normal(size=(1, 4))
    h = 0.3 * draws.normal(size=5) - 1.5
    return Program(np.eye(4), draws.normal(size=4), G, h, A, draws.normal(size=1), np.full(4, -1), np.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_closest_feasible_program_against_independent_solves(norm):
    programs = [one for one in map(empty, range(30)) if truth(one).status == "infeasible"][:8]
    assert len(programs) == 8
    inside = Program(np.eye(4), np.ones(4), np.eye(5, 4), np.ones(5), np.ones((1, 4)), [1], np.full(4, -1), np.ones(4))
    expected = np.stack([closest(one, norm) for one in programs] + [truth(inside).x])
    args = stacked([*programs, inside])
    layer = foldopt.QPLayer(closest_feasible=norm)
    x = call(layer, args)
    torch.testing.assert_close(x, torch.tensor(expected), rtol=0, atol=1e-7)
    assert layer.last.status == ("solved",) * 9
    assert (x[-1] - call(foldopt.QPLayer(), stacked([inside]))[0]).abs().max() < 1e-12, "a feasible one is left alone"
    with pytest.raises(errors.InfeasibleError):
        call(foldopt.QPLayer(), args)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", ["p", "h", "b", "G", "A"])
def test_the_closest_feasible_program_is_differentiated(norm, name):
    programs = [one for one in map(empty, range(30)) if truth(one).status == "infeasible"][:6]
    args, weight = stacked(programs), np.array([1.0, 2.0, -1.0, 0.5])
    _, _, gradients = asked(args, weight, wrt=(name,), closest_feasible=norm, degenerate="one_sided")
    draws = np.random.default_rng(0)
    for program, gradient in zip(programs, gradients[name].numpy(), strict=True):
        d = draws.normal(size=gradient.shape)
        ends = [closest(program.moved(**{name: s * 1e-6 * d}), norm) @ weight for s in (1, -1, 0)]
        slope = (ends[0] - ends[1]) / 2e-6
        if abs(ends[0] + ends[1] - 2 * ends[2]) > 1e-9:  # a kink is near
            continue
        assert (gradient * d).sum() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_a_program_that_only_bounds_contradict_stays_infeasible():
    args = stacked([Program(np.eye(2), [1, 1], np.ones((1, 2)), [1], lower=[1, 1], upper=[0, 2])])
    layer = foldopt.QPLayer(closest_feasible="l2", on_failure="nan")
    assert call(layer, args).isnan().all()
    assert layer.last.status == ("infeasible",)
