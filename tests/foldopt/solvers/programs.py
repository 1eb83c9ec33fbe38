"""Quadratic programs in numpy, min 1/2 x'Hx + q'x subject to lower <= Cx <= upper, for the tests of their solvers."""

import functools

import numpy as np
import pytest

from foldopt.errors import SolverError
from foldopt.solvers.qp_solvers import QPSolver, installed

INF = np.inf
SOLVERS = installed()


def program(H, q, C, lower, upper):
    return tuple(np.array(part, dtype=float) for part in (H, q, C, lower, upper))


def integers(seed):
    """min 1/2 x'Hx + q'x over integer rows, feasible at an integer point that many rows hold with equality."""
    g = np.random.default_rng(seed)
    n, r = 5, 9
    M = g.integers(-2, 3, (n, n))
    C = np.vstack([g.integers(-2, 3, (r, n)), np.diag(g.choice([-2, -1, 1, 3], n))])
    z = C @ g.integers(-2, 3, n)
    lower, upper = z - g.integers(0, 3, len(z)), z + g.integers(0, 3, len(z))
    return program(
        M.T @ M + np.eye(n),
        g.integers(-5, 6, n),
        C,
        np.where(g.random(len(z)) < 0.4, -INF, lower),
        np.where(g.random(len(z)) < 0.3, INF, upper),
    )


def dense_random():
    g = np.random.default_rng(0)
    n = 30
    M = g.standard_normal((n, n))
    C = np.vstack([g.standard_normal((12, n)), np.eye(n), np.ones((1, n))])
    lower = [-1] * 6 + [-INF] * 6 + [-0.3] * n + [1]
    upper = [1] * 6 + [0.5] * 6 + [INF] * 15 + [0.4] * 15 + [1]
    return program(M.T @ M / n, g.standard_normal(n), C, lower, upper)


NONE = np.zeros((0, 2))
PROGRAMS = {
    "no rows": program([[2, 1], [1, 2]], [1, -1], NONE, [], []),
    "degenerate vertex": program(
        np.eye(2), [-3, -3], [[1, 0], [0, 1], [1, 1], [1, 2], [2, 1]], [-INF] * 5, [1, 1, 2, 3, 3]
    ),
    "equality twice": program(
        np.eye(3), [-1, 2, 0], [[1, 1, 1], [1, 1, 1], [2, 2, 2], [1, -1, 0]], [1, 1, 2, -INF], [1, 1, 2, 0.5]
    ),
    "entries as bounds twice": program(
        np.eye(3),
        [-4, 4, -4],
        [[1, 0, 0], [2, 0, 0], [-3, 0, 0], [0, -1, 0], [0, -2, 0], [0, 0, -1]],
        [-INF, -INF, -3, -INF, -INF, -1],
        [2, 6, INF, 3, 2, INF],
    ),
    "negative coefficients": program(
        np.diag([1, 2, 3]),
        [5, -5, 1],
        [[-2, 0, 0], [0, -0.5, 0], [0, 0, -1], [1, 1, 1]],
        [-2, -1, -INF, -1],
        [4, 1, 0, 2],
    ),
    "fixed and free": program(
        [[2, 0, 1], [0, 1, 0], [1, 0, 2]], [1, 1, 1], [[0, 1, 0], [1, 0, 1], [0, -1, 0]], [2, -INF, -INF], [2, 1, 5]
    ),
    "empty and free rows": program(np.eye(2), [-1, -1], [[0, 0], [1, 1], [1, 0]], [-1, -INF, -INF], [0, INF, 0.5]),
    "semidefinite": program(
        [[1, -1, 0], [-1, 1, 0], [0, 0, 0]],
        [1, -1, 1],
        [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [1, 0, 0, 0],
        [1, INF, INF, INF],
    ),
    "linear": program(
        np.zeros((3, 3)), [-3, -2, -1], [[1, 1, 0], [1, 0, 1], *np.eye(3)], [-INF, -1, 0, 0, 0], [4, 3, INF, 3, 2]
    ),
    "linear degenerate": program(
        np.zeros((2, 2)),
        [-1, -1],
        [[1, 1], [1, 0], [0, 1], [2, 1], [1, 2]],
        [-INF, 0, 0, -INF, -INF],
        [2, INF, INF, 3, 3],
    ),
    "transport": program(
        np.zeros((4, 4)),
        [1, 2, 3, 1],
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], *np.eye(4)],
        [2, 3, 2, 3, 0, 0, 0, 0],
        [2, 3, 2, 3, INF, INF, INF, INF],
    ),
    "random": dense_random(),
    **{f"integers {seed}": integers(seed) for seed in range(4)},
}


@functools.cache
def working(solver):
    try:
        return QPSolver(solver), ""
    except SolverError as error:
        return None, str(error)


def named(solver):
    found, reason = working(solver)
    if found is None:
        pytest.skip(reason)
    return found


def violation(task, x, y):
    """The largest violation of the KKT conditions, relative to the numbers that make it up where these are above 1.

    inf where a multiplier is of a side that is no bound.
    """
    H, q, C, lower, upper = task
    z = C @ x
    size = np.abs(H) @ np.abs(x) + np.abs(q) + np.abs(C.T) @ np.abs(y)
    stationarity = np.abs(H @ x + q + C.T @ y) / np.maximum(size, 1)
    outside = np.maximum(lower - z, z - upper)
    slack = np.where(y > 0, upper - z, z - lower)[y != 0] * np.minimum(np.abs(y[y != 0]), 1)
    return max(stationarity.max(), outside.max(initial=0), np.abs(slack).max(initial=0))
