"""Batches in which some samples fail or are degenerate, for the tests of the QP layer's policies."""

import numpy as np
import torch

from foldopt import errors
from tests.foldopt.qp.hard_cases import I3, ONES
from tests.foldopt.qp.programs import F64, Program, stacked

WEIGHT = [1.0, 2.0, 4.0]


def regular(seed, upper=2.0):
    """A strictly complementary program in three variables with a row, an equality and bounds."""
    draws = np.random.default_rng(seed)
    R = draws.normal(size=(3, 3))
    Q, p, G = R @ R.T + 0.5 * I3, 2 * draws.normal(size=3), draws.normal(size=(1, 3))
    return Program(Q, p, G, G.sum(1) / 3 + 0.05, ONES, [1], lower=np.zeros(3), upper=np.full(3, upper))


FAILURES = {
    "infeasible": (Program(I3, WEIGHT, -ONES, [-2], ONES, [1], np.zeros(3), np.ones(3)), errors.InfeasibleError),
    "unbounded": (
        Program(0 * I3, [-1, 1, 0], ONES, [9], ONES, [1], np.full(3, -np.inf), np.full(3, np.inf)),
        errors.UnboundedError,
    ),
    "nonconvex": (
        Program(np.diag([1, -2, 1]), WEIGHT, ONES, [9], ONES, [1], np.zeros(3), np.ones(3)),
        errors.NonconvexError,
    ),
}


def with_failures(causes, dtype):
    """Return a batch of 7 with the first of `causes` at 2 and the second at 5, and the indices of the failures."""
    programs, places = [regular(i) for i in range(7)], (2, 5)[: len(causes)]
    for place, cause in zip(places, causes, strict=True):
        programs[place] = FAILURES[cause][0]
    return stacked(programs, dtype), places


def same(found, expected, tol=1e-14):
    atol = tol * (1 + float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol if expected.dtype == F64 else 1e-6 * (atol / tol))


# Of one shape, so that they fit in a batch: where x is, and what its derivative is in all arguments, or in p alone.
LIMIT = {"A": ONES, "b": [1], "lower": np.zeros(3), "upper": np.full(3, 2.0)}
FREE = {"G": [[1, 0, 0]], "h": [5]}
DEGENERATE = {
    "kink": (Program(I3, [-1, 0, 0], **FREE, **LIMIT), errors.KinkError),
    "dependent rows": (Program(I3, [0.1, 0.2, 0.3], ONES, [1], **LIMIT), errors.DependentRowsError),
    "not unique": (Program(0 * I3, [1, 1, 2], **FREE, **LIMIT), errors.NotUniqueError),
}


def with_degenerate(dtype, names=tuple(DEGENERATE)):
    programs = [Program(I3, [0.1, 0.2 + 0.01 * i, 0.3], **FREE, **LIMIT) for i in range(5)]
    for place, name in enumerate(names, start=1):
        programs[place] = DEGENERATE[name][0]
    return stacked(programs, dtype)
