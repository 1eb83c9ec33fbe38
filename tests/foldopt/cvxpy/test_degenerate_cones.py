"""Small cone programs with integer data, often degenerate, against one-sided differences."""

from collections import Counter

import cvxpy as cp
import numpy as np
import pytest
import torch

import foldopt
from foldopt.errors import DegenerateError, SolverError

pytestmark = pytest.mark.slow

F64 = torch.float64
STEPS = (1e-5, 2e-5, 4e-5)


def second_order(draw, z, d):
    n = z.size
    rows = []
    for _ in range(int(draw.integers(1, 3))):
        A, b = draw.integers(-1, 2, size=(n, n)), draw.integers(-1, 2, size=n)
        c = draw.integers(-1, 2, size=n) * draw.integers(0, 2)
        rows.append(cp.norm(A.astype(float) @ z + b) <= c.astype(float) @ z + d + draw.integers(0, 2))
    return [*rows, z <= 3, z >= -3]


def semidefinite(draw, z, d):
    corner = z[0] * float(draw.integers(-1, 2)) + float(draw.integers(0, 3))
    return [cp.bmat([[z[0] + d, z[1]], [z[1], corner]]) >> 0, z <= 3, z >= -3]


def exponential(draw, z, d):
    return [cp.log_sum_exp(z) <= d + 1, z >= -3, z <= float(draw.integers(0, 3))]


def difference(layer, at, way, g, value):
    """Return the derivative of g'z on one side, extrapolated from three steps."""
    xs, ds = (torch.stack([p + h * w for h in STEPS]) for p, w in zip(at, way, strict=True))
    slopes = (layer(xs, ds)[0] @ g - value) / torch.tensor(STEPS, dtype=F64)
    once = 2 * slopes[:2] - slopes[1:]
    return float((4 * once[0] - once[1]) / 3)


@pytest.mark.parametrize("constraints", [second_order, semidefinite, exponential])
def test_a_gradient_that_is_given_is_that_of_both_sides(constraints):
    said = Counter()
    for seed in [*range(60), 391]:
        draw = np.random.default_rng(seed)
        n = int(draw.integers(2, 4))
        x, d, z = cp.Parameter(n), cp.Parameter(), cp.Variable(n)
        point, level = draw.integers(-3, 4, size=n), draw.integers(0, 4)
        cost = 0.5 * cp.sum_squares(z - x) if draw.integers(0, 2) else -x @ z
        problem = cp.Problem(cp.Minimize(cost), constraints(draw, z, d))
        layer = foldopt.CvxpyLayer(problem, [x, d], [z])
        quiet = foldopt.CvxpyLayer(problem, [x, d], [z], on_failure="nan")
        g = torch.tensor(draw.integers(-2, 3, size=n), dtype=F64)
        at = [torch.tensor(value, dtype=F64, requires_grad=True) for value in (point, level)]
        try:
            (found,) = layer(*at)
            gradient = torch.autograd.grad(found @ g, at)
        except DegenerateError:
            said["degenerate"] += 1
            continue
        except SolverError:
            continue
        said["differentiable"] += 1
        at = [part.detach() for part in at]
        for sign in (1, -1, 1, -1):
            way = torch.tensor(draw.normal(size=n)) * sign, torch.tensor(draw.normal()) * sign
            slope = float(gradient[0] @ way[0] + gradient[1] * way[1])
            seen = difference(quiet, at, way, g, float(found.detach() @ g))
            assert np.isnan(seen) or abs(seen - slope) < 1e-4 * (1 + abs(slope)), seed
    assert said["differentiable"] > 25
    assert said["degenerate"] > 5
