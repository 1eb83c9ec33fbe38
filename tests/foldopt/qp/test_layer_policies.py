"""The result of QPLayer under each policy if samples fail or have no derivative."""

import warnings

import numpy as np
import pytest
import torch

from foldopt import errors
from tests.foldopt.qp import sparse
from tests.foldopt.qp.batches import DEGENERATE, FAILURES, WEIGHT, regular, same, with_degenerate, with_failures
from tests.foldopt.qp.hard_cases import I3, ONES
from tests.foldopt.qp.programs import ARGUMENTS, DTYPES, Program, null_space, stacked, truth
from tests.foldopt.qp.sparse import arguments


def asked(args, weight=WEIGHT, wrt=ARGUMENTS, **options):
    """Return the layer, x and the gradients of weight'x in `wrt`, by name."""
    return sparse.asked(args, weight, wrt, **options)


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
    """Every sample has its own h; the third requires x_1 + x_2 + x_3 <= -1 and x >= 0."""
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
    """The program is not convex; in two of the cases one right-hand side is much larger than the others."""
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
        for held in ([], [1], [2], [1, 2]):  # which of the two bounds without a multiplier is kept
            N = null_space(np.concatenate([ONES, I3[held]]), 3)
            pieces.append(-N @ N.T @ WEIGHT)
        found = gradients["p"][1].double().numpy()
        assert min(np.abs(found - piece).max() for piece in pieces) < 1e-5
    if policy in ("one_sided", "warn", "least_norm"):  # dependent rows that are moved by the same amount
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
