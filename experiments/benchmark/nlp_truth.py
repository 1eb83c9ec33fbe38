"""An independent look at a solution of an S2MPJ problem, in NumPy: is it one, and what is its derivative.

Stands on the problem's own functions and derivatives alone, not on foldopt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.benchmark.s2mpj import Problem, full

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
REGULAR, KINK, DEPENDENT, SINGULAR = "regular", "kink", "dependent rows", "singular Hessian"
NO_MINIMUM, NO_KKT = "no minimum", "no KKT point"
ACTIVE = 1e-6  # slack, relative to 1 + |gradient|'(1 + |x|), of a constraint that is active
STATIONARY = 1e-6  # residual of the KKT conditions, relative to the gradients
WEAK = 1e-6  # force of an active constraint, relative to the gradients, that counts as none
RANK = 1e-8  # smallest singular value of the active constraints, relative to the largest, of independent ones
NEARBY = 1e-2  # distance over which curvature makes a gradient that others are compared with
FAR = 1e-6  # Newton step at a KKT point, relative to 1 + |x|, of a singular Hessian
CURVED = 1e-7  # least curvature along the active constraints, relative to the Hessian, that counts as some


@dataclass(frozen=True)
class Truth:
    """What a point is: `kind`, and where it is regular the derivative of weight'x with respect to tilt and shift.

    moved: how far x moves, |dx|, with a step of `along` (a tilt and a shift) of length 1.
    """

    kind: str
    tilt: Vector
    shift: Vector
    moved: float = 0.0


def examined(problem: Problem, x: Vector, weight: Vector, along: tuple[Vector, Vector]) -> Truth:
    """Return what x is in the problem of the collection, tilt and shift zero.

    weight: (n,), of the derivative. along: a direction of the parameters, (n,) and (m,).
    """
    n = problem.n
    _, gradient, hessian = problem.cost(x)
    value, jacobian, hessians = problem.rows(x) if problem.m else (np.zeros(0), np.zeros((0, n)), [])
    rows = np.vstack([jacobian, np.eye(n)])
    value = np.concatenate([value, x])
    below, above = np.concatenate([problem.below, problem.lower]), np.concatenate([problem.above, problem.upper])
    size = np.linalg.norm(rows, axis=1)
    unit = ACTIVE * (1 + np.abs(rows) @ (1 + np.abs(x)))
    outside = np.maximum(below - value, value - above)
    at_below, at_above = value - below <= unit, above - value <= unit
    equal = below == above
    active = np.flatnonzero(at_below | at_above)
    A = rows[active]
    y = np.linalg.lstsq(A.T, -gradient, rcond=1e-12)[0] if len(active) else np.zeros(0)
    bent = (np.abs(hessian) @ (np.abs(x) + NEARBY)).max()
    force = max(np.abs(gradient).max(), np.abs(A.T * y).max(initial=0.0), bent, 1e-300)
    residual = np.abs(gradient + A.T @ y).max() / force
    pull = y * size[active]
    inequality = ~equal[active]
    wrong = inequality & ((at_above[active] & (pull < -WEAK * force)) | (at_below[active] & (pull > WEAK * force)))
    nothing = np.zeros(n), np.zeros(problem.m)
    scaled = A / np.maximum(size[active], 1e-300)[:, None]
    singular = np.linalg.svd(scaled, compute_uv=False) if len(active) else np.ones(1)
    dependent = len(active) > n or singular.min() <= RANK * singular.max()
    if (outside > unit).any() or residual > STATIONARY or (wrong.any() and not dependent):
        return Truth(NO_KKT, *nothing)
    if dependent:
        return Truth(DEPENDENT, *nothing)
    H = hessian + sum((y[k] * full(hessians[i]) for k, i in enumerate(active) if i < problem.m), start=np.zeros((n, n)))
    weak = inequality & (np.abs(pull) <= WEAK * force)
    least = _least_curvature(H, scaled[~weak])
    scale = max(np.abs(H).max(), 1e-300)
    if weak.any():
        return Truth(KINK if _least_curvature(H, scaled) >= -CURVED * scale else NO_MINIMUM, *nothing)
    if least <= CURVED * scale:
        return Truth(SINGULAR if least >= -CURVED * scale else NO_MINIMUM, *nothing)
    r = len(active)
    K = np.block([[H, A.T], [A, np.zeros((r, r))]])
    distance = np.linalg.solve(K, -np.concatenate([gradient + A.T @ y, _gap(value, below, above)[active]]))[:n]
    if np.abs(distance).max() > FAR * (1 + np.abs(x).max()):
        return Truth(SINGULAR, *nothing)
    adjoint = np.linalg.solve(K, np.concatenate([weight, np.zeros(r)]))
    shift, moved_rows = np.zeros(problem.m), np.zeros(r)
    for k, i in enumerate(active):
        if i < problem.m:
            shift[i], moved_rows[k] = adjoint[n + k], along[1][i]
    dx = np.linalg.solve(K, np.concatenate([-along[0], moved_rows]))[:n]
    return Truth(REGULAR, -adjoint[:n], shift, float(np.linalg.norm(dx)))


def _gap(value: Vector, below: Vector, above: Vector) -> Vector:
    """Return by how much each value exceeds the nearer of its bounds."""
    over, under = value - above, value - below
    return np.where(np.abs(over) < np.abs(under), over, under)


def _least_curvature(H: Matrix, rows: Matrix) -> float:
    """Return the least eigenvalue of H on the null space of the rows, inf where that is empty."""
    if len(rows):
        _, values, right = np.linalg.svd(rows)
        basis = right[int((values > RANK * values.max()).sum()) :].T
    else:
        basis = np.eye(len(H))
    return float(np.linalg.eigvalsh(basis.T @ H @ basis).min()) if basis.shape[1] else np.inf
