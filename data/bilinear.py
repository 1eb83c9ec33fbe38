"""Synthetic data of the bilinear study (Kotary, Dinh and Fioretto, 2023, appendix E.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.checks import require_whole

RATIO_FLOOR = 1e-6


@dataclass(frozen=True)
class BilinearData:
    """Features (samples, n_features) and targets (samples, n_targets) by split, float64."""

    features: dict[str, Tensor]
    targets: dict[str, Tensor]


def generate(
    seed: int, n_train: int, n_val: int, n_test: int, n_targets: int, n_features: int = 10, hidden: int = 32
) -> BilinearData:
    """Draw a data set; the same arguments give the same numbers.

    Features are uniform in [-2, 2]. A network of two layers without biases, with tanh after both and weights from
    N(0, 1 / inputs), maps them to u in (-1, 1), and `nonlinearity` maps u to the targets. The paper does not state the
    width and the weights of this network.

    Args:
        seed: Seed of all random numbers.
        n_train: Number of training samples.
        n_val: Number of validation samples.
        n_test: Number of test samples.
        n_targets: Number of targets of a sample.
        n_features: Number of features of a sample.
        hidden: Width of the network's hidden layer.

    Raises:
        InputError: An argument is not a whole number, or out of range.
    """
    sizes = {"n_train": n_train, "n_val": n_val, "n_test": n_test}
    for name, value in {**sizes, "n_targets": n_targets, "n_features": n_features, "hidden": hidden}.items():
        require_whole(name, value, 1)
    require_whole("seed", seed, 0)
    gen = torch.Generator().manual_seed(seed)
    first = torch.randn(n_features, hidden, generator=gen, dtype=torch.float64) / n_features**0.5
    second = torch.randn(hidden, n_targets, generator=gen, dtype=torch.float64) / hidden**0.5
    z = 4 * torch.rand(sum(sizes.values()), n_features, generator=gen, dtype=torch.float64) - 2
    targets = nonlinearity(((z @ first).tanh() @ second).tanh())
    parts = list(sizes.values())
    names = [name.removeprefix("n_") for name in sizes]
    return BilinearData(
        dict(zip(names, z.split(parts), strict=True)), dict(zip(names, targets.split(parts), strict=True))
    )


def nonlinearity(u: Tensor) -> Tensor:
    """Return u cos 2u + 5/2 log(|u| / (u + 2)) + u^2 sin 4u for u above -2.

    The paper has log(u / (u + 2)), which is undefined for u in (-2, 0]. Here |u| replaces u, and the ratio is at least
    1e-6.
    """
    ratio = (u.abs() / (u + 2)).clamp(min=RATIO_FLOOR)
    return u * (2 * u).cos() + 2.5 * ratio.log() + u.square() * (4 * u).sin()


def interaction(seed: int, n: int) -> Tensor:
    """Return Q, (n, n), with independent standard normal entries; its seed is independent of the seed of the data.

    Raises:
        InputError: The seed or n is not a whole number, or out of range.
    """
    require_whole("seed", seed, 0)
    require_whole("n", n, 1)
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
