"""The Maros-Meszaros quadratic programs: read them from a folder, and convert them to a layer's arguments.

The folder holds a .mat file per problem, and the published optima by name in optima.json. A file has P, q, r, l, A and
u of min 1/2 x'Px + q'x + r subject to l <= Ax <= u, with infinite bounds as 1e20.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import scipy.sparse as sp
from numpy.typing import NDArray

Vector = NDArray[np.float64]
INFINITE = 9e19  # the files write infinity as 1e20
NEGLIGIBLE = 1e-9  # relative to the largest entry; smaller entries are rounding errors


@dataclass(frozen=True)
class Problem:
    """A problem of the collection: min 1/2 x'Px + q'x + offset subject to l <= Ax <= u, and its published optimum.

    The last n rows of A are the identity: the bounds of the variables.
    """

    name: str
    P: sp.csc_matrix
    q: Vector
    offset: float
    A: sp.csr_matrix
    l: Vector  # noqa: E741
    u: Vector
    optimum: float

    @property
    def n(self) -> int:
        """The number of variables."""
        return len(self.q)

    def objective(self, x: Vector) -> float:
        """Return the objective at x."""
        return float(0.5 * x @ (self.P @ x) + self.q @ x + self.offset)

    def violations(self, x: Vector) -> tuple[float, float]:
        """Return the largest relative violation of a row, and that of a bound.

        The violation of row i is relative to |a_i|'|x| + |the violated bound| + max_j |a_ij| times the median size of
        the nonzero variables, all in the units of the file.
        """
        size, value, usual = abs(self.A), self.A @ x, typical(x)
        below, above = self.l - value, value - self.u
        bound = np.where(below > above, self.l, self.u)
        scale = size @ np.abs(x) + np.where(np.isfinite(bound), np.abs(bound), 0.0)
        scale += usual * size.max(axis=1).toarray().ravel()
        violation = np.maximum(np.maximum(below, above), 0.0)
        worst = np.divide(violation, scale, out=np.where(violation > 0, np.inf, 0.0), where=scale > 0)
        rows = len(worst) - self.n
        return float(worst[:rows].max(initial=0.0)), float(worst[rows:].max(initial=0.0))


@dataclass(frozen=True)
class Arguments:
    """The arguments of a layer: min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b, lower <= x <= upper."""

    Q: sp.csc_matrix
    p: Vector
    G: sp.csr_matrix
    h: Vector
    A: sp.csr_matrix
    b: Vector
    lower: Vector
    upper: Vector


def names(folder: Path, largest: int | None = None) -> list[str]:
    """Return the problems in `folder` with at most `largest` variables, in alphabetical order."""
    found = sorted(path.stem for path in folder.glob("*.mat"))
    if largest is None:
        return found
    return [name for name in found if _variables(folder / f"{name}.mat") <= largest]


def _variables(path: Path) -> int:
    shapes = {name: shape for name, shape, _ in scipy.io.whosmat(path)}
    return int(np.prod(shapes["q"]))


def read(folder: Path, name: str) -> Problem:
    """Return the problem `name` of the collection in `folder`."""
    content = scipy.io.loadmat(folder / f"{name}.mat")
    q, below, above = (content[key].astype(float).ravel(order="F") for key in "qlu")
    P, A = sp.csc_matrix(content["P"].astype(float)), sp.csr_matrix(content["A"].astype(float))
    optimum = float(json.loads((folder / "optima.json").read_text())[name])
    if (A[-len(q) :] != sp.eye(len(q), format="csr")).nnz:
        raise ValueError(f"{name}: the last {len(q)} rows of A are not the bounds of the variables.")
    below, above = np.where(below <= -INFINITE, -np.inf, below), np.where(above >= INFINITE, np.inf, above)
    return Problem(name, P, q, float(content["r"].ravel()[0]), A, below, above, optimum)


def arguments(problem: Problem) -> Arguments:
    """Return `problem` as the arguments of a layer.

    Rows with l == u, including those that fix a variable, become Ax = b. Other rows become one or two rows of Gx <= h,
    and the bounds of the variables become lower and upper. Rows without a finite bound are left out.
    """
    n, rows = problem.n, problem.A.shape[0]
    is_bound = np.arange(rows) >= rows - n
    equal = (problem.l == problem.u) & np.isfinite(problem.l)
    above = np.flatnonzero(~equal & ~is_bound & np.isfinite(problem.u))
    below = np.flatnonzero(~equal & ~is_bound & np.isfinite(problem.l))
    free = equal[is_bound]
    return Arguments(
        problem.P,
        problem.q,
        sp.csr_matrix(sp.vstack([problem.A[above], -problem.A[below]])),
        np.concatenate([problem.u[above], -problem.l[below]]),
        sp.csr_matrix(problem.A[np.flatnonzero(equal)]),
        problem.u[equal],
        np.where(free, -np.inf, problem.l[is_bound]),
        np.where(free, np.inf, problem.u[is_bound]),
    )


def typical(x: Vector) -> float:
    """Return the median size of the entries of x that are not negligible, 1 if all entries are 0."""
    size = np.abs(x)
    large = size[size > NEGLIGIBLE * size.max(initial=0.0)]
    return float(np.median(large)) if len(large) else 1.0


def scales(args: Arguments, x: Vector, names: Sequence[str]) -> dict[str, Vector]:
    """Return the scale of each entry of the arguments in `names` (p, b, h, lower, upper), for perturbations.

    The scale of an entry is its own size or that of the terms that it is added to at x, whichever is larger; infinite
    entries have scale 0.
    """
    size = np.abs(x)

    def entries(value: Vector, terms: Vector) -> Vector:
        scale = np.maximum(np.where(np.isfinite(value), np.abs(value), 0.0), terms)
        usual = np.where(scale > NEGLIGIBLE * scale.max(initial=0.0), scale, typical(scale))
        return np.where(np.isfinite(value), usual, 0.0)

    made = {
        "p": lambda: entries(args.p, abs(args.Q) @ size),
        "b": lambda: entries(args.b, abs(args.A) @ size),
        "h": lambda: entries(args.h, abs(args.G) @ size),
        "lower": lambda: entries(args.lower, np.maximum(size, typical(x))),
        "upper": lambda: entries(args.upper, np.maximum(size, typical(x))),
    }
    return {name: made[name]() for name in names}
