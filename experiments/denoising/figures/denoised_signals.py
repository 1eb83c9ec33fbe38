"""Figures of the learned denoiser: denoised signals, and the operator before and after training."""

from __future__ import annotations

from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.denoising.problem import differencing
from experiments.denoising.series import STRUCTURES
from experiments.denoising.task import DenoisingTask
from experiments.report import style
from experiments.report.outputs import StudyOutputs
from experiments.run import components
from experiments.run.components import Components

READING = "centred"
SIGNALS = 3


def make(outputs: StudyOutputs) -> None:
    """Write figures/denoised_signals and figures/denoising_operators, .png and .pdf, from the trained models.

    They show seed 0 of the reading "centred", with the smallest lambda that ran with every structure.
    """
    outputs.require_finished()
    folders = {(run.series, run.point["task.weight"]): run.folder for run in outputs.planned if run.seed == 0}
    weights = [{weight for series, weight in folders if series == READING + suffix} for suffix in STRUCTURES]
    weight = min(set.intersection(*weights))
    trained = {suffix: components.trained(folders[(READING + suffix, weight)]) for suffix in STRUCTURES}
    data = f"{outputs.study.titles[READING]}, λ = {weight:g}, seed 0"
    for name, figure in (
        ("denoised_signals", draw_signals(trained, f"Test signals, {data}. Made by: {outputs.command}")),
        ("denoising_operators", draw_operators(trained, f"{data}. Made by: {outputs.command}")),
    ):
        outputs.artifacts.figure(name, figure)


@torch.no_grad()
def draw_signals(trained: dict[str, Components], caption: str) -> Figure:
    """Return the figure of some test signals: noisy, true, and denoised by the classical and the learned operators."""
    task = cast(DenoisingTask, trained["_filter"].task)
    chosen = {name: values[:SIGNALS] for name, values in task.splits["test"].items()}
    d = chosen["noisy"]
    found = {"classical": task.problem.exact(differencing(d.shape[1]), d).x}
    for suffix in ("", "_filter"):
        found[f"learned, {STRUCTURES[suffix]}"] = task.problem.exact(_operator(trained[suffix]), d).x
    with style.panels(caption, len(found), SIGNALS, figsize=(7.4, 4.8), sharex=True, sharey="col") as (figure, axes):
        for row, (title, x) in zip(axes, found.items(), strict=True):
            errors = (x - chosen["signals"]).square().mean(1)
            for k, panel in enumerate(row):
                panel.plot(d[k], ".", color="0.7", markersize=2.5, label="noisy")
                panel.plot(chosen["signals"][k], color="k", linewidth=0.9, label="true")
                panel.plot(x[k], color=style.COLORS[2], linewidth=1.5, label="denoised")
                panel.set_title(f"{title}\nMSE {float(errors[k]):.3f}", fontsize=7)
                style.grid(panel)
        for panel in axes[-1]:
            panel.set_xlabel("Position")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=7)
    return figure


@torch.no_grad()
def draw_operators(trained: dict[str, Components], caption: str) -> Figure:
    """Return the figure of the operator before and after training: the matrices, and below them their middle rows."""
    operators = {suffix: _operator(parts) for suffix, parts in trained.items()}
    start = differencing(next(iter(operators.values())).shape[1])
    shown = {"before\ntraining": start}
    shown |= {f"learned:\n{STRUCTURES[suffix]}": D for suffix, D in operators.items()}
    shape = {"figsize": (7.4, 3.6), "height_ratios": (1.6, 1), "sharey": "row"}
    with style.panels(caption, 2, len(shown), **shape) as (figure, axes):
        for (title, D), (matrix, middle) in zip(shown.items(), axes.T, strict=True):
            size = float(D.abs().amax())
            image = matrix.imshow(D / size, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            matrix.set_title(f"{title}\nlargest entry {size:.2f}", fontsize=6.5)
            matrix.set(xticks=[], yticks=[])
            _draw_row(middle, D)
        axes[0, 0].set_ylabel("Row")
        axes[1, 0].set_ylabel("Middle row / its largest")
        figure.colorbar(image, ax=axes[0, -1], shrink=0.9, label="D / its largest entry")
    return figure


def _draw_row(panel: Axes, D: Tensor) -> None:
    row = D[len(D) // 2]
    place = torch.arange(len(row)) - len(D) // 2
    near = place.abs() <= 12
    panel.stem(place[near], (row / row.abs().amax())[near], linefmt="k-", markerfmt="k.", basefmt="0.7")
    panel.set_xlabel("Column − row")
    style.grid(panel)


def _operator(parts: Components) -> Tensor:
    return parts.model(parts.task.splits["test"]["inputs"][:1])
