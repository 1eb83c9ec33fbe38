"""Products of cones: rows in CVXPY's order, batches, duals, block-diagonal derivatives, and the messages."""

import pickle

import pytest
import torch

from foldopt.cones import Exponential, Power, ProductCone, SecondOrder, Semidefinite
from foldopt.errors import InputError
from tests.drawn import F64, normal

DIMS = {"exp": 2, "zero": 2, "soc": [3, 4, 3], "nonneg": 3, "psd": [2, 3, 2], "pow": [0.3, 0.5]}


def one_by_one(v, triangle="lower"):
    """The projection of v (..., m) with DIMS, row by row."""
    parts, at = [v[..., :2] * 0, v[..., 2:5].clamp(min=0)], 5
    soc, psd = SecondOrder(), Semidefinite(triangle)
    rest = [(soc, 3), (soc, 4), (soc, 3), (psd, 3), (psd, 6), (psd, 3), (Exponential(), 3), (Exponential(), 3)]
    for cone, d in [*rest, (Power(0.3), 3), (Power(0.5), 3)]:
        parts.append(cone.project(v[..., at : at + d]))
        at += d
    return torch.cat(parts, -1)


@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_rows_in_their_order(batch, triangle):
    cone = ProductCone(DIMS, triangle=triangle)
    v = 2 * normal(0, *batch, cone.size)
    assert cone.size == 5 + 10 + 12 + 6 + 6
    s, p = cone.split(v)
    torch.testing.assert_close(cone.project(v), one_by_one(v, triangle), rtol=0, atol=1e-14)
    torch.testing.assert_close(s, cone.project(v), rtol=0, atol=0)
    torch.testing.assert_close(cone.dual().project(-v), -p, rtol=0, atol=1e-14)
    D, x = cone.derivative(v), normal(1, *batch, cone.size)
    assert D.dense().shape == (*batch, cone.size, cone.size)
    torch.testing.assert_close(D @ x, (D.dense() @ x[..., None])[..., 0], rtol=0, atol=1e-13)
    assert cone.kinks(v, 1e-3).shape == v.shape


def test_kinks_cover_the_rows_of_their_cone():
    cone = ProductCone({"nonneg": 2, "soc": [3], "exp": 1, "zero": 1})
    v = torch.tensor([0.0, 1e-5, 2, 5, 3, 4, -2, -3, 1], dtype=F64)
    assert cone.kinks(v, 1e-9).tolist() == [False, False, False, True, True, True, False, False, False]
    many = cone.kinks(torch.stack([v, v]), torch.tensor([1e-9, 1e-3]))
    assert many[1].tolist() == [False, True, False, True, True, True, False, False, False]
    assert many[0].tolist() == cone.kinks(v, 1e-9).tolist()


def test_one_sample_does_not_touch_the_others():
    cone = ProductCone(DIMS)
    v = normal(2, 3, cone.size)
    s = cone.project(v)
    v[1, 7] = torch.inf
    with pytest.raises(InputError, match=r"rows \[1\]"):
        cone.project(v)
    parts, p = cone.split(v)
    assert parts[1].isnan().sum() == p[1].isnan().sum() == 3
    torch.testing.assert_close(parts[[0, 2]], s[[0, 2]], rtol=0, atol=0)


def test_duals_of_duals_are_the_cones_themselves():
    cone = ProductCone(DIMS)
    v = normal(3, 5, cone.size)
    torch.testing.assert_close(cone.dual().dual().project(v), cone.project(v), rtol=0, atol=0)
    torch.testing.assert_close(cone.dual().project(v)[:, :2], v[:, :2], rtol=0, atol=0)
    e = cone.centre()
    assert (cone.project(e) == e).all()
    assert (cone.dual().project(e) == e).all()


def test_copies_and_nothing_at_all():
    cone = ProductCone(DIMS)
    v = normal(4, 2, cone.size)
    torch.testing.assert_close(pickle.loads(pickle.dumps(cone)).project(v), cone.project(v), rtol=0, atol=0)
    empty = ProductCone({"soc": [], "psd": [0], "zero": 0})
    v = normal(5, 4, 0)
    assert empty.size == 0
    assert empty.project(v).shape == empty.kinks(v, 1.0).shape == (4, 0)
    assert empty.derivative(v).dense().shape == (4, 0, 0)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"socs": [3]}, r"dims has \['socs'\]: expected keys among"),
        ({"nonneg": -1}, r'dims\["nonneg"\] has -1: expected a whole number'),
        ({"exp": 1.5}, r'dims\["exp"\] has 1.5'),
        ({"soc": [3, 2.5]}, r'dims\["soc"\] has 2.5'),
        ({"psd": [True]}, r'dims\["psd"\] has True'),
        ({"pow": [1.0]}, r"alpha=1.0: expected a number strictly between 0 and 1"),
    ],
)
def test_sizes_that_are_none(dims, message):
    with pytest.raises(InputError, match=message):
        ProductCone(dims)


def test_points_of_another_size():
    cone = ProductCone({"nonneg": 3})
    for method in (cone.project, cone.split, cone.derivative, lambda v: cone.kinks(v, 0.0)):
        with pytest.raises(InputError, match=r"v has shape \(2, 4\), expected \(\.\.\., 3\)"):
            method(normal(0, 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda():
    cone = ProductCone(DIMS)
    here = (2 * normal(6, 20, cone.size)).requires_grad_()
    there = here.detach().cuda().requires_grad_()
    for leaf in (here, there):
        cone.project(leaf).pow(3).sum().backward()
    torch.testing.assert_close(cone.project(there).cpu(), cone.project(here), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-10, atol=1e-10)
    D = cone.derivative(there.detach()).dense().cpu()
    torch.testing.assert_close(D, cone.derivative(here.detach()).dense(), rtol=1e-10, atol=1e-12)
