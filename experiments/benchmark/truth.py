"""True derivatives of the problems of the collection, by differences and independent of the libraries."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.benchmark import differences
from experiments.benchmark.collection import Arguments, Vector, arguments, read, scales, typical
from experiments.benchmark.differences import Difference
from experiments.benchmark.reference import Reference

WITH_RESPECT_TO = ("p", "b", "h", "lower", "upper")
DIRECTIONS = 2
LARGEST = 5000  # most variables of a problem whose derivatives are compared with differences


@dataclass(frozen=True)
class Along:
    """A direction of an argument, and the derivative of weights'x along it."""

    direction: Vector
    difference: Difference


@dataclass(frozen=True)
class Truth:
    """The derivatives of weights'x at the solution of a problem.

    Attributes:
        gap: The range of weights'x over all solutions, NaN if it is unknown.
        reach: |weights|'|x|, NaN if there is no reference solution.
        along: Some directions for each argument with finite entries; empty if the solution is not unique.
    """

    gap: float = np.nan
    reach: float = np.nan
    along: Mapping[str, tuple[Along, ...]] = field(default_factory=dict)


def weights(name: str, n: int) -> Vector:
    """Return the weights w of the problem `name`, whose gradients are those of w'x."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(n)


def given(args: Arguments) -> list[str]:
    """Return the arguments among `WITH_RESPECT_TO` that have finite entries."""
    return [name for name in WITH_RESPECT_TO if np.isfinite(getattr(args, name)).any()]


def truth_of(folder: Path, name: str) -> Truth:
    """Return the true derivatives of the problem `name`."""
    args = arguments(read(folder, name))
    return truth(args, weights(name, len(args.p)), np.random.default_rng(zlib.crc32(name.encode()) + 1))


def truth(args: Arguments, w: Vector, rng: np.random.Generator) -> Truth:
    """Return the true derivatives of w'x; an empty `Truth` if the reference finds no solution."""
    reference = Reference(args)
    x = reference(args)
    if x is None:
        return Truth()
    sizes, reach = scales(args, x, given(args)), float(np.abs(w) @ np.abs(x))
    gap = differences.gap(reference, args, w, typical(sizes["p"]))
    if gap > 0:
        return Truth(gap, reach)
    along = {}
    for name, size in sizes.items():
        directions = [rng.standard_normal(len(size)) * size for _ in range(DIRECTIONS)]
        along[name] = tuple(
            Along(direction, differences.difference(reference, args, name, direction, w)) for direction in directions
        )
    return Truth(gap, reach, along)
