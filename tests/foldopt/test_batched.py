"""Linear algebra on batches: LU with several threads, where PyTorch's own goes wrong, and products."""

import subprocess
import sys

import pytest
import torch

from foldopt import batched

SIZES = [(1, 200), (3, 20), (5, 128), (4, 162), (3, 300)]

SCRIPT = f"""
import torch
from foldopt import batched
torch.set_num_threads(2)
torch.manual_seed(0)
for batch, n in {SIZES}:
    M, rhs = torch.randn(batch, n, n).double(), torch.randn(batch, n, 2).double()
    factors, pivots, info = batched.lu_factor(M)
    assert not info.any()
    z = torch.linalg.lu_solve(factors, pivots, rhs)
    assert (M @ z - rhs).abs().max() < 1e-8, (batch, n)
    assert (batched.solve(M, rhs) - z).abs().max() < 1e-8
    assert (batched.solve(M, rhs[:, :, 0]) - z[:, :, 0]).abs().max() < 1e-8
"""


def test_large_matrices_after_setting_two_threads():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    printed = found.stdout + found.stderr
    assert found.returncode == 0, printed
    assert "oneMKL ERROR" not in printed


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_one_by_one_is_the_same_and_differentiable(monkeypatch, batch):
    M = torch.randn(batch, 6, 6, dtype=torch.float64, requires_grad=True)
    rhs = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    z = torch.linalg.solve(M, rhs)
    expected = (*torch.linalg.lu_factor_ex(M), z, *torch.autograd.grad(z.square().sum(), (M, rhs)))
    monkeypatch.setattr(batched, "LARGEST", 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    z = batched.solve(M, rhs)
    found = (*batched.lu_factor(M), z, *torch.autograd.grad(z.square().sum(), (M, rhs)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_singular_matrix_is_named():
    M = torch.eye(200, dtype=torch.float64).repeat(3, 1, 1)
    M[1, 7, 7] = 0
    assert batched.lu_factor(M)[2].tolist() == [0, 8, 0]


@pytest.mark.parametrize("shape", [(4, 3, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_a_product_with_a_vector_is_einsums(shape):
    A = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(shape[0], shape[2], dtype=torch.float64)
    torch.testing.assert_close(batched.matvec(A, x), torch.einsum("bmn,bn->bm", A, x))
