"""Sparse programs give the same answers as dense ones, on hard cases and on integer programs with exact truth."""

import warnings

import numpy as np
import pytest
import torch

import foldopt
from experiments.benchmark import integer_sweep
from foldopt import errors
from foldopt.qp.matrix import Pattern, SparseMatrix
from tests.foldopt.qp.batches import DEGENERATE, WEIGHT, same, with_degenerate
from tests.foldopt.qp.hard_cases import FACES, KINKS, REFUSED, RIGHT, TIES
from tests.foldopt.qp.programs import F32, F64, stacked, tensor, truth
from tests.foldopt.qp.sparse import all_sparse, arguments, asked, call, densely

VECTORS = ("p", "h", "b", "lower", "upper")


@pytest.mark.parametrize("name", RIGHT)
def test_the_hard_cases_have_their_solutions_and_gradients(name):
    program, x, weight, gradient = RIGHT[name]
    layer, found, gradients = asked(all_sparse(arguments(program)), weight)
    x, gradient = torch.tensor(x, dtype=F64), torch.tensor(gradient, dtype=F64)
    torch.testing.assert_close(found[0], x, rtol=0, atol=1e-9 * float(x.abs().max()) or 1e-12)
    torch.testing.assert_close(gradients["p"], gradient, rtol=0, atol=1e-9 * max(1, float(gradient.abs().max())))
    assert layer.last.status == ("solved",)
    assert layer.last.verdict == ("differentiable",)


@pytest.mark.parametrize("name", TIES)
def test_any_of_several_solutions_will_do(name):
    program, weight, other = TIES[name]
    args = all_sparse(arguments(program))
    layer, x, gradients = asked(args, weight)
    found, y = truth(program).x, x[0].numpy()
    assert y @ program.Q @ y / 2 + program.p @ y == pytest.approx(found @ program.Q @ found / 2 + program.p @ found)
    assert layer.last.verdict == ("differentiable",)
    assert float(gradients["p"].abs().max()) < 1e-9
    with pytest.raises(errors.NotUniqueError):
        asked(args, other)


@pytest.mark.parametrize("name", KINKS)
def test_kinks_are_seen(name):
    program, weight, gradient, other = KINKS[name]
    args = all_sparse(arguments(program))
    layer, _, gradients = asked(args, weight)
    torch.testing.assert_close(gradients["p"], tensor(gradient), rtol=0, atol=1e-9)
    assert layer.last.verdict == ("differentiable",)
    with pytest.raises(errors.KinkError) as caught:
        asked(args, other)
    assert caught.value.indices == (0,)


@pytest.mark.parametrize("name", REFUSED)
def test_the_cause_is_named(name):
    program, cause = REFUSED[name]
    args = all_sparse(arguments(program))
    with pytest.raises(cause) as caught:
        call(foldopt.QPLayer(), args)
    assert caught.value.indices == (0,)
    layer, dense = foldopt.QPLayer(on_failure="nan"), foldopt.QPLayer(on_failure="nan")
    assert call(layer, args).isnan().all()
    call(dense, arguments(program))
    assert layer.last.status == dense.last.status


def outcome(args, weight, wrt, **options):
    """Return the layer's verdicts, or its error with the samples that it names, and the layer's gradients."""
    try:
        layer, _, gradients = asked(args, weight, [name for name in wrt if name in args], **options)
    except errors.FoldoptError as error:
        return (type(error), error.indices), {}
    return (layer.last.status, layer.last.verdict), gradients


DOUBTFUL = {
    **{name: (program, weight) for name, (program, weight, _) in FACES.items()},
    **{f"{name}, another weight": (one[0], one[-1]) for name, one in {**TIES, **KINKS}.items()},
    **{name: RIGHT[name][::2] for name in RIGHT if "row" in name or "equalit" in name or "assignment" in name},
}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raise", "one_sided", "least_norm", "nan", "zero"])
def test_every_policy_says_what_it_says_of_dense_programs(policy):
    """Compare the gradients where x is unique, except those of dependent rows, which have several one-sided ones."""
    differing, verdicts = [], set()
    for name, (program, weight) in DOUBTFUL.items():
        dense, plain = outcome(arguments(program), weight, VECTORS, degenerate=policy)
        said, gradients = outcome(all_sparse(arguments(program)), weight, VECTORS, degenerate=policy)
        verdicts.add(dense[1])
        if said != dense or gradients.keys() != plain.keys():
            differing.append((name, dense, said))
        elif policy != "one_sided" or dense[1] == ("differentiable",):
            for argument, expected in plain.items():
                atol = 1e-8 * (1 + float(expected.nan_to_num().abs().max()))
                torch.testing.assert_close(gradients[argument], expected, rtol=0, atol=atol, equal_nan=True)
    assert differing == []
    if policy != "raise":
        assert verdicts == {("differentiable",), ("kink",), ("not unique",), ("dependent rows",)}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("policy", ["one_sided", "least_norm", "warn", "nan", "zero", "raise"])
def test_degenerate_samples_of_a_batch_under_each_policy(policy, dtype):
    args, places, keep = with_degenerate(dtype), [1, 2, 3], [0, 4]
    made = all_sparse(args)
    if policy == "raise":
        with pytest.raises(errors.DegenerateError) as caught:
            asked(made, WEIGHT, args)
        assert set(caught.value.indices) <= set(places)
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        layer, _, gradients = asked(made, WEIGHT, args, degenerate=policy)
    assert (policy == "warn") == any(
        "not unique" in str(one.message) and "first [3]" in str(one.message) for one in warned
    )
    assert layer.last.verdict == ("differentiable", "kink", "dependent rows", "not unique", "differentiable")
    _, _, expected = asked(all_sparse({name: part[keep] for name, part in args.items()}), WEIGHT, args)
    for name, gradient in gradients.items():
        full, fresh = densely(gradient, made[name]), expected[name]
        same(full[keep], fresh if fresh.layout == torch.strided else fresh.to_dense(), tol=1e-12)
        if policy == "zero":
            assert (full[places] == 0).all(), name
        elif policy == "nan":
            values = gradient if gradient.layout == torch.strided else gradient.values().view(5, -1)
            assert values[places].isnan().all(), name
        else:
            assert full.isfinite().all(), name
    if policy in ("one_sided", "warn", "least_norm"):
        assert float(gradients["b"][2].sum() + gradients["h"][2].sum()) == pytest.approx(7 / 3, rel=1e-5)


def test_the_errors_of_degenerate_samples_are_those_of_dense_ones():
    for name, (program, cause) in DEGENERATE.items():
        args = all_sparse(stacked([program]))
        with pytest.raises(cause):
            asked(args, WEIGHT, args)
        said = [outcome(made, np.ones(3), ("p",)) for made in (args, stacked([program]))]
        assert said[0][0] == said[1][0] == (("solved",), ("differentiable",)), name


class SparseLayer(foldopt.QPLayer):
    """A layer that makes its matrices sparse; a matrix that needs a gradient keeps all of its entries."""

    def forward(self, Q, p, G=None, h=None, A=None, b=None, *, lower=None, upper=None):
        Q, G, A = (self.taken(M) for M in (Q, G, A))
        return super().forward(Q, p, G, h, A, b, lower=lower, upper=upper)

    @staticmethod
    def taken(M):
        if not M.requires_grad:
            return M.to_sparse()
        rows, columns = torch.ones(M.shape[-2:]).nonzero(as_tuple=True)
        return SparseMatrix(Pattern(rows, columns, tuple(M.shape[-2:])), M.flatten(-2))


FOUND = integer_sweep.samples(70_000, 90, 12)


@pytest.mark.slow
@pytest.mark.parametrize("asked_for", ["p", "right-hand sides"])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batches"])
def test_integer_programs_whose_truth_is_exact(asked_for, batched, monkeypatch):
    monkeypatch.setattr(foldopt, "QPLayer", SparseLayer)
    if batched:
        answers = [one for group in integer_sweep.grouped(FOUND) for one in integer_sweep.together(group, asked_for)]
    else:
        answers = [one for sample in FOUND for one in integer_sweep.alone(sample, asked_for)]
    assert [str(answer) for answer in answers if not answer.as_true] == []
    assert sum(answer.said == integer_sweep.RIGHT for answer in answers) > 45


def test_one_sided_derivatives_at_kinks_are_those_of_a_smooth_piece(monkeypatch):
    monkeypatch.setattr(foldopt, "QPLayer", SparseLayer)
    kinks = [
        (sample, which)
        for sample in FOUND
        for which, derivative in enumerate(sample.derivatives)
        if derivative.verdict == "kink" and sample.truth.unique and not derivative.isolated
    ]
    assert len(kinks) > 10
    assert {integer_sweep.one_sided(*kink) for kink in kinks} == {"the gradient of a smooth piece"}


@pytest.mark.parametrize("seed", [50_023, 50_037])
def test_a_linear_program_that_only_rounding_satisfies_is_infeasible(seed):
    """The last x of a solver for an infeasible program may be so large that the rows hold to rounding."""
    sample = integer_sweep.sample(seed, integer_sweep.draw_infeasible)
    layer = foldopt.QPLayer(on_failure="nan")
    assert call(layer, all_sparse(integer_sweep.arguments([sample.program]))).isnan().all()
    assert layer.last.status == ("infeasible",)
