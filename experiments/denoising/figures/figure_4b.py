"""Figure 4(b): test error of the learned denoiser through training, per lambda, reading of the data and structure."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.denoising.classical import best_classical
from experiments.denoising.series import READINGS, SERIES, STRUCTURES
from experiments.report import style
from experiments.report.aggregation import aggregate
from experiments.report.outputs import StudyOutputs
from experiments.sweep.studies import Study, StudyRun


def make(outputs: StudyOutputs) -> None:
    """Write figures/figure_4b.png, .pdf and .csv from the finished runs."""
    frame = outputs.metrics()
    curves = aggregate(frame[frame["split"] == "test"], ["series", "weight", "epoch"], "mse")
    outputs.artifacts.csv("figures/figure_4b", curves)
    classical = best_classical(outputs.planned).groupby("reading")["mse"].mean()
    figure = draw(outputs.study, curves, classical, _caption(outputs.planned, outputs.command))
    outputs.artifacts.figure("figure_4b", figure)


def draw(study: Study, curves: pd.DataFrame, classical: pd.Series, caption: str) -> Figure:
    """Draw a panel per reading and structure, with a curve per lambda.

    Args:
        study: The study, for titles.
        curves: Test errors with the columns series, weight, epoch, mean, low, high.
        classical: Test error of the classical denoiser with the best lambda, by reading.
        caption: The caption.
    """
    style.drawn(SERIES, curves["series"], "figure_4b")
    with style.panels(caption, len(STRUCTURES), len(READINGS), figsize=(7.4, 6.6), sharex=True, sharey="col") as (
        figure,
        axes,
    ):
        for (suffix, how), row in zip(STRUCTURES.items(), axes, strict=True):
            for reading, panel in zip(READINGS, row, strict=True):
                name = reading + suffix
                weights = sorted(curves.loc[curves["series"].str.startswith(reading), "weight"].unique())
                _draw_panel(panel, curves[curves["series"] == name], weights, classical[reading])
                panel.set_title(f"{study.titles[name]},\n{how}", fontsize=7.5)
            row[0].set_ylabel("Test MSE")
        for panel in axes[-1]:
            panel.set_xlabel("Epoch")
    return figure


def _draw_panel(panel: Axes, curves: pd.DataFrame, weights: Sequence[float], classical: float) -> None:
    for weight, color in zip(weights, style.COLORS, strict=False):
        shown = curves[curves["weight"] == weight]
        if not shown.empty:
            style.curve(panel, shown, style.Line(color), f"λ = {weight:g}")
    dashes = (0, (4, 2))
    panel.axhline(classical, color="0.35", linewidth=0.9, linestyle=dashes, label="classical, best λ", zorder=1)
    style.plain_log(panel.yaxis, subs=(1, 1.5, 2, 3, 5, 7))
    style.epochs(panel)
    panel.legend(fontsize=6, frameon=False, loc="best", handlelength=1.6, labelspacing=0.25)


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    task = planned[0].config.task
    return (
        f"{task.n_train} training and {task.n_test} test signals of length {task.length}, {style.seeds_note(planned)}; "
        f"epoch 0 is the classical denoiser of the same λ.\n"
        f"Adam, batch size 32, folded dual proximal gradient around the exact solver. Made by: {command}"
    )
