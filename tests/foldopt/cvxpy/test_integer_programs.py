"""Degenerate quadratic programs with integer data, written in CVXPY, against exact arithmetic."""

from collections import Counter

import cvxpy as cp
import numpy as np
import pytest
import torch

import foldopt
from experiments.benchmark.integer_sweep import sample
from foldopt.errors import DegenerateError

pytestmark = pytest.mark.slow

F64 = torch.float64


def layer_of(program):
    x, p, c = cp.Variable(program.n), cp.Parameter(program.n), cp.Parameter(max(len(program.rows()), 1))
    constraints = [
        np.array(row.a, float) @ x == c[i] if row.equality else np.array(row.a, float) @ x <= c[i]
        for i, row in enumerate(program.rows())
    ]
    Q = np.array(program.Q, float)
    cost = p @ x + (0.5 * cp.quad_form(x, cp.psd_wrap(Q)) if Q.any() else 0)
    problem = cp.Problem(cp.Minimize(cost), constraints)
    return foldopt.CvxpyLayer(problem, [p, c] if constraints else [p], [x])


@pytest.mark.parametrize("first", range(0, 120, 30))
def test_every_gradient_that_is_given_is_right_and_every_one_that_exists_is_given(first):
    given = Counter()
    for seed in range(first, first + 30):
        truth = sample(seed)
        program = truth.program
        if truth.truth.status != "solved":
            continue
        layer, sides = layer_of(program), [float(row.c) for row in program.rows()]
        for g, derivative in zip(truth.g, truth.derivatives, strict=True):
            for rows in (False, True):
                p = torch.tensor(program.p, dtype=F64, requires_grad=True)
                c = torch.tensor(sides, dtype=F64, requires_grad=rows)
                (x,) = layer(p, c) if sides else layer(p)
                exists = derivative.verdict_rows if rows else derivative.verdict
                try:
                    found = torch.autograd.grad(x @ torch.tensor(g, dtype=F64), [p, c] if rows and sides else [p])
                except DegenerateError:
                    assert exists != "differentiable" or not truth.truth.unique, (seed, g, rows)
                    given["refused"] += 1
                    continue
                assert exists in ("differentiable", "dependent rows"), (seed, g, rows)
                expected = [derivative.gradient, derivative.multipliers][: len(found)]
                for one, true in zip(found, expected, strict=True):
                    assert true is not None, (seed, g, rows)
                    np.testing.assert_allclose(one.numpy(), np.array(true, float), rtol=1e-6, atol=1e-6)
                given["right"] += 1
    assert given["right"] > 40
    assert given["refused"] > 10
