"""The multipliers that QPLayer returns: optimality conditions, derivatives, and NaN in failed samples."""

import torch

import foldopt
from tests.foldopt.qp.batches import regular, with_failures
from tests.foldopt.qp.programs import DTYPES, F32, F64, stacked, symmetric
from tests.foldopt.qp.sparse import call


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
