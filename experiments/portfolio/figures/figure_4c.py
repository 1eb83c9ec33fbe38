"""Figure 4(c): portfolio optimization, test regret through training, per degree and model."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import style
from experiments.report.aggregation import aggregate
from experiments.report.outputs import StudyOutputs
from experiments.report.style import Line
from experiments.sweep.studies import Study, StudyRun

MODEL_TITLES = {"mlp": "ReLU MLP", "mlp_bn": "ReLU MLP with batch norm"}

LINES = {
    "cvxpylayers_paper": Line("#D55E00"),
    "cvxpylayers_normalized": Line("#56B4E9", linewidth=3.6, zorder=3),
    "fold": Line("#000000", zorder=4),
    "fold_gurobi": Line("#E69F00", linestyle=(0, (1, 1.6)), linewidth=1.8, zorder=5),
    "two_stage": Line("#009E73", linestyle=(0, (5, 1.5))),
    "fold_tuned": Line("#CC79A7", linewidth=2.2),
    "two_stage_tuned": Line("#009E73", linewidth=1.2),
}


def make(outputs: StudyOutputs) -> None:
    """Write figures/figure_4c.png, .pdf and .csv from the finished runs."""
    frame = outputs.metrics()
    test = frame[frame["split"] == "test"]
    curves = aggregate(test, ["degree", "model", "series", "epoch"], "regret_percent")
    outputs.artifacts.csv("figures/figure_4c", curves)
    outputs.artifacts.figure("figure_4c", draw(outputs.study, curves, _caption(outputs.planned, outputs.command)))


def draw(study: Study, curves: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of `curves` (columns degree, model, series, epoch, mean, low, high)."""
    degrees = sorted(curves["degree"].unique())
    models = list(style.drawn(MODEL_TITLES, curves["model"], "figure_4c"))
    lines = style.drawn(LINES, curves["series"], "figure_4c")
    with style.panels(
        caption,
        len(models),
        len(degrees),
        figsize=(2.35 * len(degrees) + 0.2, 1.95 * len(models) + 0.95),
        sharex=True,
        sharey=True,
        squeeze=False,
    ) as (figure, axes):
        for row, model in zip(axes, models, strict=True):
            for panel, degree in zip(row, degrees, strict=True):
                _draw_panel(panel, curves[(curves["degree"] == degree) & (curves["model"] == model)])
                panel.set_title(f"Degree {degree}, {MODEL_TITLES[model]}", fontsize=8)
            row[0].set_ylabel("Test regret (%)")
        for panel in axes[-1]:
            panel.set_xlabel("Epoch")
        handles = [line.legend_handle(study.titles[name]) for name, line in lines.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, handlelength=2.6)
    return figure


def _draw_panel(panel: Axes, curves: pd.DataFrame) -> None:
    for name, line in LINES.items():
        curve = curves[curves["series"] == name]
        if not curve.empty:
            style.curve(panel, curve, line)
    style.plain_log(panel.yaxis, subs=(1, 3))
    style.epochs(panel)


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    task = planned[0].config.task
    return (
        f"{task.n_train} training and {task.n_test} test samples, noise tau = {task.tau}; regret in percent of the "
        f"optimal value, by the exact solver;\n{style.seeds_note(planned)}. Made by: {command}"
    )
