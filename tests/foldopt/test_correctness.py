"""Problems x layers x linear solvers x dtypes x batches, each judged three ways: see `tests.foldopt.cases`."""

import pytest
import torch

from foldopt.errors import LinearSolveError
from foldopt.linear_solve import SOLVERS
from tests.foldopt.cases import CASES
from tests.foldopt.programs import F64

INSTANCES = 200


def instances(case, batch, seed=0):
    return [p.requires_grad_() for p in CASES[case].params(torch.Generator().manual_seed(seed), batch)]


def gradients(case, x, params):
    """Of a random functional of x, the same for every way to compute x."""
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = torch.autograd.grad((x * weight.to(x)).sum(), params)
    return [(g + g.mT) / 2 if i in CASES[case].symmetric else g for i, g in enumerate(found)]


def floored(size):
    """Sizes to divide by: gradients that vanish (vertices) are compared on the scale of the others."""
    return size.clamp(min=max(1e-3 * float(size.max()), 1e-9))


def worst_error(case, mine, exact):
    """The largest relative error, of each sample's gradient by itself where the parameter is batched."""
    errors = []
    for i, (a, b) in enumerate(zip(mine, exact, strict=True)):
        shape = (len(b), -1) if i in CASES[case].batched else (1, -1)
        a, b = a.to(b).reshape(shape), b.reshape(shape)
        size = b.norm(dim=1)
        errors.append(float(((a - b).norm(dim=1) / floored(size)).max()))
    return max(errors)


@pytest.mark.parametrize("batch", [INSTANCES, 1])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_against_an_independent_derivation(case, solver, batch):
    row = CASES[case]
    params = instances(case, batch)
    layer = row.layer(linear_solver=solver)
    x, exact = layer(*params), row.exact(*params)
    torch.testing.assert_close(x, exact, rtol=1e-7, atol=1e-7)
    if solver in row.unsolved:
        with pytest.raises(LinearSolveError):
            gradients(case, x, params)
        return
    assert worst_error(case, gradients(case, x, params), gradients(case, exact, params)) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_float32_parameters_and_answers(case):
    """In float64 inside; the gradient is the exact one at the rounded parameters, itself rounded."""
    row = CASES[case]
    low = [p.detach().float().requires_grad_() for p in instances(case, INSTANCES)]
    high = [p.detach().double().requires_grad_() for p in low]
    x, exact = row.layer(dtype=F64)(*low), row.exact(*high)
    assert x.dtype == torch.float32
    mine, exact = gradients(case, x, low), gradients(case, exact, high)
    assert all(g.dtype == torch.float32 for g in mine)
    assert worst_error(case, mine, exact) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_tangents_against_central_differences_of_the_solver(case):
    """Every parameter moves at once."""
    row = CASES[case]
    params = [p.detach() for p in instances(case, INSTANCES)]
    gen = torch.Generator().manual_seed(3)
    directions = []
    for i, p in enumerate(params):
        d = torch.randn(p.shape, generator=gen, dtype=F64) * p.abs().max().clamp(min=1e-12)
        directions.append((d + d.mT) / 2 if i in row.symmetric else d)
    _, tangent = torch.func.jvp(row.layer(), tuple(params), tuple(directions))
    layer = row.layer(on_failure="zero")  # beside a kink, the solver's answer is less than tight

    def difference(h):
        ends = {t: layer(*(p + t * h * d for p, d in zip(params, directions, strict=True))) for t in (-2, -1, 1, 2)}
        return (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * h)

    with torch.no_grad():
        wide, narrow = difference(4e-4), difference(2e-4)
    size = floored(narrow.norm(dim=1))
    smooth = (wide - narrow).norm(dim=1) < 1e-6 * size  # no kink between the ends
    assert smooth.double().mean() > 0.8
    assert float(((tangent - narrow).norm(dim=1) / size)[smooth].max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row.unrolled])
def test_gradients_against_a_long_unroll(case):
    row = CASES[case]
    params = instances(case, 20)
    folded, unrolled = row.layer()(*params), row.unrolled(*params)
    torch.testing.assert_close(unrolled, folded, rtol=1e-7, atol=1e-7)
    assert worst_error(case, gradients(case, unrolled, params), gradients(case, folded, params)) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch(case):
    params = [
        (p[:0] if i in CASES[case].batched else p).detach().requires_grad_() for i, p in enumerate(instances(case, 2))
    ]
    x = CASES[case].layer()(*params)
    assert len(x) == 0
    for p, g in zip(params, torch.autograd.grad(x.sum(), params, allow_unused=True), strict=True):
        assert g is None or torch.equal(g, torch.zeros_like(p))
