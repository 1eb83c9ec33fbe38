"""Quadratic programs with few rows: what the reduction to them finds, what it refuses, and when it is made anew."""

import pytest
import torch

import foldopt
from foldopt.solvers.qp import solve_qp
from foldopt.solvers.saddle import Saddle
from tests.foldopt.programs import F64, quadratic_programs, solve_by_kkt

FEW = {"n": 12, "m": 8, "k": 2}


def expanded(data):
    B = len(data[1])
    return [t.detach().expand(B, *t.shape[-d:]) for t, d in zip(data, (2, 1, 2, 1, 2, 1), strict=True)]


def minimized(data):
    Q, p, G, h, A, b = expanded(data)
    C, limits = torch.cat([A, G], 1), torch.cat([b, h], 1)
    return Saddle.of(Q, C).minimize(Q, p, C, limits, b.shape[1])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("k", [0, 2])
def test_the_active_set_found_among_the_rows_is_that_of_the_kkt_system(scale, k):
    """In x of any unit: p and the limits scale with it, the multipliers too."""
    Q, p, G, h, A, b = (t.detach() for t in quadratic_programs(n=12, m=8, k=k))
    data = (Q, scale * p, G, scale * h, A, scale * b)
    x, y, ok = minimized(data)
    found = solve_by_kkt(*data)
    assert ok.all()
    assert 0 < float(found.active.double().mean()) < 1
    torch.testing.assert_close(x, found.x, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(y, torch.cat([found.nu, found.lam], 1), rtol=1e-8, atol=1e-8 * scale)


def test_programs_as_large_as_in_the_benchmark():
    data = quadratic_programs(B=32, n=100, m=50, k=0)
    x, _, ok = minimized(data)
    assert ok.all()
    torch.testing.assert_close(x, solve_by_kkt(*data).x, rtol=1e-9, atol=1e-9)


def test_what_it_refuses():
    Q, eye = torch.eye(3, dtype=F64)[None], torch.eye(3, dtype=F64)[None]
    assert Saddle.of(Q, eye) is not None
    assert Saddle.of(Q, torch.cat([eye, eye], 1)) is None, "more rows than columns"
    assert Saddle.of(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64))[None], eye) is None, "singular"
    nearly = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0 + 1e-10, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    assert Saddle.of(nearly[None], eye) is None, "nearly so"
    assert Saddle.of(torch.diag(torch.tensor([1.0, 1.0, 1e-12], dtype=F64))[None], eye), "units of a variable"
    assert Saddle.of(-Q, eye) is None
    assert Saddle.of(torch.cat([Q, -Q]), torch.cat([eye, eye])) is None, "one sample is enough"


def test_an_infeasible_sample_and_dependent_rows():
    Q, p = torch.eye(4, dtype=F64).expand(3, 4, 4), torch.zeros(3, 4, dtype=F64)
    row = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64)
    C = torch.stack([row, -row]).expand(3, 2, 4)
    limits = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]], dtype=F64)  # x1 + x2 <= l1, >= -l2
    x, _, clear = Saddle.of(Q, C).minimize(Q, p, C, limits, 0)
    assert clear.tolist() == [True, False, False], "0 is inside; nothing is; a row without slack is not clear"
    x = foldopt.QPLayer(on_failure="nan")(Q, p, C, limits)
    assert x[1].isnan().all()
    torch.testing.assert_close(x[2], -row / 2)


def test_where_block_pivoting_cycles_the_interior_point_takes_over(monkeypatch):
    monkeypatch.setattr("foldopt.solvers.saddle.PIVOTS", 2)
    data = quadratic_programs(B=100, **FEW)
    _, _, ok = minimized(data)
    assert 0 < int(ok.sum()) < 100
    torch.testing.assert_close(foldopt.QPLayer()(*data), solve_by_kkt(*data).x, rtol=0, atol=1e-9)


def test_a_matrix_written_to_is_factored_anew():
    """In the layer, whichever way it was written to; in a step that comes later, where PyTorch can tell."""
    Q, *rest = (t.detach() for t in quadratic_programs(B=5, **FEW))
    layer = foldopt.QPLayer()
    layer(Q, *rest)
    for write in (lambda: Q.mul_(2), lambda: Q.data.mul_(2)):
        write()
        torch.testing.assert_close(layer(Q, *rest), solve_by_kkt(Q, *rest).x, rtol=0, atol=1e-9)
    none = torch.zeros(0, dtype=F64)
    state = tuple(part.detach() for part in layer.fold(Q, *rest, none, none))
    before = layer.update(state, Q, *rest, none, none)
    torch.testing.assert_close(before, state, rtol=0, atol=1e-12)
    Q.add_(1e-5 * torch.eye(len(Q), dtype=F64))  # near enough for the step to be one
    after = layer.update(state, Q, *rest, none, none)
    fresh = foldopt.QPLayer().update(state, Q, *rest, none, none)
    assert (before[0] - after[0]).abs().max() > 1e-8
    torch.testing.assert_close(after, fresh, rtol=0, atol=1e-12)


def test_in_inference_mode():
    data = quadratic_programs(B=5, **FEW)
    with torch.inference_mode():
        x = foldopt.QPLayer()(*data)
    torch.testing.assert_close(x, solve_by_kkt(*data).x.detach(), rtol=0, atol=1e-9)


def test_backward_after_another_batch_has_been_through_the_layer():
    first, second = (quadratic_programs(B=5, seed=seed, **FEW) for seed in (0, 1))
    layer, alone = foldopt.QPLayer(), foldopt.QPLayer()
    x = layer(*first)
    layer(*second)
    mine = torch.autograd.grad(x.square().sum(), first)
    expected = torch.autograd.grad(alone(*first).square().sum(), first)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_matrix_that_is_not_symmetric_counts_by_its_symmetric_part():
    Q, *rest = (t.detach() for t in quadratic_programs(B=20, **FEW))
    skew = torch.triu(torch.ones_like(Q), 1)
    lopsided = (Q + skew - skew.T).requires_grad_()
    x = foldopt.QPLayer()(lopsided, *rest)
    torch.testing.assert_close(x, solve_by_kkt(Q, *rest).x, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(x.square().sum(), lopsided)
    torch.testing.assert_close(gradient, gradient.T)


@pytest.mark.slow
def test_second_derivatives_by_differences():
    data = [t.detach() for t in quadratic_programs(B=3, n=6, m=3, k=1)]
    Q, p, G, h, A, b = data
    root = torch.linalg.cholesky(Q)

    def solution(root, p, G, h, A, b):
        return foldopt.QPLayer()(root @ root.T, p, G, h, A, b)

    leaves = [t.clone().requires_grad_() for t in (root, p, G, h, A, b)]
    assert torch.autograd.gradgradcheck(solution, leaves, atol=1e-4, rtol=1e-4)
    found = solve_qp(*(t.detach() for t in (expanded(data)[i] for i in (0, 1, 4, 5, 2, 3))))
    assert found.active.any(), "constraints take part"
