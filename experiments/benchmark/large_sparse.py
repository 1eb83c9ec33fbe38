"""Time, memory and errors on large sparse programs whose solutions and gradients are known."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import scipy.sparse as sp

from experiments.benchmark.collection import Arguments, Vector
from experiments.benchmark.libraries import LIBRARIES, ask, one_pass, warm_up
from experiments.benchmark.reference import Reference
from experiments.report.measurements import LAST_BITS

ROUNDS = 5
HORIZON, STATES, CONTROLS = 200, 12, 4
PUSH = 2.0  # size of the linear cost, at which half of the controls are at their bounds
CONTENDERS = ("foldopt_piqp", "dqp_piqp", "dqp_tight", "moreau", "moreau_tight")


@dataclass(frozen=True)
class Case:
    """A program, weights w, its exact solution x, and the exact gradient of w'x with respect to p."""

    args: Arguments
    weights: Vector
    x: Vector
    gradient: Vector

    @property
    def nnz(self) -> int:
        """The number of nonzero entries of all matrices, plus the number of finite bounds."""
        bounds = np.isfinite(self.args.lower).sum() + np.isfinite(self.args.upper).sum()
        return int(self.args.Q.nnz + self.args.G.nnz + self.args.A.nnz + bounds)


def simplex(n: int) -> Case:
    """Return the projection of a random point onto the simplex x >= 0, sum(x) = 1, by its closed form."""
    rng = np.random.default_rng(n)
    point, weights = rng.standard_normal(n), rng.standard_normal(n)
    args = Arguments(
        sp.identity(n, format="csc"),
        -point,
        sp.csr_matrix((0, n)),
        np.zeros(0),
        sp.csr_matrix(np.ones((1, n))),
        np.ones(1),
        np.zeros(n),
        np.full(n, np.inf),
    )
    down = np.sort(point)[::-1]
    thresholds = (np.cumsum(down) - 1) / np.arange(1, n + 1)
    x = np.maximum(point - thresholds[np.flatnonzero(down > thresholds)[-1]], 0.0)
    return Case(args, weights, x, np.where(x > 0, weights[x > 0].mean() - weights, 0.0))


def control(horizon: int = HORIZON, states: int = STATES, controls: int = CONTROLS) -> Case:
    """Return a model predictive control problem with bounds; its solution and gradient are from `Reference`.

    The variables are u_0, x_1, u_1, x_2, ... with x_(t+1) = M x_t + B u_t, |u| <= 0.3 and |x| <= 4. The cost is
    |x|^2 / 2 + |u|^2 / 20 plus a random linear one.
    """
    rng = np.random.default_rng(0)
    M = rng.standard_normal((states, states))
    M /= np.abs(np.linalg.eigvals(M)).max()
    B, first = rng.standard_normal((states, controls)), 2 * rng.standard_normal(states)
    size = states + controls
    here = sp.block_diag([sp.csr_matrix(np.hstack([-B, np.eye(states)]))] * horizon, format="csr")
    before = sp.kron(sp.eye(horizon, k=-1), sp.csr_matrix(np.hstack([np.zeros((states, controls)), -M])))
    limit = np.tile(np.concatenate([np.full(controls, 0.3), np.full(states, 4.0)]), horizon)
    cost = np.tile(np.concatenate([np.full(controls, 0.1), np.ones(states)]), horizon)
    n = horizon * size
    args = Arguments(
        sp.diags(cost, format="csc"),
        PUSH * rng.standard_normal(n),
        sp.csr_matrix((0, n)),
        np.zeros(0),
        sp.csr_matrix(here + before),
        np.concatenate([M @ first, np.zeros((horizon - 1) * states)]),
        -limit,
        limit,
    )
    weights, reference = rng.standard_normal(n), Reference(args)
    x = reference(args)
    if x is None:
        raise ValueError("the reference solver finds no solution of the control problem; change its bounds.")
    return Case(args, weights, x, reference.gradient(weights))


CASES: Mapping[str, Callable[[], Case]] = {
    **{f"simplex, n = {n:,}": partial(simplex, n) for n in (1_000, 10_000, 100_000)},
    f"MPC, n = {HORIZON * (STATES + CONTROLS):,}": control,
}


@cache
def _case(name: str) -> Case:
    return CASES[name]()


def first(name: str, contender: str) -> dict[str, Any]:
    """Return measurements of two calls of a contender on the program `name`.

    Returns:
        seconds_cold, of the first call; seconds_forward, seconds_backward and peak_bytes, of the second call; error_x
        and error_gradient, the largest errors relative to the largest entry; nnz; or only error, the reason why there
        are no numbers.
    """
    warm_up(contender)
    case, library = _case(name), LIBRARIES[contender]
    cold, warm = (ask(library, case.args, "p", case.weights) for _ in range(2))
    if warm.x is None or warm.gradient is None:
        return {"error": warm.error}
    return {
        "seconds_cold": cold.seconds_forward + cold.seconds_backward,
        "seconds_forward": warm.seconds_forward,
        "seconds_backward": warm.seconds_backward,
        "error_x": _off(warm.x, case.x),
        "error_gradient": _off(warm.gradient, case.gradient),
        "peak_bytes": warm.peak_bytes,
        "nnz": case.nnz,
    }


def rounds(name: str, contenders: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Return the median seconds, forward and backward, of each contender, in rounds in which all take turns."""
    case = _case(name)
    taken: dict[str, list[dict[str, Any]]] = {key: [] for key in contenders}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = {key: LIBRARIES[key].prepare(case.args, "p") for key in contenders}
        for number in range(-1, ROUNDS):  # the first does not count
            for key, program in prepared.items():
                known: dict[str, Any] = {}
                one_pass(program, case.args.p * (1 + number * LAST_BITS), case.weights, known)
                taken[key].append(known)
    parts = ("seconds_forward", "seconds_backward")
    return {key: {part: statistics.median(one[part] for one in taken[key][1:]) for part in parts} for key in taken}


def _off(found: Vector, exact: Vector) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())
