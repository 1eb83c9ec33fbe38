"""Figure 7: top-1 and top-5 accuracy of the multilabel study through training, by backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.noisy_labels import SOURCES
from experiments.report import style
from experiments.report.aggregation import aggregate, collect, require_finished
from experiments.report.artifacts import Artifacts
from experiments.sweep.studies import Study, StudyRun

KEYS = ["series", "temperature", "split", "epoch"]
ACCURACIES = {"top1": "Top-1", "top5": "Top-5"}
SPLITS = {"train": "training, noisy labels", "test": "test"}
EXACT, PERTURBED = "exact", "perturbed"
LINES = {
    "cvxpylayers": {"color": style.COLORS[4], "linestyle": "-", "linewidth": 2.6},
    "pgd": {"color": style.COLORS[2], "linestyle": "--", "linewidth": 1.8},
    "pgd_a": {"color": style.COLORS[5], "linestyle": "-.", "linewidth": 1.4},
    "sqp": {"color": style.COLORS[1], "linestyle": ":", "linewidth": 1.8},
}


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write figures/figure_7 and figures/multilabel_gradients, .png, .pdf and .csv, from the finished runs.

    Where the images are the stand-in, the file names say so. Arguments as for `figure_4b.make`.
    """
    require_finished(planned, run_command)
    frame = collect(planned)
    frame = frame[frame["epoch"] > 0]
    curves = pd.concat(
        [aggregate(frame.dropna(subset=[name]), KEYS, name).assign(accuracy=name) for name in ACCURACIES]
    )
    name = f"figure_7{suffix(planned)}"
    artifacts.csv(f"figures/{name}", curves)
    figure = draw(study, curves, noise_floor(frame), title(planned), caption(planned, command))
    artifacts.figure(name, figure)
    plt.close(figure)
    errors = aggregate(frame.dropna(subset=["gradient_error"]), ["series", "temperature", "epoch"], "gradient_error")
    errors = errors[errors["series"].isin(LINES)]
    name = f"multilabel_gradients{suffix(planned)}"
    artifacts.csv(f"figures/{name}", errors)
    figure = draw_errors(study, errors, title(planned), caption(planned, command))
    artifacts.figure(name, figure)
    plt.close(figure)


def suffix(planned: Sequence[StudyRun]) -> str:
    """Return what the names of files made from these runs end with."""
    return "_stand_in" if planned[0].config.task.get("data") == "stand_in" else ""


def title(planned: Sequence[StudyRun]) -> str:
    """Return what the images are."""
    source = SOURCES[planned[0].config.task.data]
    return source[0].upper() + source[1:]


def caption(planned: Sequence[StudyRun], command: str) -> str:
    """Return what was trained on what, and the command."""
    config = planned[0].config
    return (
        f"{title(planned)}: {config.task.n_train} training and {config.task.n_test} test images, label "
        f"noise {config.task.noise:g}; DenseNet {config.model.depth}-{config.model.growth}, SGD {config.train.lr:g}, "
        f"batch size {config.train.batch_size};\n{style.seeds_note(planned)}. Made by: {command}"
    )


def noise_floor(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how far exact runs of perturbed initial weights are from unperturbed ones of the same seed.

    One row per temperature, split, epoch and accuracy with `mean`, the mean accuracy of both, and `low` and `high`,
    that mean less and plus the largest distance over the seeds and the epochs so far.
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
    temperatures = sorted(curves["temperature"].unique(), reverse=True)
    columns = [(split, name) for split in SPLITS for name in ACCURACIES]
    with plt.rc_context(style.STYLE):
        figure, axes = plt.subplots(
            len(temperatures), 4, figsize=(7.6, 4.6), sharex=True, squeeze=False, layout="constrained"
        )
        for temperature, row in zip(temperatures, axes, strict=True):
            for (split, name), panel in zip(columns, row, strict=True):
                here = {"temperature": temperature, "split": split, "accuracy": name}
                _draw_panel(panel, study, _at(curves, here), _at(floor, here))
                panel.set_title(f"{ACCURACIES[name]}, {SPLITS[split]}\nτ = {temperature:g}", fontsize=7)
            row[0].set_ylabel("Accuracy (%)")
        for panel in axes[-1]:
            panel.set_xlabel("Epoch")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        place = {"loc": "outside upper center", "ncols": 3, "frameon": False, "fontsize": 7}
        figure.legend(handles, labels, title=title, title_fontsize=9, **place)
        figure.supxlabel(caption, **style.CAPTION)
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
            style.curve(panel, shown, label=f"{study.titles[series]}, cvxpy forward", **line)
    style.epochs(panel)


def draw_errors(study: Study, errors: pd.DataFrame, title: str, caption: str) -> Figure:
    """Return the figure of `errors` (series, temperature, epoch, mean, low, high), a panel per temperature."""
    temperatures = sorted(errors["temperature"].unique(), reverse=True)
    with plt.rc_context(style.STYLE):
        figure, axes = plt.subplots(
            1, len(temperatures), figsize=(6.4, 3.1), sharey=True, squeeze=False, layout="constrained"
        )
        for temperature, panel in zip(temperatures, axes[0], strict=True):
            for series, line in LINES.items():
                shown = errors[(errors["series"] == series) & (errors["temperature"] == temperature)]
                if len(shown):
                    style.curve(panel, shown, label=study.titles[series], **line)
            panel.set(yscale="log", xlabel="Epoch", title=f"τ = {temperature:g}")
            style.epochs(panel)
        axes[0, 0].set_ylabel("Relative error of the gradient\nagainst exact, mean over steps")
        axes[0, -1].legend(fontsize=7, frameon=False, loc="best")
        figure.suptitle(title, fontsize=9)
        figure.supxlabel(caption, **style.CAPTION)
    return figure
