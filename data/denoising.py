"""Synthetic piecewise constant signals with Gaussian noise (Amos and Kolter, "OptNet", 2017, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError


@dataclass(frozen=True)
class DenoisingData:
    """Noisy inputs and true signals, (samples, length) each, by split; float64."""

    noisy: dict[str, Tensor]
    signals: dict[str, Tensor]


def generate(
    seed: int,
    n_train: int,
    n_val: int,
    n_test: int,
    length: int = 100,
    max_segments: int = 9,
    low: float = 10.0,
    high: float = 100.0,
    noise: float = 10.0,
) -> DenoisingData:
    """Draw a data set; the same arguments give the same numbers.

    The number of constant segments of a signal, their ends, and their heights are drawn uniformly. The input is the
    signal plus independent N(0, noise^2) in every entry. The defaults have OptNet's scale; the paper (E.2) states noise
    of standard deviation 1.

    Args:
        seed: Seed of all random numbers.
        n_train: Number of training signals.
        n_val: Number of validation signals.
        n_test: Number of test signals.
        length: Number of entries of a signal.
        max_segments: Largest number of segments.
        low: Lower end of the heights.
        high: Upper end of the heights.
        noise: Standard deviation of the noise.

    Raises:
        InputError: An argument is out of range.
    """
    for name, value, least in (
        ("n_train", n_train, 1),
        ("n_val", n_val, 1),
        ("n_test", n_test, 1),
        ("length", length, 2),
        ("max_segments", max_segments, 1),
    ):
        require_whole(name, value, least)
    require_positive("noise", noise)
    if max_segments > length:
        raise InputError(
            f"max_segments={max_segments} exceeds the length={length} of the signals; choose fewer segments."
        )
    if not low < high:
        raise InputError(f"low={low}, high={high}: heights are drawn between low and high; take low below high.")
    gen = torch.Generator().manual_seed(seed)
    total = n_train + n_val + n_test
    segments = torch.randint(1, max_segments + 1, (total, 1), generator=gen)
    rank = torch.rand(total, length - 1, generator=gen).argsort(1).argsort(1)
    jumps = torch.cat([torch.zeros(total, 1, dtype=torch.long), (rank < segments - 1).long()], 1)
    heights = low + (high - low) * torch.rand(total, max_segments, generator=gen, dtype=torch.float64)
    signals = heights.gather(1, jumps.cumsum(1))
    noisy = signals + noise * torch.randn(total, length, generator=gen, dtype=torch.float64)
    sizes, names = [n_train, n_val, n_test], ("train", "val", "test")
    return DenoisingData(
        dict(zip(names, noisy.split(sizes), strict=True)), dict(zip(names, signals.split(sizes), strict=True))
    )
