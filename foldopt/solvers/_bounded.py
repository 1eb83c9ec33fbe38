"""One quadratic program in the form that solvers accept, and the way back for its multipliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Answer", "Bounded"]


class Answer(NamedTuple):
    """What a solver returned for min 1/2 x'Hx + q'x subject to lower <= Cx <= upper; nothing in it is checked.

    Attributes:
        x: the solution, (n,).
        y: the multipliers of the rows, (r,), above 0 at upper and below 0 at lower: Hx + q + C'y = 0 at a solution.
        found: whether the solver says that it reached its tolerance.
    """

    x: Any
    y: Any
    found: bool


class Bounded:
    """A program in the form that solvers accept: min 1/2 x'Hx + q'x, Ax = b, below <= Gx <= above, low <= x <= high.

    Rows of C with a single entry become bounds unless they are equalities. If a variable has several bounds, the
    tightest is used. A and G are None if they have no rows. If H or C is sparse, all matrices are sparse; H, A and G
    are then in CSC layout. `possible` is False if a row without entries has limits that exclude zero. `linear` tells
    whether H is zero.

    Args:
        H: (n, n), a NumPy array or SciPy matrix, positive semidefinite.
        q: (n,).
        C: (r, n), a NumPy array or SciPy matrix.
        lower: (r,), lower limits of the rows; -inf is no limit.
        upper: (r,), upper limits of the rows; inf is no limit. Equal to `lower` in an equality.
    """

    def __init__(self, H: Any, q: Any, C: Any, lower: Any, upper: Any) -> None:
        import numpy as np
        import scipy.sparse as sp

        self.sparse = sp.issparse(H) or sp.issparse(C)
        if self.sparse:
            H, C = sp.csc_matrix(H), sp.csr_matrix(C)
            if not C.data.all():
                C = C.copy()
                C.eliminate_zeros()
        self.H, self.q, self.C, self.lower, self.upper = H, q, C, lower, upper
        self.linear = not (H.data if self.sparse else H).any()
        entries = np.diff(C.indptr) if self.sparse else np.count_nonzero(C, axis=1)
        equal = lower == upper
        self.possible = not ((entries == 0) & ((lower > 0) | (upper < 0))).any()
        single = np.flatnonzero((entries == 1) & ~equal)
        self.equal = np.flatnonzero((entries > 0) & equal)
        self.between = np.flatnonzero((entries > 1) & ~equal & (np.isfinite(lower) | np.isfinite(upper)))
        self.A, self.b = self._rows(self.equal), lower[self.equal]
        self.G, self.below, self.above = self._rows(self.between), lower[self.between], upper[self.between]
        column, entry = self._entries(single)
        low, high = lower[single] / entry, upper[single] / entry
        low, high = np.where(entry > 0, low, high), np.where(entry > 0, high, low)
        self.low, self.high = np.full(len(q), -np.inf), np.full(len(q), np.inf)
        np.maximum.at(self.low, column, low)
        np.minimum.at(self.high, column, high)
        self.at_low, self.at_high = np.zeros(len(q), dtype=int), np.zeros(len(q), dtype=int)  # the rows of these bounds
        for bound, tightest, row in ((low, self.low, self.at_low), (high, self.high, self.at_high)):
            holds = bound == tightest[column]
            row[column[holds]] = single[holds]
        self.entry = np.ones(len(lower))
        self.entry[single] = entry

    def _rows(self, index: Any) -> Any:
        if not len(index):
            return None
        rows = self.C if len(index) == self.C.shape[0] else self.C[index]
        return rows.tocsc() if self.sparse else rows

    def _entries(self, rows: Any) -> tuple[Any, Any]:
        """Return the columns and the values of the entries of rows that have a single entry."""
        if self.sparse:
            at = self.C.indptr[rows]
            return self.C.indices[at], self.C.data[at]
        column = (self.C[rows] != 0).argmax(1) if len(rows) else rows
        return column, self.C[rows, column]

    def answer(self, x: Any, equal: Any, between: Any, bounds: Any, found: bool) -> Answer | None:
        """Return x with the multipliers of the rows of C; None if a number is not finite.

        A multiplier on the side of an infinite limit comes from rounding and becomes zero.

        Args:
            x: the solution, (n,).
            equal: multipliers of the rows of A.
            between: multipliers of the rows of G.
            bounds: multipliers of the bounds, (n,), above 0 at high and below 0 at low.
            found: whether the solver says that it reached its tolerance.
        """
        import numpy as np

        x, y = np.array(x, dtype=float), np.zeros(len(self.lower))
        if self.A is not None:
            y[self.equal] = equal
        if self.G is not None:
            y[self.between] = between
        sides = (self.at_low, self.low, np.minimum(bounds, 0)), (self.at_high, self.high, np.maximum(bounds, 0))
        for row, bound, part in sides:
            held = np.flatnonzero((part != 0) & np.isfinite(bound))
            y[row[held]] += part[held] / self.entry[row[held]]
        y = np.minimum(y, np.where(np.isfinite(self.upper), np.inf, 0))
        y = np.maximum(y, np.where(np.isfinite(self.lower), -np.inf, 0))
        return Answer(x, y, bool(found)) if np.isfinite(x).all() and np.isfinite(y).all() else None

    def one_sided(self) -> tuple[Any, Any, Callable[[Any], tuple[Any, Any]]]:
        """Return (F, f, split), where Fx <= f holds the finite limits of G and of the bounds.

        ``split(z)`` turns the multipliers z of Fx <= f into those of G and those of the bounds. F and f are None if
        there is no finite limit.
        """
        import numpy as np
        import scipy.sparse as sp

        n, sides = len(self.q), [np.flatnonzero(np.isfinite(v)) for v in (self.above, self.below, self.high, self.low)]
        above, below, high, low = sides
        ends = np.cumsum([len(side) for side in sides])

        def split(z: Any) -> tuple[Any, Any]:
            between, bounds = np.zeros(len(self.between)), np.zeros(n)
            of_above, of_below, of_high, of_low, _ = np.split(np.asarray(z), ends)
            between[above] += of_above
            between[below] -= of_below
            bounds[high] += of_high
            bounds[low] -= of_low
            return between, bounds

        if not ends[-1]:
            return None, None, split
        identity = sp.identity(n, format="csr") if self.sparse else np.eye(n)
        parts = [identity[high], -identity[low]]
        if self.G is not None:
            parts = [self.C[self.between[above]], -self.C[self.between[below]], *parts]
        f = np.concatenate([self.above[above], -self.below[below], self.high[high], -self.low[low]])
        return (sp.vstack(parts, format="csc") if self.sparse else np.concatenate(parts)), f, split

    def residual(self, answer: Answer) -> float:
        """Return the largest violation of stationarity, of the limits of the rows or of complementarity."""
        import numpy as np

        x, y, _ = answer
        z = self.C @ x
        slope = np.abs(self.H @ x + self.q + self.C.T @ y)
        outside = np.maximum(self.lower - z, z - self.upper)
        carries = np.flatnonzero(y)
        gap = np.abs(y[carries] * np.where(y > 0, self.upper - z, z - self.lower)[carries])
        return max(slope.max(initial=0), gap.max(initial=0), outside.max(initial=0))
