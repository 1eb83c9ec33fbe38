"""A procedural stand-in for CIFAR-100 where that is not available: 20 superclasses of 5 classes, 32 x 32 pixels.

Each image shows an object on a plain background. Hue and filling of the object determine the superclass, its outline
the class. As in CIFAR-100, superclasses are easier to tell apart than the classes of a superclass, but the images are
much simpler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from data.cifar100 import CLASSES, GROUP, Images
from foldopt.checks import require_whole

SIDE, OVERSAMPLED = 32, 2
HUES = 5
CHUNK = 1000
OUTLINES = ("disc", "triangle", "square", "star", "flower")


def generate(seed: int, n_train: int, n_test: int) -> Images:
    """Draw images of equally probable classes; class // 5 is the superclass. The same arguments give the same images.

    Raises:
        InputError: A size is not a whole number above 0.
    """
    require_whole("n_train", n_train, 1)
    require_whole("n_test", n_test, 1)
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n_train + n_test,), generator=gen)
    images = torch.cat([draw(part, gen) for part in labels.split(CHUNK)])
    (train, test), (train_labels, test_labels) = (t.split([n_train, n_test]) for t in (images, labels))
    return Images((train, train_labels), (test, test_labels), torch.arange(CLASSES) // GROUP)


def draw(labels: Tensor, gen: torch.Generator) -> Tensor:
    """Return an image of each class in `labels`, (N,), as (N, 3, 32, 32) uint8."""
    superclass, outline = labels // GROUP, labels % GROUP
    hue, filling = superclass % HUES, superclass // HUES
    x, y = _positions(len(labels), gen)
    inside = _filled(x, y, outline, filling, _uniform(labels, gen, 6, 9))
    colour = _rgb(
        hue / HUES + _uniform(labels, gen, -0.06, 0.06), _uniform(labels, gen, 0.5, 1), _uniform(labels, gen, 0.6, 1)
    )
    ground = _rgb(_uniform(labels, gen, 0, 1), _uniform(labels, gen, 0, 0.35), _uniform(labels, gen, 0.15, 0.9))
    shade = 1 + _uniform(labels, gen, -0.3, 0.3)[:, None, None] * torch.linspace(-1, 1, y.shape[1])[:, None]
    pixels = inside[:, None] * colour[:, :, None, None] + ((1 - inside) * shade)[:, None] * ground[:, :, None, None]
    pixels = F.avg_pool2d(pixels, OVERSAMPLED)
    pixels = pixels + 0.04 * torch.randn(pixels.shape, generator=gen)
    return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)


def _uniform(like: Tensor, gen: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(like.shape, generator=gen)


def _positions(count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the pixels' coordinates x and y, (N, H, W), in the shifted, rotated and scaled frame of each object."""
    line = torch.linspace(-1, 1, SIDE * OVERSAMPLED)
    like = torch.empty(count)
    x, y = (line.view(shape) - _uniform(like, gen, -0.25, 0.25)[:, None, None] for shape in ((1, -1), (-1, 1)))
    angle, size = _uniform(like, gen, 0, 2 * math.pi), _uniform(like, gen, 0.5, 0.8)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    wide = (size * _uniform(like, gen, 0.85, 1.15))[:, None, None]
    return (x * cos + y * sin) / wide, (y * cos - x * sin) / size[:, None, None]


def _filled(x: Tensor, y: Tensor, outline: Tensor, filling: Tensor, frequency: Tensor) -> Tensor:
    """Return the share of each pixel that the object covers, (N, H, W)."""
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    edge = torch.stack([_edge(name, angle) for name in OUTLINES])[outline, torch.arange(len(outline))]
    whole, hole = (torch.sigmoid(30 * (scale * edge - radius)) for scale in (1.0, 0.6))
    waves = [torch.sigmoid(6 * (math.pi * frequency[:, None, None] / 2 * u).sin()) for u in (x, y)]
    fillings = torch.stack([torch.ones_like(x), 1 - hole, waves[0], 1 - waves[0] * waves[1]])
    return whole * fillings[filling, torch.arange(len(filling))]


def _edge(outline: str, angle: Tensor) -> Tensor:
    """Return the distance of the outline from its centre at each angle."""
    if outline == "disc":
        return torch.full_like(angle, 0.85)
    if outline == "flower":
        return 0.8 + 0.2 * (6 * angle).cos()
    corners = {"triangle": 3, "square": 4, "star": 5}[outline]
    sector = torch.remainder(angle, 2 * math.pi / corners) - math.pi / corners
    if outline == "star":
        return 0.45 + 0.65 * (sector.abs() * corners / math.pi).square()
    return math.cos(math.pi / corners) / sector.cos()


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return RGB colours (N, 3) of hues (1 is a full turn), saturations and values, (N,) each."""
    turns = torch.remainder(hue[:, None] + torch.tensor([0.0, 2 / 3, 1 / 3]), 1)
    pure = ((turns * 6 - 3).abs() - 1).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - pure))
