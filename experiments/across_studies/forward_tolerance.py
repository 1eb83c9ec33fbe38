"""Figure of the final test metric against the tolerance of the forward solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.report import style
from experiments.report.aggregation import aggregate, last_test_rows
from experiments.report.outputs import StudyOutputs
from experiments.report.style import Line
from experiments.sweep.studies import Study, StudyRun

LINES: Mapping[str, Line] = {
    "portfolio_cvxpylayers": Line(style.COLORS[4], linewidth=1.4, marker="o"),
    "portfolio_cvxpylayers_normalized": Line(style.COLORS[5], linewidth=1.4, marker="o"),
    "denoising_fold": Line("k", linewidth=1.4, marker="o"),
}
PANELS: Mapping[str, tuple[str, str]] = {
    "portfolio": ("regret_percent", "Test regret (%)"),
    "denoising": ("mse", "Test MSE"),
}


def make(outputs: StudyOutputs) -> None:
    """Write figures/forward_tolerance.png, .pdf and .csv from the finished runs.

    Columns: task, series, forward_tol, and mean, sd, n, ci95, low, high of the test metric after the last epoch.
    """
    frame = outputs.metrics()
    style.drawn(LINES, frame["series"], "forward_tolerance")
    last = last_test_rows(frame)
    parts = []
    for task, (metric, _) in PANELS.items():
        rows = last[last["series"].str.startswith(task)]
        parts.append(aggregate(rows, ["series", "forward_tol"], metric).assign(task=task))
    table = pd.concat(parts)
    outputs.artifacts.csv("figures/forward_tolerance", table)
    figure = draw(outputs.study, table, _caption(outputs.planned, outputs.command))
    outputs.artifacts.figure("forward_tolerance", figure)


def draw(study: Study, table: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of `table`: a panel per task, a line per series."""
    with style.panels(caption, 1, len(PANELS), figsize=(7.4, 2.7)) as (figure, axes):
        for (task, (_, label)), panel in zip(PANELS.items(), axes, strict=True):
            for series in (name for name in LINES if name.startswith(task)):
                shown = table[table["series"] == series]
                style.curve(panel, shown, LINES[series], study.titles[series], x="forward_tol")
            panel.set(xscale="log", title=task.capitalize(), xlabel="Tolerance of the forward solver", ylabel=label)
            panel.invert_xaxis()
            style.grid(panel)
            panel.legend(fontsize=6.5, frameon=False, loc="best")
    return figure


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    config = planned[0].config
    return (
        f"{config.task.n_train} training and {config.task.n_test} test samples, after {config.train.epochs} epochs; "
        f"{style.seeds_note(planned)}. Tolerances as the solvers define them:\n"
        f"SCS's eps, FDPG's residual of the dual. Folding takes every solution as it is. Made by: {command}"
    )
