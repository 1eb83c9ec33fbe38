"""Figure 4(b): test error of the learned denoiser through training, per lambda and reading of the data."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.aggregation import aggregate, collect, require_finished
from experiments.artifacts import Artifacts
from experiments.studies import Study, StudyRun

READINGS = ("centred", "optnet", "literal")
ROWS = {"": "as in the paper", "_tuned": "zero-sum rows, decaying step"}
COLORS = ("#CC79A7", "#E69F00", "#0072B2", "#009E73")


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write figures/figure_4b.png, .pdf and .csv from the finished runs.

    `command` made the figure and stands in its caption; `run_command` makes the runs and stands in the
    MissingRunsError raised when some are not finished.
    """
    require_finished(planned, run_command)
    frame = collect(planned)
    curves = aggregate(frame[frame["split"] == "test"], ["series", "weight", "epoch"], "mse")
    artifacts.csv("figures/figure_4b", curves)
    figure = draw(study, curves, _caption(planned, command))
    artifacts.figure("figure_4b", figure)
    plt.close(figure)


def draw(study: Study, curves: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of `curves` (columns series, weight, epoch, mean, low, high)."""
    with plt.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 3, figsize=(7.4, 4.6), sharex=True, sharey="col", layout="constrained")
        for (suffix, how), row in zip(ROWS.items(), axes, strict=True):
            for reading, panel in zip(READINGS, row, strict=True):
                name = reading + suffix
                _draw_panel(panel, curves[curves["series"] == name])
                panel.set_title(f"{study.titles[name]},\n{how}", fontsize=7.5)
            row[0].set_ylabel("Test MSE")
        for panel in axes[-1]:
            panel.set_xlabel("Epoch")
        figure.supxlabel(caption, fontsize=6.5, color="0.3")
    return figure


def _draw_panel(panel: Axes, curves: pd.DataFrame) -> None:
    weights = sorted(curves["weight"].unique())
    for weight, color in zip(weights, COLORS, strict=False):
        curve = curves[curves["weight"] == weight].sort_values("epoch")
        panel.plot(curve["epoch"], curve["mean"], color=color, linewidth=1.6, label=f"λ = {weight:g}")
        panel.fill_between(curve["epoch"], curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    classical = curves.loc[curves["epoch"] == 0, "mean"].min()
    panel.axhline(classical, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), label="best classical", zorder=1)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.legend(fontsize=6, frameon=False, loc="best", handlelength=1.6, labelspacing=0.25)


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    task, seeds = planned[0].config.task, len({run.seed for run in planned})
    return (
        f"{task.n_train} training and {task.n_test} test signals of length {task.length}, {seeds} seed"
        f"{'s, bands from the smallest to the largest' if seeds > 1 else ''}; epoch 0 is the classical total variation "
        f"denoiser.\nAdam, batch size 32, folded dual proximal gradient around the exact solver. Made by: {command}"
    )
