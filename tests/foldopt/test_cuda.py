"""The table of problems on a CUDA device: the same solutions and gradients as on the CPU."""

import pytest
import torch

from foldopt.linear_solve import SOLVERS
from tests.foldopt.cases import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("solver", ["auto", "direct", "least_squares", "gmres", "bicgstab", "anderson"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_the_cpu(case, solver):
    assert solver in SOLVERS
    row = CASES[case]
    here = [p.requires_grad_() for p in row.params(torch.Generator().manual_seed(0), 20)]
    there = [p.detach().cuda().requires_grad_() for p in here]
    layer = row.layer(linear_solver=solver)
    answers = []
    for params in (here, there):
        x = layer(*params)
        assert x.device == params[0].device
        answers.append([x.detach(), *torch.autograd.grad(x.pow(3).sum(), params)])
    for mine, other in zip(*answers, strict=True):
        torch.testing.assert_close(other.cpu(), mine, rtol=1e-6, atol=1e-6 * float(mine.abs().max()))
