"""Costs of linear programs that depend on features, by the generators of PyEPO (Tang and Khalil, 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.checks import require_whole
from foldopt.errors import InputError, MissingDependencyError


@dataclass(frozen=True)
class LinearProgramData:
    """Features (samples, n_features) and costs (samples, n) per split, float64."""

    features: dict[str, Tensor]
    costs: dict[str, Tensor]


def _split(sizes: dict[str, int], features: Tensor, costs: Tensor) -> LinearProgramData:
    parts = list(sizes.values())
    return LinearProgramData(
        dict(zip(sizes, features.split(parts), strict=True)), dict(zip(sizes, costs.split(parts), strict=True))
    )


def _checked(seed: int, sizes: dict[str, int], n_features: int, degree: int, noise: float) -> None:
    """Raise InputError for a value out of range."""
    values = {**{f"n_{name}": size for name, size in sizes.items()}, "n_features": n_features, "degree": degree}
    for name, value in values.items():
        require_whole(f"task.{name}", value, 1)
    require_whole("seed", seed, 0)
    if not 0 <= noise < 1:
        raise InputError(f"task.noise={noise}: the half-width of a factor around 1 is a number from 0 to below 1.")


def _numbers(*arrays: object) -> list[Tensor]:
    return [torch.as_tensor(array, dtype=torch.float64) for array in arrays]


def shortest_path(
    seed: int, sizes: dict[str, int], rows: int, columns: int, n_features: int, degree: int, noise: float
) -> LinearProgramData:
    """Draw costs of the edges of a grid.

    Features z are standard normal, B is Bernoulli(1/2), and the cost of an edge is
    ((B z / sqrt(n_features) + 3)^degree + 1) / 3.5^degree times a factor that is uniform in [1 - noise, 1 + noise].

    Args:
        seed: of all random numbers.
        sizes: samples of each split, by its name.
        rows: nodes of the grid from north to south.
        columns: nodes of the grid from west to east.
        n_features: length of z.
        degree: of the polynomial, from 1.
        noise: half-width of the factor, in [0, 1).
    """
    _checked(seed, sizes, n_features, degree, noise)
    draw = _pyepo().shortestpath.genData
    z, c = _numbers(*draw(sum(sizes.values()), n_features, (rows, columns), deg=degree, noise_width=noise, seed=seed))
    return _split(sizes, z, c)


def knapsack(
    seed: int, sizes: dict[str, int], items: int, dimensions: int, n_features: int, degree: int, noise: float
) -> tuple[LinearProgramData, Tensor]:
    """Draw values of the items of a knapsack, and their weights (dimensions, items), which all samples share.

    Values are those of `shortest_path` times 5, rounded up; weights are uniform in 3.00, 3.01, ..., 7.99.

    Args:
        seed: of all random numbers.
        sizes: samples of each split, by its name.
        items: how many there are.
        dimensions: how many weights an item has.
        n_features: length of the features.
        degree: of the polynomial from features to values.
        noise: half-width of the factor around 1, in [0, 1).
    """
    _checked(seed, sizes, n_features, degree, noise)
    require_whole("task.items", items, 1)
    require_whole("task.dimensions", dimensions, 1)
    draw = _pyepo().knapsack.genData
    found = draw(sum(sizes.values()), n_features, items, dim=dimensions, deg=degree, noise_width=noise, seed=seed)
    weights, z, c = _numbers(*found)
    return _split(sizes, z, c), weights


def assignment(
    seed: int, sizes: dict[str, int], size: int, n_features: int, degree: int, noise: float
) -> LinearProgramData:
    """Draw costs of an assignment of `size` workers to jobs, as those of the edges in `shortest_path`.

    PyEPO has no generator of assignments. Costs are drawn for a grid with at least size^2 edges, of which the first
    size^2 are taken; they are independent, so that it does not matter which.

    Args:
        seed: of all random numbers.
        sizes: samples of each split, by its name.
        size: number of workers, and of jobs.
        n_features: length of the features.
        degree: of the polynomial from features to costs.
        noise: half-width of the factor around 1, in [0, 1).
    """
    require_whole("task.size", size, 2)
    drawn = shortest_path(seed, sizes, size + 1, size + 1, n_features, degree, noise)
    return LinearProgramData(drawn.features, {name: c[:, : size * size] for name, c in drawn.costs.items()})


def _pyepo():  # type: ignore[no-untyped-def] # a module of an optional package
    try:
        import pyepo.data
    except ImportError as error:
        raise MissingDependencyError(
            "task=linear_program draws its data with PyEPO; install it with: pip install 'foldopt[pyepo]'"
        ) from error
    return pyepo.data
