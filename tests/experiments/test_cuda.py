"""The studies on a CUDA device: solutions and gradients of the CPU, and functions replayed as CUDA graphs."""

import pytest
import torch

from experiments.benchmark.layers import LAYERS, Place
from experiments.numerics.graphs import KEPT, replayed

without_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WHO = {
    "portfolio": ["fold", "direct", "gmres", "unroll"],
    "denoising": ["fold", "direct", "unroll", "qpth"],
    "multilabel": ["fold", "exact", "sqp", "direct"],
    "bilinear": ["fold", "block", "direct", "unfold"],
    "vertex": ["fold"],
    "qp": ["fold", "direct", "qpth"],
}


@without_cuda
@pytest.mark.parametrize(("name", "who"), [(name, who) for name, them in WHO.items() for who in them])
def test_a_layer_of_a_study_is_that_of_the_cpu(name, who):
    layer = LAYERS[name]
    if not layer.contenders[who].installed():
        pytest.skip(f"{who} is not installed")
    for variant in layer.variants:
        leaves, solves = layer.problem(Place(variant, layer.n, 24), [who], 1)
        there = tuple(t.cuda() for t in leaves)
        for _ in range(3):  # from the second time on, graphs are recorded and replayed
            answers = []
            for given in (leaves, there):
                given = tuple(t.detach().requires_grad_() for t in given)
                x = solves[who](given)
                assert x.device == given[0].device
                gradients = torch.autograd.grad(x.pow(3).sum(), given) if x.requires_grad else ()
                answers.append([x.detach(), *gradients])
            for mine, other in zip(*answers, strict=True):
                torch.testing.assert_close(other.cpu(), mine, rtol=1e-6, atol=1e-7 * float(mine.abs().max()))


def test_on_a_cpu_a_function_is_called_as_it_is():
    calls = []

    @replayed
    def scaled(x, factor):
        calls.append(factor)
        return factor * x

    for factor in (2, 2, 2, 3):
        assert torch.equal(scaled(torch.ones(2), factor), factor * torch.ones(2))
    assert calls == [2, 2, 2, 3]


@without_cuda
def test_a_function_is_recorded_once_per_shape_and_number():
    calls = []

    @replayed
    def scaled(x, y, factor):
        calls.append((len(x), factor))
        return factor * x + y.sum()

    for size, factor in [*[(3, 2.0)] * 4, *[(3, 5.0)] * 3, *[(4, 2.0)] * 3]:
        x, y = torch.rand(size, device="cuda"), torch.rand(2, device="cuda")
        kept = scaled(x, y, factor)
        scaled(torch.zeros_like(x), y, factor)
        torch.testing.assert_close(kept, factor * x + y.sum(), msg="a result is not that of a later call")
    assert calls == [(3, 2.0)] * 2 + [(3, 5.0)] * 2 + [(4, 2.0)] * 2

    for size in range(10, 10 + 2 * KEPT):
        for _ in range(2):
            scaled(torch.ones(size, device="cuda"), torch.ones(2, device="cuda"), 1.0)
    assert len(calls) == 6 + 4 * KEPT, "the oldest are forgotten"


@without_cuda
def test_a_function_is_recorded_in_another_stream_too():
    @replayed
    def doubled(x):
        return 2 * x

    x = torch.arange(5.0, device="cuda")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(3):
                found = doubled(x)
        stream.synchronize()
        assert torch.equal(found, 2 * x)
