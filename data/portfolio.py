"""Synthetic portfolio data of Elmachtoub and Grigas, "Smart predict, then optimize" (2022), appendix D."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.checks import require_positive, require_whole


@dataclass(frozen=True)
class PortfolioData:
    """Features and asset returns by split, and the risk model; float64.

    Attributes:
        features: (samples, n_features).
        returns: (samples, n_assets).
        V: Covariance of the returns, (n_assets, n_assets).
        gamma: Risk limit on x'Vx.
    """

    features: dict[str, Tensor]
    returns: dict[str, Tensor]
    V: Tensor
    gamma: float


def generate(
    seed: int,
    degree: int,
    n_train: int,
    n_val: int,
    n_test: int,
    n_assets: int = 20,
    n_features: int = 5,
    tau: float = 1.0,
) -> PortfolioData:
    """Draw a data set; the same arguments give the same numbers.

    B ~ Bernoulli(1/2) of shape (n_assets, n_features), L ~ U(-0.0025 tau, 0.0025 tau) of shape (n_assets, 4), features
    z ~ N(0, I). Returns are mean + L f + 0.01 tau e with f, e standard normal and mean
    ((0.05 / sqrt(n_features)) B z + 0.1^(1/degree))^degree; V = L L' + (0.01 tau)^2 I; gamma = 2.25 w'Vw with
    w = (2/n_assets) 1, which equals e/10 for 20 assets.

    Args:
        seed: Seed of all random numbers.
        degree: Degree of the polynomial, at least 1.
        n_train: Number of training samples.
        n_val: Number of validation samples.
        n_test: Number of test samples.
        n_assets: Number of assets.
        n_features: Number of features.
        tau: Noise level, above 0.

    Raises:
        InputError: An argument is out of range.
    """
    for name, value, least in (
        ("degree", degree, 1),
        ("n_train", n_train, 1),
        ("n_val", n_val, 1),
        ("n_test", n_test, 1),
        ("n_assets", n_assets, 2),
        ("n_features", n_features, 1),
    ):
        require_whole(name, value, least)
    require_positive("tau", tau)
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    B = torch.bernoulli(torch.full((n_assets, n_features), 0.5, dtype=torch.float64), generator=gen)
    L = 0.0025 * tau * (2 * torch.rand(n_assets, 4, generator=gen, dtype=torch.float64) - 1)
    total = n_train + n_val + n_test
    z = normal(total, n_features)
    mean = (0.05 / n_features**0.5 * z @ B.T + 0.1 ** (1 / degree)) ** degree
    returns = mean + normal(total, 4) @ L.T + 0.01 * tau * normal(total, n_assets)
    V = L @ L.T + (0.01 * tau) ** 2 * torch.eye(n_assets, dtype=torch.float64)
    w = torch.full((n_assets,), 2 / n_assets, dtype=torch.float64)
    sizes = [n_train, n_val, n_test]
    names = ("train", "val", "test")
    return PortfolioData(
        dict(zip(names, z.split(sizes), strict=True)),
        dict(zip(names, returns.split(sizes), strict=True)),
        V,
        float(2.25 * w @ V @ w),
    )
