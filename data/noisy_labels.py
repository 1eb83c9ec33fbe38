"""Images of 100 classes with noisy training labels (paper E.3; Berrada, Zisserman and Kumar, 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import cifar100, stand_in
from data.cifar100 import CACHE, CLASSES, GROUP, Images
from foldopt.checks import require_whole
from foldopt.errors import InputError

SOURCES = {"cifar100": "CIFAR-100", "stand_in": "stand-in images, not CIFAR-100"}
GROUPINGS = ("superclasses", "blocks")


@dataclass(frozen=True)
class NoisyLabels:
    """Images (N, 3, 32, 32), uint8, and labels (N,) by split; only the labels of "train" are noisy."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]


def generate(
    source: str,
    seed: int,
    n_train: int,
    n_val: int,
    n_test: int,
    noise: float = 0.2,
    groups: str = "superclasses",
    folder: Path = CACHE,
) -> NoisyLabels:
    """Split the images and draw the noise of the labels once; the same arguments give the same data.

    The splits "train" and "val" are taken from the shuffled training images, "test" from the official test images.

    Args:
        source: "cifar100" or "stand_in".
        seed: Seed of the shuffling, the noise, and the stand-in images.
        n_train: Number of training images.
        n_val: Number of validation images.
        n_test: Number of test images.
        noise: Probability that a label is redrawn uniformly within its group of 5, which includes the label itself.
        groups: "superclasses" are the true ones; "blocks" are 5 consecutive labels, as in the authors' code, which
            differ from CIFAR's superclasses.
        folder: The cache of CIFAR-100.

    Raises:
        InputError: An argument is out of range.
        DataError: CIFAR-100 is neither in the cache nor can be downloaded.
    """
    for name, value in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
        require_whole(name, value, 1)
    if source not in SOURCES:
        raise InputError(f"data={source!r} is unknown; choose one of {sorted(SOURCES)}.")
    if groups not in GROUPINGS:
        raise InputError(f"groups={groups!r} is unknown; choose one of {GROUPINGS}.")
    if not 0 <= noise <= 1:
        raise InputError(f"noise={noise}: the noise is a probability; take a number in [0, 1].")
    drawn = cifar100.load(folder) if source == "cifar100" else stand_in.generate(seed, n_train + n_val, n_test)
    return _split(drawn, seed, (n_train, n_val, n_test), noise, groups)


def _split(drawn: Images, seed: int, sizes: tuple[int, int, int], noise: float, groups: str) -> NoisyLabels:
    n_train, n_val, n_test = sizes
    for name, wanted, there in (
        ("n_train + n_val", n_train + n_val, len(drawn.train[1])),
        ("n_test", n_test, len(drawn.test[1])),
    ):
        if wanted > there:
            raise InputError(f"{name}={wanted}: the data set has only {there} such images; choose fewer.")
    gen = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(drawn.train[1]), generator=gen)
    places = {"train": order[:n_train], "val": order[n_train : n_train + n_val]}
    images = {name: drawn.train[0][place] for name, place in places.items()} | {"test": drawn.test[0][:n_test]}
    labels = {name: drawn.train[1][place] for name, place in places.items()} | {"test": drawn.test[1][:n_test]}
    group = drawn.superclass if groups == "superclasses" else torch.arange(CLASSES) // GROUP
    labels["train"] = resample(labels["train"], group, noise, gen)
    return NoisyLabels(images, labels)


def resample(labels: Tensor, group: Tensor, noise: float, gen: torch.Generator) -> Tensor:
    """Redraw each of `labels` (N,) with probability `noise` within its group; group: that of each class, (100,)."""
    members = group.argsort(stable=True).view(-1, GROUP)
    chosen = members[group[labels], torch.randint(GROUP, labels.shape, generator=gen)]
    return torch.where(torch.rand(labels.shape, generator=gen) < noise, chosen, labels)
