"""Quadratic programs for the tests of the QP layer, and their truth, computed without foldopt.

A program is min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, lower <= x <= upper. `truth` solves it with Clarabel, makes
the answer exact by a least-squares solve on its active rows, asks one linear program (HiGHS) which active rows can
carry a positive multiplier, and differentiates by the null space of those rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

F32, F64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
ARGUMENTS = ("Q", "p", "G", "h", "A", "b", "lower", "upper")

DIFFERENTIABLE, KINK, NOT_UNIQUE = "differentiable", "kink", "not unique"


def _empty(*shape):
    return field(default_factory=lambda: np.zeros(shape))


@dataclass
class Program:
    """One quadratic program in numpy; parts that are None are left out."""

    Q: np.ndarray
    p: np.ndarray
    G: np.ndarray | None = None
    h: np.ndarray | None = None
    A: np.ndarray | None = None
    b: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None

    def __post_init__(self):
        for name in ARGUMENTS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, np.asarray(value, float))

    @property
    def n(self):
        return len(self.p)

    def rows(self):
        """Return C, low, high of low <= Cx <= high: the rows of G, of A and the bounds, each of norm 1 (or 0)."""
        n, inf = self.n, np.inf
        parts = [(np.zeros((0, n)), np.zeros(0), np.zeros(0))]
        if self.G is not None:
            parts.append((self.G, np.full(len(self.h), -inf), self.h))
        if self.A is not None:
            parts.append((self.A, self.b, self.b))
        if self.lower is not None or self.upper is not None:
            lower = np.full(n, -inf) if self.lower is None else np.broadcast_to(self.lower, n)
            upper = np.full(n, inf) if self.upper is None else np.broadcast_to(self.upper, n)
            parts.append((np.eye(n), lower, upper))
        C, low, high = (np.concatenate(part) for part in zip(*parts, strict=True))
        norm = np.linalg.norm(C, axis=1)
        norm = np.where(norm > 0, norm, 1)
        C, low, high = C / norm[:, None], low / norm, high / norm
        bounds = np.isfinite(low) | np.isfinite(high)
        return C[bounds], low[bounds], high[bounds]

    def moved(self, **steps):
        """Return the program with a step added to each named part."""
        return replace(self, **{name: getattr(self, name) + step for name, step in steps.items()})


@dataclass
class Truth:
    """A solution x, the rows that are active there, and the derivative with respect to p."""

    status: str
    program: Program
    x: np.ndarray | None = None
    strong: np.ndarray | None = None  # active rows that can have a nonzero multiplier
    weak: np.ndarray | None = None  # active rows whose multiplier is always zero

    def verdict(self, g, tol=1e-7):
        """Return the verdict on the derivative of g'x with respect to p, and the derivative or None."""
        Q = self.program.Q
        N = null_space(self.strong, len(self.x))
        w, V = np.linalg.eigh(N.T @ Q @ N)
        flat = w < 1e-10 * max(np.abs(Q).max(), 1e-300)
        right = V.T @ (N.T @ g)
        right[np.abs(right) < 1e-11 * np.abs(g).max()] = 0  # rounding
        if np.abs(right[flat]).max(initial=0) > tol * np.abs(g).max():
            return NOT_UNIQUE, None
        v = N @ (V[:, ~flat] @ (right[~flat] / w[~flat]))
        size = max(np.abs(v).max(), 1e-12 * np.abs(g).max())
        if flat.any():
            # x is not unique: a small change of p makes one end of the set of solutions the solution, and the row that
            # is active there has a multiplier as small. g'x does not follow it if some v leaves all such rows in place
            free = N @ V[:, flat]
            ends = self._ends(free, tol)
            v = v - free @ np.linalg.lstsq(ends @ free, ends @ v, rcond=1e-9)[0]
            if np.abs(ends @ v).max(initial=0) > tol * size:
                return NOT_UNIQUE, None
        if np.abs(self.weak @ v).max(initial=0) > tol * max(size, np.abs(v).max()):
            return KINK, None
        return DIFFERENTIABLE, -v

    def _ends(self, free, tol):
        """Return the rows that are active at some solution and not at others; those differ by a combination of `free`.

        A linear program per row finds how far the solutions reach towards it.
        """
        linprog = pytest.importorskip("scipy.optimize").linprog
        C, low, high = self.program.rows()
        found = (np.abs(C @ free).max(1, initial=0) > tol) & (low != high)
        fixed = np.concatenate([self.strong, self.program.Q])
        some = np.isfinite(high), np.isfinite(low)
        rows, right = np.concatenate([C[some[0]], -C[some[1]]]), np.concatenate([high[some[0]], -low[some[1]]])
        ends = [np.zeros((0, len(self.x)))]
        for c, least, most in zip(C[found], low[found], high[found], strict=True):
            for sign, end in ((1, most), (-1, -least)):
                if np.isfinite(end):
                    far = linprog(-sign * c, rows, right, fixed, fixed @ self.x, (None, None))
                    if far.status != 0 or -far.fun > end - 1e-7 * (1 + abs(end)):
                        ends.append(c[None])
        return np.concatenate(ends)

    def gradient(self, g):
        verdict, gradient = self.verdict(np.asarray(g, float))
        assert verdict == DIFFERENTIABLE, verdict
        return gradient


def null_space(C, n):
    """Return an orthonormal basis of {v: Cv = 0}, after scaling the rows of C to size 1."""
    size = np.linalg.norm(C, axis=1) if len(C) else np.zeros(0)
    C = C[size > 0] / size[size > 0, None]
    if not len(C):
        return np.eye(n)
    _, s, Vt = np.linalg.svd(C)
    return Vt[int((s > 1e-9 * s[0]).sum()) :].T


def clarabel(program, tol=1e-11):
    """Return (status, x, y) with the multipliers y of the rows of C, positive at high and negative at low."""
    solver = pytest.importorskip("clarabel")
    sp = pytest.importorskip("scipy.sparse")
    C, low, high = program.rows()
    equal = low == high
    up, down = np.flatnonzero(~equal & np.isfinite(high)), np.flatnonzero(~equal & np.isfinite(low))
    equal = np.flatnonzero(equal)
    rows = sp.csc_matrix(np.concatenate([C[equal], C[up], -C[down]]))
    right = np.concatenate([high[equal], high[up], -low[down]])
    cones = [solver.ZeroConeT(len(equal)), solver.NonnegativeConeT(len(up) + len(down))]
    settings = solver.DefaultSettings()
    settings.verbose, settings.max_iter = False, 400
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tol
    Q = sp.csc_matrix(np.triu(program.Q))
    found = solver.DefaultSolver(Q, program.p, rows, right, cones, settings).solve()
    names = {"PrimalInfeasible": "infeasible", "DualInfeasible": "unbounded"}
    said = str(found.status).removeprefix("Almost")
    if said in names:
        return names[said], None, None
    z, y = np.array(found.z), np.zeros(len(C))
    y[equal] = z[: len(equal)]
    y[up] += z[len(equal) : len(equal) + len(up)]
    y[down] -= z[len(equal) + len(up) :]
    return "solved", np.array(found.x), y


def residual(program, x, y):
    """Return the largest violation of the optimality conditions, relative to the size of the data and the answer."""
    C, low, high = program.rows()
    z = C @ x
    size = 1 + np.abs(x).max(initial=0)
    stationarity = program.Q @ x + program.p + C.T @ y
    wrong = np.where(y > 0, high - z, np.where(y < 0, z - low, 0.0))
    return max(
        np.abs(stationarity).max(initial=0) / (1 + np.abs(program.p).max(initial=0) + np.abs(y).max(initial=0)),
        np.maximum(z - high, low - z).max(initial=0) / size,
        np.abs(np.minimum(np.abs(y), np.abs(wrong))).max(initial=0) / size,
    )


def exact(program, x, y, tol=1e-11):
    """Return x and y to rounding: the best of several least-squares solves, on guesses of the active rows."""
    lstsq = pytest.importorskip("scipy.linalg").lstsq
    C, low, high = program.rows()
    best = residual(program, x, y), x, y
    z = C @ x
    near = [(high - z < t, z - low < t) for t in (1e-7, 1e-6, 1e-5, 1e-4)]
    carried = [(y > t, -y > t) for t in (1e-6, 1e-5, 1e-4, 1e-3)]
    for up, down in [(z + y > high, z + y < low), *near, *carried]:
        for _ in range(4):
            rows = (low == high) | up | down
            S, right = C[rows], np.where(up | (low == high), high, low)[rows]
            K = np.block([[program.Q, S.T], [S, np.zeros((len(S), len(S)))]])
            at = np.concatenate([x, y[rows]])
            for _ in range(2):
                left = np.concatenate([-program.p, right]) - K @ at
                at = at + lstsq(K, left, cond=1e-13, lapack_driver="gelsy")[0]
            new, multipliers = at[: program.n], np.zeros(len(C))
            multipliers[rows] = at[program.n :]
            now = residual(program, new, multipliers)
            if now < best[0]:
                best = now, new, multipliers
            if best[0] < 1e-14:
                return best[1:]
            again = C @ new + multipliers > high, C @ new + multipliers < low
            if (again[0] == up).all() and (again[1] == down).all():
                break
            up, down = again
        if best[0] < 1e-13:
            break
    assert best[0] < tol, f"the reference itself is only right to {best[0]:.1e}"
    return best[1:]


def active(program, x, tol=1e-8):
    """Return the active rows that can have a multiplier, and those that cannot."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    C, low, high = program.rows()
    z = C @ x
    scale = tol * (1 + np.abs(z))
    equal, up, down = low == high, (high - z <= scale) & (low != high), (z - low <= scale) & (low != high)
    g = program.Q @ x + program.p
    g[np.abs(g) < 1e-12 * (np.abs(program.Q) @ np.abs(x) + np.abs(program.p))] = 0  # rounding
    W = np.concatenate([C[up], -C[down]])
    E, k = C[equal], len(W)
    strong = np.zeros(k, bool)
    if k:
        # max sum t: E'a + W'(w + t) = -g s, w >= 0, 0 <= t <= 1, s >= 1: multipliers with the most nonzeros, scaled
        cost = np.concatenate([np.zeros(len(E) + k), -np.ones(k), [0.0]])
        rows = np.concatenate([E.T, W.T, W.T, g[:, None]], 1)
        bounds = [(None, None)] * len(E) + [(0, None)] * k + [(0, 1)] * k + [(1, None)]
        norm = np.maximum(np.abs(rows).max(1), 1e-300)
        found = linprog(cost, A_eq=rows / norm[:, None], b_eq=np.zeros(len(g)), bounds=bounds)
        assert found.status == 0, found.message
        strong = found.x[len(E) + k : len(E) + 2 * k] > 0.5
    return np.concatenate([E, W[strong]]), W[~strong]


def truth(program):
    """Return the program's status and, if it is solved, its solution and active rows."""
    assert np.linalg.eigvalsh(program.Q).min(initial=0) >= -1e-12 * np.abs(program.Q).max(initial=0)
    status, x, y = clarabel(program)
    if status != "solved":
        return Truth(status, program)
    x, _ = exact(program, x, y)
    return Truth(status, program, x, *active(program, x))


def stacked(programs, dtype=F64):
    """Return the arguments of a batch by name, without the parts that no program has."""
    found = {}
    for name in ARGUMENTS:
        parts = [getattr(program, name) for program in programs]
        if parts[0] is not None:
            found[name] = torch.tensor(np.stack(parts), dtype=dtype)
    return found


def tensor(*values):
    return torch.tensor(*values, dtype=F64)


def symmetric(Q):
    return (Q + Q.mT) / 2


def close(found, expected, rtol=1e-9, atol=None):
    """Compare with the tolerance `atol`; default: `rtol` times the largest entry (1e-12 if that is 0)."""
    expected = torch.as_tensor(np.asarray(expected), dtype=found.dtype)
    atol = (rtol * float(expected.abs().max()) or 1e-12) if atol is None else atol
    torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=atol)
