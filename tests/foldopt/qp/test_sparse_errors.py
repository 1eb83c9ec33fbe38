"""Wrong sparse arguments: the error names the argument and the remedy."""

import builtins
import re

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from foldopt.qp.matrix import Pattern, SparseMatrix
from tests.foldopt.qp.programs import F64, Program
from tests.foldopt.qp.sparse import LAYOUTS, MATRICES, all_sparse, arguments, call

ARGS = arguments(Program(np.diag([2, 3]), [1, -2], [[1, 1]], [0], [[1, -1]], [1], -np.ones(2), np.ones(2)))
ONE = torch.ones(1, 2)


def entries(rows, columns, values, shape=(1, 2)):
    return SparseMatrix(Pattern(torch.tensor(rows), torch.tensor(columns), shape), torch.tensor(values, dtype=F64))


WRONG = {
    "block rows": ("Q", torch.eye(2).to_sparse_bsr((1, 1)), "Q is of layout torch.sparse_bsr, expected dense, sparse"),
    "block columns": ("G", ONE.to_sparse_bsc((1, 1)), "G is of layout torch.sparse_bsc, expected dense, sparse"),
    "sparse p": ("p", ARGS["p"].to_sparse(), "p is sparse (torch.sparse_coo); only Q, G and A may be, pass p.to_dense"),
    "sparse h": ("h", ARGS["h"].to_sparse(), "h is sparse (torch.sparse_coo); only Q, G and A may be, pass h.to_dense"),
    "sparse bound": ("upper", ARGS["upper"].to_sparse(), "upper is sparse (torch.sparse_coo); only Q, G and A may be"),
    "Q not square": ("Q", torch.ones(1, 2).to_sparse(), "Q has shape (1, 2), expected (2, 2) or (1, 2, 2)"),
    "columns": ("G", torch.ones(1, 3).to_sparse_csr(), "G has shape (1, 3), expected (1, 2) or (1, 1, 2)"),
    "rows": ("A", torch.ones(2, 2).to_sparse_csc(), "A has shape (2, 2), expected (1, 2) or (1, 1, 2)"),
    "four dimensions": ("A", torch.ones(1, 1, 1, 2).to_sparse(), "A has shape (1, 1, 1, 2), expected (1, 2)"),
    "a vector": ("A", torch.ones(2).to_sparse(), "A has shape (2,), expected (1, 2)"),
    "rows that are dense": ("G", ONE.to_sparse(1), "G of shape (1, 2) has 1 sparse and 1 dense dimensions"),
    "complex": ("G", ONE.to(torch.complex128).to_sparse(), "G is of dtype torch.complex128, expected real numbers"),
    "truth values": ("G", ONE.bool().to_sparse_csr(), "G is of dtype torch.bool, expected real numbers"),
    "NaN": ("G", (ONE * torch.nan).to_sparse(), "holds NaN or inf, first at [[0], [1]]"),
    "infinite": ("Q", (torch.eye(2) * torch.inf).to_sparse_csr(), "holds NaN or inf"),
    "too few values": ("G", entries([0, 0], [0, 1], [1]), "G has values of shape (1,), expected (2,) or (B, 2)"),
    "a number for values": ("G", entries([0], [0], 1), "G has values of shape (), expected (1,) or (B, 1)"),
    "a place outside": ("G", entries([0], [7], [1]), "G has an entry outside its shape (1, 2)"),
    "a place below 0": ("A", entries([-1], [0], [1]), "A has an entry outside its shape (1, 2)"),
    "a place twice": ("A", entries([0, 0], [1, 1], [1, 1]), "A has two entries in one position"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(case):
    name, value, message = WRONG[case]
    with pytest.raises(errors.InputError, match=re.escape(message)) as caught:
        call(foldopt.QPLayer(), all_sparse(ARGS, "csr") | {name: value})
    assert re.search(rf"\b{name}\b", str(caught.value))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_different_sizes(layout):
    args = ARGS | {"Q": ARGS["Q"].expand(2, 2, 2), "p": ARGS["p"].expand(3, 2)}
    with pytest.raises(errors.InputError, match=re.escape("Q has shape (2, 2, 2), expected (2, 2) or (3, 2, 2)")):
        call(foldopt.QPLayer(), all_sparse(args, layout))


@pytest.mark.parametrize("name", ["G", "A"])
def test_rows_and_right_hand_sides_come_in_pairs(name):
    right = {"G": "h", "A": "b"}[name]
    for missing in (name, right):
        with pytest.raises(errors.InputError, match=rf"{name} is .* but {right} is .*; pass both, or neither"):
            call(foldopt.QPLayer(), all_sparse(ARGS) | {missing: None})


def test_scipy_matrices_of_numbers_that_are_not_real():
    sp = pytest.importorskip("scipy.sparse")
    for dtype in (complex, bool):
        with pytest.raises(errors.InputError, match=f"G is of dtype {np.dtype(dtype)}, expected real numbers"):
            call(foldopt.QPLayer(), all_sparse(ARGS) | {"G": sp.csr_matrix(np.ones((1, 2), dtype))})
    with pytest.raises(errors.InputError, match="p is a csr_matrix, expected a tensor or an array of numbers"):
        call(foldopt.QPLayer(), all_sparse(ARGS) | {"p": sp.csr_matrix(np.ones((1, 2)))})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_device_is_named(layout):
    with pytest.raises(errors.InputError, match="G is on meta, other arguments are on cpu; move them to one device"):
        call(foldopt.QPLayer(), all_sparse(ARGS, layout) | {"G": torch.ones(1, 2, device="meta")})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_without_entries_or_rows_are_right(layout):
    """Q = 0 gives a linear program; G without rows adds nothing; A without entries holds if b is 0."""
    empty = {"G": torch.zeros(0, 2, dtype=F64), "h": torch.zeros(0), "A": torch.zeros(1, 2), "b": torch.zeros(1)}
    args = all_sparse(ARGS | {"Q": torch.zeros(2, 2, dtype=F64)} | empty, layout)
    layer = foldopt.QPLayer()
    assert call(layer, args).tolist() == [[-1, 1]]
    assert layer.last.status == ("solved",)
    layer = foldopt.QPLayer(on_failure="nan")
    assert call(layer, args | {"b": torch.ones(1)}).isnan().all()
    assert layer.last.status == ("infeasible",)


@pytest.mark.parametrize("package", ["scipy", "qdldl"])
def test_a_missing_package_is_named_with_its_remedy(package, monkeypatch):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return own(name, *args, **kwargs)

    made = all_sparse(ARGS)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.MissingDependencyError, match=re.escape("pip install 'foldopt[qp]'")):
        call(foldopt.QPLayer(), made)
    assert call(foldopt.QPLayer(), {name: ARGS[name] for name in ("Q", "p", "h", "G")}).isfinite().all()


def test_the_sparse_arguments_of_the_error_tests_are_right():
    for layout in LAYOUTS:
        x = call(foldopt.QPLayer(), all_sparse(ARGS, layout))
        torch.testing.assert_close(x, torch.tensor([[0.5, -0.5]], dtype=F64), rtol=0, atol=1e-12)
    assert all(isinstance(M, SparseMatrix) for M in (all_sparse(ARGS, "SparseMatrix")[name] for name in MATRICES))
