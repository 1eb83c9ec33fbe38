"""Figure 7: top-1 and top-5 accuracy of the multilabel study through training, by backward pass."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.multilabel.series import EXACT, PERTURBED, caption, title
from experiments.report import style
from experiments.report.aggregation import aggregate
from experiments.report.outputs import StudyOutputs
from experiments.report.style import Line
from experiments.sweep.studies import Study

KEYS = ["series", "temperature", "split", "epoch"]
ACCURACIES = {"top1": "Top-1", "top5": "Top-5"}
SPLITS = {"train": "training, noisy labels", "test": "test"}
LINES = {
    "cvxpylayers": Line(style.COLORS[4], "-", 2.6),
    "pgd": Line(style.COLORS[2], "--", 1.8),
    "pgd_a": Line(style.COLORS[5], "-.", 1.4),
    "sqp": Line(style.COLORS[1], ":", 1.8),
}


def make(outputs: StudyOutputs) -> None:
    """Write figures/figure_7 and figures/multilabel_gradients, .png, .pdf and .csv, from the finished runs.

    Where the images are the stand-in, the file names say so.
    """
    frame = outputs.metrics()
    frame = frame[frame["epoch"] > 0]
    curves = pd.concat(
        [aggregate(frame.dropna(subset=[name]), KEYS, name).assign(accuracy=name) for name in ACCURACIES]
    )
    name = f"figure_7{outputs.suffix}"
    outputs.artifacts.csv(f"figures/{name}", curves)
    images, said = title(outputs.planned), caption(outputs.planned, outputs.command)
    outputs.artifacts.figure(name, draw(outputs.study, curves, noise_floor(frame), images, said))
    errors = aggregate(frame.dropna(subset=["gradient_error"]), ["series", "temperature", "epoch"], "gradient_error")
    errors = errors[errors["series"].isin(LINES)]
    name = f"multilabel_gradients{outputs.suffix}"
    outputs.artifacts.csv(f"figures/{name}", errors)
    outputs.artifacts.figure(name, draw_errors(outputs.study, errors, images, said))


def noise_floor(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the distance of exact runs with perturbed initial weights from unperturbed ones of the same seed.

    Returns:
        One row per temperature, split, epoch and accuracy with the columns mean, the mean accuracy of both; low and
        high, that mean minus and plus the largest distance over the seeds and the epochs so far.
    """
    place = ["temperature", "split", "epoch", "seed"]
    exact, perturbed = (frame[frame["series"] == series].set_index(place) for series in (EXACT, PERTURBED))
    parts = []
    for name in ACCURACIES:
        pairs = pd.concat([exact[name], perturbed[name]], axis=1, keys=["exact", "perturbed"]).dropna()
        pairs["distance"] = (pairs["exact"] - pairs["perturbed"]).abs()
        table = pairs.groupby(place[:3]).agg({"exact": "mean", "perturbed": "mean", "distance": "max"}).reset_index()
        table["distance"] = table.groupby(place[:2])["distance"].cummax()
        table["mean"] = (table["exact"] + table["perturbed"]) / 2
        table["low"], table["high"] = table["mean"] - table["distance"], table["mean"] + table["distance"]
        parts.append(table.assign(accuracy=name))
    return pd.concat(parts)


def draw(study: Study, curves: pd.DataFrame, floor: pd.DataFrame, title: str, caption: str) -> Figure:
    """Return the figure of `curves` (columns of KEYS, accuracy, mean, low, high): a row per temperature."""
    style.drawn({EXACT: None, PERTURBED: None, **LINES}, curves["series"], "figure_7")
    temperatures = sorted(curves["temperature"].unique(), reverse=True)
    columns = [(split, name) for split in SPLITS for name in ACCURACIES]
    with style.panels(caption, len(temperatures), 4, figsize=(7.6, 4.6), sharex=True, squeeze=False) as (figure, axes):
        for temperature, row in zip(temperatures, axes, strict=True):
            for (split, name), panel in zip(columns, row, strict=True):
                here = {"temperature": temperature, "split": split, "accuracy": name}
                _draw_panel(panel, study, _at(curves, here), _at(floor, here))
                panel.set_title(f"{ACCURACIES[name]}, {SPLITS[split]}\nτ = {temperature:g}", fontsize=7)
            row[0].set_ylabel("Accuracy (%)")
        for panel in axes[-1]:
            panel.set_xlabel("Epoch")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=3,
            frameon=False,
            fontsize=7,
            title=title,
            title_fontsize=9,
        )
    return figure


def _at(table: pd.DataFrame, place: dict[str, object]) -> pd.DataFrame:
    for key, value in place.items():
        table = table[table[key] == value]
    return table.sort_values("epoch")


def _draw_panel(panel: Axes, study: Study, curves: pd.DataFrame, floor: pd.DataFrame) -> None:
    label = "noise floor: exact, from initial weights 1e-6 apart"
    panel.fill_between(floor["epoch"], floor["low"], floor["high"], color="0.85", linewidth=0, zorder=0, label=label)
    exact = curves[curves["series"] == EXACT]
    panel.plot(exact["epoch"], exact["mean"], color="k", linewidth=0.9, label="exact forward and backward")
    for series, line in LINES.items():
        shown = curves[curves["series"] == series]
        if len(shown):
            style.curve(panel, shown, line, f"{study.titles[series]}, cvxpy forward")
    style.epochs(panel)


def draw_errors(study: Study, errors: pd.DataFrame, title: str, caption: str) -> Figure:
    """Return the figure of `errors` (series, temperature, epoch, mean, low, high), a panel per temperature."""
    temperatures = sorted(errors["temperature"].unique(), reverse=True)
    with style.panels(caption, 1, len(temperatures), figsize=(6.4, 3.1), sharey=True, squeeze=False) as (figure, axes):
        for temperature, panel in zip(temperatures, axes[0], strict=True):
            for series, line in LINES.items():
                shown = errors[(errors["series"] == series) & (errors["temperature"] == temperature)]
                if len(shown):
                    style.curve(panel, shown, line, study.titles[series])
            panel.set(yscale="log", xlabel="Epoch", title=f"τ = {temperature:g}")
            style.epochs(panel)
        axes[0, 0].set_ylabel("Relative error of the gradient\nagainst exact, mean over steps")
        axes[0, -1].legend(fontsize=7, frameon=False, loc="best")
        figure.suptitle(title, fontsize=9)
    return figure
