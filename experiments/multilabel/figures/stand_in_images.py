"""Figure of the images that stand in for CIFAR-100: one image of each class, a column per superclass."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from data.cifar100 import CLASSES, GROUP
from data.stand_in import draw as draw_images
from experiments.report import style
from experiments.report.outputs import StudyOutputs


def make(outputs: StudyOutputs) -> None:
    """Write figures/stand_in_images.png and .pdf where the study's images are the stand-in."""
    if not outputs.suffix:
        return
    caption = f"Procedural images that stand in for CIFAR-100: a column per superclass. Made by: {outputs.command}"
    outputs.artifacts.figure("stand_in_images", draw(caption))


def draw(caption: str) -> Figure:
    """Return the figure."""
    images = draw_images(torch.arange(CLASSES), torch.Generator().manual_seed(0)).permute(0, 2, 3, 1)
    with style.panels(caption, GROUP, CLASSES // GROUP, figsize=(7.6, 2.2)) as (figure, axes):
        figure.set_layout_engine("constrained", w_pad=0.005, h_pad=0.005, wspace=0.01, hspace=0.01)
        for image, panel in zip(images, axes.T.flat, strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.axis("off")
    return figure
