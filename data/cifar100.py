"""CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), loaded by torchvision."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foldopt.errors import FoldoptError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR100

CACHE = Path(__file__).resolve().parent / "cache"
CLASSES, GROUP = 100, 5
# Names of the classes by superclass, as the data set's documentation lists them; labels are alphabetical.
SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


class DataError(FoldoptError, LookupError):
    """A data set is not in the cache and cannot be downloaded."""


@dataclass(frozen=True)
class Images:
    """Images of a data set with their classes.

    Attributes:
        train: Training images (N, 3, 32, 32), uint8, and their classes (N,).
        test: Test images and their classes, in the same form.
        superclass: The superclass of each class, (classes,).
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    superclass: Tensor


def superclasses() -> Tensor:
    """Return the superclass, 0 to 19, of each of the 100 classes, (100,)."""
    group = {name: k for k, names in enumerate(SUPERCLASSES.values()) for name in names.split()}
    return torch.tensor([group[name] for name in sorted(group)])


def load(folder: Path = CACHE) -> Images:
    """Return CIFAR-100 from the cache `folder`; the first call downloads it there and checks its hashes.

    Raises:
        DataError: It cannot be downloaded. The message says which archive to put where.
    """
    from torchvision.datasets import CIFAR100

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cifar100.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of several workers downloads
        try:
            train, test = (CIFAR100(str(folder), train=part, download=True) for part in (True, False))
        except (OSError, RuntimeError, EOFError) as error:
            raise DataError(
                f"CIFAR-100 is not under {folder} and could not be downloaded ({error}). Put its archive "
                f"{CIFAR100.filename} (md5 {CIFAR100.tgz_md5}) there, or choose task.data=stand_in."
            ) from error
    return Images(_tensors(train), _tensors(test), superclasses())


def available(folder: Path = CACHE) -> bool:
    """Return whether the data set or its archive is in the cache; nothing is downloaded."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import check_integrity

    extracted = all(
        check_integrity(folder / CIFAR100.base_folder / name, md5)
        for name, md5 in CIFAR100.train_list + CIFAR100.test_list
    )
    return extracted or check_integrity(folder / CIFAR100.filename, CIFAR100.tgz_md5)


def _tensors(part: CIFAR100) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)
