"""Properties of QPLayer: other units only rescale an answer, and samples do not influence each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foldopt
from tests.drawn import properties, seeds
from tests.foldopt.qp.programs import F32, F64, Program, close, stacked, tensor, truth
from tests.foldopt.qp.sparse import arguments, asked, call

POWERS = st.integers(-8, 8)
REGULAR = settings(properties, max_examples=25)


def degenerate(seed):
    """A convex program of small integers, so that ties, dependent rows and multipliers of 0 are common."""
    draws = np.random.default_rng(seed)
    n, m, k = draws.integers(1, 6), draws.integers(0, 7), draws.integers(0, 3)
    R = draws.integers(-2, 3, size=(draws.integers(0, n + 1), n))
    x = draws.integers(-2, 3, size=n)
    G, A = draws.integers(-1, 2, size=(m, n)), draws.integers(-1, 2, size=(k, n))
    if draws.random() < 0.3 and k:
        A = np.concatenate([A, A.sum(0, keepdims=True)])
    h = G @ x + np.where(draws.random(m) < 0.6, 0, draws.integers(0, 3, size=m))
    return Program(
        R.T @ R,
        draws.integers(-3, 4, size=n),
        G,
        h,
        A,
        A @ x,
        lower=np.where(draws.random(n) < 0.7, x - draws.integers(0, 3, size=n), -np.inf),
        upper=np.where(draws.random(n) < 0.5, x + draws.integers(0, 3, size=n), np.inf),
    )


def outcome(args, weight):
    """Return the status, x, and the verdict and the gradient of p under the policy "one_sided"."""
    args = {name: part.clone() for name, part in args.items()}
    args["p"].requires_grad_()
    layer = foldopt.QPLayer(on_failure="nan", degenerate="one_sided")
    x = call(layer, args)
    if layer.last.status != ("solved",):
        return layer.last.status[0], None, None, None
    (gradient,) = torch.autograd.grad((x * torch.as_tensor(weight, dtype=x.dtype)).sum(), args["p"])
    return "solved", x.detach()[0].double().numpy(), layer.last.verdict[0], gradient.double().numpy()


def agrees(expected, weight, found):
    """Compare an outcome with the truth; at an end of a segment of solutions the verdict may also be a kink."""
    assert found[0] == expected.status
    if expected.status != "solved":
        return
    verdict, gradient = expected.verdict(weight)
    assert found[2] == verdict or (verdict == "not unique" and found[2] == "kink")
    if verdict == "differentiable":
        assert np.abs(found[3] - gradient).max() <= 1e-6 * max(1, np.abs(gradient).max())


def unique(program, expected):
    return all(expected.verdict(e)[0] != "not unique" for e in np.eye(program.n))


@REGULAR
@given(seed=seeds)
def test_integer_programs_are_right(seed):
    program = degenerate(seed)
    expected, weight = truth(program), np.random.default_rng(seed).normal(size=program.n)
    found = outcome(arguments(program), weight)
    agrees(expected, weight, found)
    if expected.status == "solved" and unique(program, expected):
        assert np.abs(found[1] - expected.x).max() <= 1e-9 * max(1, np.abs(expected.x).max())


@REGULAR
@given(seed=seeds, cost=POWERS)
def test_the_unit_of_the_cost_changes_the_gradient_by_its_factor_and_nothing_else(seed, cost):
    program, cost = degenerate(seed), 10.0**cost
    expected, weight = truth(program), np.random.default_rng(seed).normal(size=program.n)
    args = arguments(program)
    args["Q"], args["p"] = cost * args["Q"], cost * args["p"]
    status, x, verdict, gradient = outcome(args, weight)
    agrees(expected, weight, (status, x, verdict, gradient if gradient is None else cost * gradient))
    if expected.status == "solved" and unique(program, expected):
        assert np.abs(x - expected.x).max() <= 1e-9 * max(1, np.abs(expected.x).max())


@REGULAR
@given(seed=seeds, one=POWERS, each=st.booleans())
def test_the_units_of_the_rows_change_nothing(seed, one, each):
    program = degenerate(seed)
    expected, weight = truth(program), np.random.default_rng(seed).normal(size=program.n)
    draws, args = np.random.default_rng(seed + 1), arguments(program)
    for rows, right in (("G", "h"), ("A", "b")):
        m = len(args[right])
        factors = tensor(10.0 ** (draws.integers(-8, 9, size=m) if each else np.full(m, one)))
        args[rows], args[right] = factors[:, None] * args[rows], factors * args[right]
    found = outcome(args, weight)
    agrees(expected, weight, found)
    if expected.status == "solved" and unique(program, expected):
        assert np.abs(found[1] - expected.x).max() <= 1e-9 * max(1, np.abs(expected.x).max())


@REGULAR
@given(seed=seeds, one=POWERS, each=st.booleans())
def test_the_units_of_the_variables_change_x_by_their_factors(seed, one, each):
    """x = D x': Q becomes DQD, p becomes Dp, a row a becomes aD; the gradient in p is divided by D."""
    program = degenerate(seed)
    expected, weight = truth(program), np.random.default_rng(seed).normal(size=program.n)
    powers = np.random.default_rng(seed + 1).integers(-8, 9, size=program.n) if each else np.full(program.n, one)
    D, args = tensor(10.0**powers), arguments(program)
    args["Q"], args["p"] = D[:, None] * args["Q"] * D, D * args["p"]
    args["G"], args["A"] = args["G"] * D, args["A"] * D
    args["lower"], args["upper"] = args["lower"] / D, args["upper"] / D
    D = D.numpy()
    status, x, verdict, gradient = outcome(args, weight * D)
    agrees(expected, weight, (status, x, verdict, gradient if gradient is None else D * gradient))
    if expected.status == "solved" and unique(program, expected):
        assert np.abs(D * x - expected.x).max() <= 1e-9 * max(1, np.abs(expected.x).max())


@REGULAR
@given(seed=seeds, cost=POWERS, rows=POWERS, sums=POWERS)
def test_a_portfolio_in_other_units(seed, cost, rows, sums):
    """A well-conditioned program whose bounds, equality and objective are each in units of their own."""
    draws = np.random.default_rng(seed)
    n = 10
    R, p, weight = draws.normal(size=(n, n)), 0.3 * draws.normal(size=n), draws.normal(size=n)
    Q = R @ R.T / n + np.eye(n)
    G, h = (-np.eye(n), np.zeros(n)) if seed % 2 else (draws.random((2, n)), np.full(2, 0.3))
    expected = truth(Program(Q, p, G, h, np.ones((1, n)), [1]))
    c, r, s = 10.0**cost, 10.0**rows, 10.0**sums
    program = Program(c * Q, c * p, r * G, r * h, s * np.ones((1, n)), [s])
    _, x, gradients = asked(arguments(program), weight)
    close(x, expected.x)
    close(c * gradients["p"], expected.gradient(weight), rtol=1e-8)


def family(seed, B):
    """Feasible programs of one shape with small integers."""
    draws = np.random.default_rng(seed)
    n, m, k = 4, 5, 2
    programs = []
    for _ in range(B):
        R = draws.integers(-2, 3, size=(draws.integers(1, n + 1), n))
        G, A, x = draws.integers(-1, 2, size=(m, n)), draws.integers(-1, 2, size=(k, n)), draws.integers(0, 2, size=n)
        h = G @ x + draws.integers(0, 2, size=m)
        p = draws.integers(-3, 4, size=n)
        programs.append(Program(R.T @ R, p, G, h, A, A @ x, lower=np.full(n, -3), upper=np.full(n, 3)))
    return programs


BAD = {
    "infeasible": lambda args, i: args["b"][i].copy_(tensor([100.0, -100.0])),
    "nonconvex": lambda args, i: args["Q"][i].copy_(torch.diag(tensor([1.0, -1, 1, 1]))),
    "unbounded": lambda args, i: [
        args["Q"][i].zero_(),
        args["p"][i].fill_(1),
        args["G"][i].zero_(),
        args["h"][i].zero_(),
        args["A"][i].zero_(),
        args["b"][i].zero_(),
        args["lower"][i].fill_(-torch.inf),
    ],
}


def solved(args, weight, **options):
    layer = foldopt.QPLayer(on_failure="zero", degenerate="one_sided", **options)
    args = {name: part.clone().requires_grad_() for name, part in args.items()}
    x = call(layer, args)
    gradients = torch.autograd.grad((x.nan_to_num() * weight).sum(), list(args.values()))
    return layer, [x.detach(), *gradients]


def same(found, expected, atol=1e-13):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol * (1 + float(b.nan_to_num().abs().max())), equal_nan=True)


@pytest.mark.slow
@properties
@given(seed=seeds, place=st.integers(0, 8), cause=st.sampled_from(sorted(BAD)))
def test_a_bad_sample_changes_nothing_for_the_others(seed, place, cause):
    args, weight = stacked(family(seed, 9)), torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    layer, expected = solved(args, weight)
    spoilt = {name: part.clone() for name, part in args.items()}
    BAD[cause](spoilt, place)
    other, found = solved(spoilt, weight)
    keep = [i for i in range(9) if i != place]
    assert other.last.status[place] == cause
    assert [other.last.status[i] for i in keep] == [layer.last.status[i] for i in keep]
    assert [other.last.verdict[i] for i in keep] == [layer.last.verdict[i] for i in keep]
    same([part[keep] for part in found], [part[keep] for part in expected])
    assert found[0][place].isnan().all()
    assert all((part[place] == 0).all() for part in found[1:])


@pytest.mark.slow
@properties
@given(seed=seeds)
def test_the_size_of_a_batch_changes_nothing(seed):
    args, weight = stacked(family(seed, 6)), torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    layer, together = solved(args, weight)
    for rows in ([0], [3], [4, 1], [5, 4, 3, 2, 1, 0]):
        other, found = solved({name: part[rows] for name, part in args.items()}, weight)
        assert other.last.status == tuple(layer.last.status[i] for i in rows)
        assert other.last.verdict == tuple(layer.last.verdict[i] for i in rows)
        same(found, [part[rows] for part in together])


@properties
@given(seed=seeds)
def test_float32_is_solved_in_float64_from_its_converted_data(seed):
    draws = np.random.default_rng(seed)
    programs = family(seed, 5)
    for program in programs:  # with numbers that float32 has to round
        program.p = program.p + draws.normal(size=program.n)
        program.h = program.h + draws.random(len(program.h)) / 3
    low = stacked(programs, F32)
    weight = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=F32)
    layer, found = solved(low, weight)
    other, expected = solved({name: part.double() for name, part in low.items()}, weight.double())
    assert layer.last.status == other.last.status
    assert layer.last.verdict == other.last.verdict
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == F32
        torch.testing.assert_close(a, b.to(F32), rtol=2e-7, atol=1e-30)
