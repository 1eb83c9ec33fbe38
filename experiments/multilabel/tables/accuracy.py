"""Table of the multilabel study: final accuracies, noise floor, errors of the gradients, and times."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.multilabel.series import EXACT, setting
from experiments.report.aggregation import seeds_said
from experiments.report.outputs import StudyOutputs
from experiments.sweep.studies import Study

SECONDS = ("seconds_network", "seconds_solve", "seconds_backward")


def make(outputs: StudyOutputs) -> None:
    """Write tables/figure_7.csv and .md from the finished runs.

    Where the images are the stand-in, the file names say so.
    """
    table = summarize(outputs.metrics())
    name = f"tables/figure_7{outputs.suffix}"
    outputs.artifacts.csv(name, table)
    epochs, batch = outputs.planned[0].config.train.epochs, outputs.planned[0].config.train.batch_size
    outputs.artifacts.markdown(
        name,
        (
            "τ",
            "Backward pass",
            "Top-1, test",
            "Top-5, test",
            "Largest distance to exact, top-5",
            "Gradient error, mean",
            "largest",
            "Solver failures",
            "Network (ms)",
            "Forward (ms)",
            "Backward (ms)",
        ),
        _rows(outputs.study, table, batch),
        f"After {epochs} epochs, mean ± standard deviation over {seeds_said(outputs.planned)}. Distance to exact: the "
        "largest difference, over seeds and epochs, from the top-5 test accuracy of the exact run with the same seed; "
        "for the perturbed start it is the noise floor. Gradient error: relative, per training step, against the exact "
        f"vjp at the exact solution. Milliseconds per batch of {batch}, on one thread. {setting(outputs.planned)}. "
        f"Made by: `{outputs.command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per temperature and series."""
    test = frame[(frame["split"] == "test") & (frame["epoch"] > 0)]
    train = frame[frame["split"] == "train"]
    pair = ["temperature", "seed", "epoch"]
    exact = test[test["series"] == EXACT][[*pair, "top5"]].rename(columns={"top5": "exact"})
    distance = test.merge(exact, on=pair).assign(distance=lambda t: (t["top5"] - t["exact"]).abs())
    by = ["temperature", "series"]
    last = test[test["epoch"] == test["epoch"].max()].groupby(by)
    table = last.agg(top1=("top1", "mean"), top1_sd=("top1", "std"), top5=("top5", "mean"), top5_sd=("top5", "std"))
    table["distance"] = distance.groupby(by)["distance"].max()
    table["gradient_error"] = train.groupby(by)["gradient_error"].mean()
    table["gradient_error_max"] = train.groupby(by)["gradient_error_max"].max()
    table["solver_failures"] = train.groupby(by)["solver_failures"].sum()
    table["samples"] = train.groupby(by)["samples"].sum()
    for name in SECONDS:
        table[name] = train.groupby(by)[name].sum() / table["samples"]
    return table.reset_index().sort_values("temperature", ascending=False, kind="stable")


def _rows(study: Study, table: pd.DataFrame, batch: int) -> Iterator[list[str]]:
    indexed = table.set_index(["temperature", "series"])
    for temperature in table["temperature"].unique():
        for series in study.series:
            if (temperature, series) not in indexed.index:
                continue
            row = indexed.loc[(temperature, series)]
            yield [
                f"{temperature:g}",
                study.titles[series],
                f"{row['top1']:.1f} ± {row['top1_sd']:.1f}",
                f"{row['top5']:.1f} ± {row['top5_sd']:.1f}",
                "" if series == EXACT else f"{row['distance']:.1f}",
                f"{row['gradient_error']:.0e}",
                f"{row['gradient_error_max']:.0e}",
                f"{row['solver_failures'] / row['samples']:.2%}",
                *(f"{1e3 * batch * row[name]:.3g}" for name in SECONDS),
            ]
