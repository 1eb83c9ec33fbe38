"""Figure 6: test error of the denoiser learned with qpth and with folding, per lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.report import style
from experiments.report.aggregation import aggregate
from experiments.report.outputs import StudyOutputs
from experiments.report.style import Line, LineStyle
from experiments.sweep.studies import Study, StudyRun

LINES: Mapping[str, tuple[LineStyle, float]] = {"fold": ("-", 1.4), "qpth": ((0, (1, 1.4)), 2.6)}  # style and width


def make(outputs: StudyOutputs) -> None:
    """Write figures/figure_6.png, .pdf and .csv from the finished runs."""
    frame = outputs.metrics()
    curves = aggregate(frame[frame["split"] == "test"], ["series", "weight", "epoch"], "mse")
    outputs.artifacts.csv("figures/figure_6", curves)
    outputs.artifacts.figure("figure_6", draw(outputs.study, curves, _caption(outputs.planned, outputs.command)))


def draw(study: Study, curves: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of `curves` (columns series, weight, epoch, mean, low, high), a panel per lambda."""
    weights = sorted(curves["weight"].unique())
    lines = style.drawn(LINES, curves["series"], "figure_6")
    with style.panels(caption, 1, len(weights), figsize=(7.4, 2.6), sharex=True, squeeze=False) as (figure, axes):
        for weight, color, panel in zip(weights, style.COLORS, axes[0], strict=False):
            for name, (dashes, width) in lines.items():
                shown = curves[(curves["series"] == name) & (curves["weight"] == weight)]
                style.curve(panel, shown, Line(color, dashes, width), study.titles[name])
            panel.set(title=f"λ = {weight:g}", xlabel="Epoch")
            style.epochs(panel)
            panel.legend(fontsize=6.5, frameon=False, loc="best", handlelength=2)
        axes[0, 0].set_ylabel("Test MSE")
    return figure


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    task = planned[0].config.task
    return (
        f"A part of the data: {task.n_train} training and {task.n_test} test signals, heights in [{task.low}, "
        f"{task.high}], noise {task.noise}; {style.seeds_note(planned)}.\n"
        f"All of D is learned, Adam 1e-3, batch size 32; the test error is that of D, by the exact solver. "
        f"Made by: {command}"
    )
