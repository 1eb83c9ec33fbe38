"""Figure 4(a): test regret on the bilinear program, by matrix Q for folding and two-stage, and mean of all series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bilinear.series import ratios
from experiments.report import style
from experiments.report.aggregation import aggregate, last_test_rows, seeds_said
from experiments.report.outputs import StudyOutputs
from experiments.sweep.studies import Study, StudyRun

PAIR = ("two_stage", "fold")
COLORS: Mapping[str, str] = {"two_stage": "#009E73", "fold": "#000000"}
OTHERS = "#0072B2"


def make(outputs: StudyOutputs) -> None:
    """Write figures/figure_4a.png, .pdf and .csv from the finished runs."""
    last = last_test_rows(outputs.metrics())
    outputs.artifacts.csv("figures/figure_4a", aggregate(last, ["n_variables", "series", "interaction"], "regret"))
    outputs.artifacts.figure("figure_4a", draw(outputs.study, last, _caption(outputs.planned, outputs.command)))


def draw(study: Study, last: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of the final test rows `last` (columns n_variables, series, interaction, seed, regret)."""
    sizes = sorted(last["n_variables"].unique(), reverse=True)
    with style.panels(
        caption, len(sizes), 2, figsize=(7.4, 2.35 * len(sizes) + 0.8), width_ratios=(1.7, 1), squeeze=False
    ) as (figure, axes):
        for (left, right), n in zip(axes, sizes, strict=True):
            _draw_groups(left, study, last[last["n_variables"] == n])
            left.set_title(f"n = {n}", fontsize=8)
            _draw_ratios(right, study, ratios(last, n))
            right.set_title(f"n = {n}, everything tried", fontsize=8)
        axes[-1, 0].set_xlabel("Matrix Q")
        axes[-1, 1].set_xlabel("Mean regret / that of two-stage")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    return figure


def _draw_groups(panel: Axes, study: Study, rows: pd.DataFrame) -> None:
    matrices = sorted(rows.loc[rows["series"].isin(PAIR), "interaction"].unique())
    for offset, series in zip((-0.2, 0.2), PAIR, strict=True):
        part = aggregate(rows[rows["series"] == series], ["interaction"], "regret")
        spread = part["ci95"].to_numpy()
        place = np.searchsorted(matrices, part["interaction"]) + offset
        panel.bar(
            place,
            part["mean"],
            0.38,
            color=COLORS[series],
            alpha=0.85,
            label=study.titles[series],
        )
        panel.errorbar(place, part["mean"], spread, fmt="none", ecolor="0.55", elinewidth=1, capsize=1.5)
    panel.set_xticks(range(len(matrices)), [str(matrix + 1) for matrix in matrices])
    panel.set_ylabel("Test regret")
    panel.set_ylim(bottom=0)
    style.grid(panel, axis="y")


def _draw_ratios(panel: Axes, study: Study, found: pd.DataFrame) -> None:
    table = aggregate(found, ["series"], "ratio").set_index("series")
    shown = [series for series in study.titles if series in table.index]
    table = table.loc[shown[::-1]]
    colors = [COLORS.get(series, OTHERS) for series in table.index]
    height = np.arange(len(table))
    spread = table["ci95"].to_numpy()
    panel.barh(height, table["mean"], 0.66, color=colors, alpha=0.85)
    panel.errorbar(table["mean"], height, xerr=spread, fmt="none", ecolor="0.55", elinewidth=1, capsize=1.5)
    panel.set_yticks(height, [study.titles[series] for series in table.index], fontsize=6.5)
    panel.axvline(1, color="0.4", linewidth=0.8, linestyle=(0, (4, 2)))
    style.grid(panel, axis="x")


def _caption(planned: Sequence[StudyRun], command: str) -> str:
    config = planned[0].config
    task = config.task
    return (
        f"Bars: mean over {seeds_said(planned)}; whiskers: its 95% confidence interval (Student's t). "
        f"{task.n_train} training,\n{task.n_val} validation and {task.n_test} test samples, p = {task.p}, "
        f"q = {task.q}, Adam {config.train.lr:g}, batch size {config.train.batch_size}, 5 epochs unless stated.\n"
        f"Regret in the program as it stands, by enumeration. Made by: {command}"
    )
