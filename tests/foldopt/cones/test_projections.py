"""Projections on cones against a generic solver, against 330 digits, and by their characterization at any scale."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldopt.cones import Dual, Exponential, Power, Semidefinite, smat, svec
from foldopt.errors import InputError
from tests.drawn import F64, normal, points, properties, seeds
from tests.foldopt.cones.truth import CONES, by_clarabel, exponential_by_mpmath, kinds_of_points

EXTREMES = (0.0, 1.0, -1.0, 1e-8, -1e-8, 1e-160, -1e-160, 300.0, -300.0, 0.03, -0.03, 1e150, -1e150)


@pytest.mark.parametrize("name", CONES)
def test_values_are_those_of_a_generic_solver(name):
    pytest.importorskip("clarabel")
    cone, d = CONES[name]
    v = kinds_of_points(d)
    truth = by_clarabel(cone, v)
    solved = truth.isfinite().all(1)
    assert solved.sum() > 180
    torch.testing.assert_close(cone.project(v)[solved], truth[solved], rtol=0, atol=2e-4)


def test_the_exponential_cone_to_the_last_digit_at_any_scale():
    mp = pytest.importorskip("mpmath").mp.clone()
    mp.dps = 330
    cases = random.Random(0).sample(list(itertools.product(EXTREMES, repeat=3)), 40)
    cases += [(1e-160, 1e150, -1e150), (1e150, 1e-160, 1e150), (-1e150, 1e-160, -1e150), (1.0, -300.0, 1.0), (1, 0, 1)]
    found = Exponential().project(torch.tensor(cases, dtype=F64))
    for v, s in zip(cases, found.tolist(), strict=True):
        largest = max(map(abs, v))
        truth = exponential_by_mpmath(mp, v)
        assert all(abs(a - b) <= 4e-16 * largest for a, b in zip(truth, s, strict=True)), (v, s)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-9, 1.0, 1e9, 1e150, 1e300])
@pytest.mark.parametrize("name", CONES)
def test_both_parts_are_orthogonal_projections_at_any_scale(name, scale):
    cone, d = CONES[name]
    v = kinds_of_points(d)
    s, p = (part / scale for part in cone.split(v * scale))
    assert (s + p - v).abs().amax() < 5e-14
    assert (s * p).sum(-1).abs().amax() < 5e-14
    reference = cone.split(v)
    torch.testing.assert_close((s, p), reference, rtol=0, atol=5e-14)
    torch.testing.assert_close(cone.project(s), s, rtol=0, atol=5e-14)
    torch.testing.assert_close(Dual(cone).project(-p), -p, rtol=0, atol=5e-14)
    torch.testing.assert_close(cone.project(p), torch.zeros_like(p), rtol=0, atol=5e-14)


@properties
@given(points(rows=4, columns=21), points(rows=4, columns=21))
def test_projections_never_lengthen_a_difference(v, w):
    for cone, d in CONES.values():
        for other in (w, v + 1e-3 * w):
            before, after = v[:, :d] - other[:, :d], cone.project(v[:, :d]) - cone.project(other[:, :d])
            size = 1e-14 * torch.maximum(v.abs().amax(), other.abs().amax())
            assert (after.norm(dim=1) <= before.norm(dim=1) * (1 + 1e-13) + size).all(), cone


@properties
@given(seeds, st.floats(-150, 150), st.floats(0, 150))
def test_entries_of_any_size(seed, middle, spread):
    for cone, d in CONES.values():
        v = normal(seed, 40, d) * 10 ** (middle + spread * (2 * torch.rand(40, d, dtype=F64) - 1)).clamp(-300, 300)
        largest = v.abs().amax(1, keepdim=True)
        s, p = (part / largest for part in cone.split(v))
        assert (s + p - v / largest).abs().amax() < 1e-14, cone
        assert (s * p).sum(-1).abs().amax() < 1e-14, cone
        assert cone.derivative(v).isfinite().all(), cone
        assert not cone.kinks(v, -1.0).any(), cone


def test_points_that_meet_in_one_eigenvalue():
    for n in (1, 2, 5, 9):
        Q = torch.linalg.qr(normal(n, n, n))[0]
        w = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, 0.5, 0.5, -3.0, 2.0], dtype=F64)[:n]
        for triangle in ("lower", "upper"):
            v = svec(Q @ torch.diag(w) @ Q.T, triangle)
            s = smat(Semidefinite(triangle).project(v), triangle)
            torch.testing.assert_close(s, Q @ torch.diag(w.clamp(min=0)) @ Q.T, rtol=0, atol=1e-14)


def test_triangles_are_stacked_as_their_solvers_do():
    X = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]], dtype=F64)
    r = 2**0.5
    torch.testing.assert_close(svec(X, "lower"), torch.tensor([1, 2 * r, 3 * r, 4, 5 * r, 6], dtype=F64))
    torch.testing.assert_close(svec(X, "upper"), torch.tensor([1, 2 * r, 4, 3 * r, 5 * r, 6], dtype=F64))
    for triangle in ("lower", "upper"):
        torch.testing.assert_close(smat(svec(X, triangle), triangle), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_those_of_the_caller(dtype):
    for cone, d in CONES.values():
        v = (3 * normal(5, 50, d)).to(dtype)
        s = cone.project(v)
        assert s.dtype == dtype
        torch.testing.assert_close(s, cone.project(v.double()).to(dtype), rtol=0, atol=0)


def test_bad_points_are_refused():
    for cone, d in CONES.values():
        v = normal(0, 3, d)
        v[1, 0] = torch.nan
        with pytest.raises(InputError, match=r"v of shape .* NaN or inf, first in rows \[1\]"):
            cone.project(v)
        s, p = cone.split(v)
        assert s[1].isnan().all()
        assert p[1].isnan().all()
        torch.testing.assert_close(s[[0, 2]], cone.project(v[[0, 2]]))
        with pytest.raises(InputError, match="floating-point"):
            cone.project(torch.ones(2, d, dtype=torch.long))
    with pytest.raises(InputError, match=r"expected n \(n \+ 1\) / 2"):
        Semidefinite().project(normal(0, 2, 4))
    for cone in (Exponential(), Power(0.5), Dual(Exponential())):
        with pytest.raises(InputError, match=r"in R\^3, expected \(\.\.\., 3\)"):
            cone.project(normal(0, 2, 4))
    with pytest.raises(InputError, match="triangle='left'"):
        Semidefinite("left")
    for alpha in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="between 0 and 1"):
            Power(alpha)
