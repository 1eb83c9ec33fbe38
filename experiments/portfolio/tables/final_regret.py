"""Table of final regret by degree, and seconds per epoch, for every model and series of a portfolio study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from experiments.report.aggregation import aggregate, at_best_validation, last_test_rows, seeds_said
from experiments.report.outputs import StudyOutputs
from experiments.sweep.studies import Study

GROUP = ["degree", "model", "series"]


def make(outputs: StudyOutputs) -> None:
    """Write tables/<study>.csv and .md (mean and standard deviation over seeds) from the finished runs."""
    table = summarize(outputs.metrics())
    outputs.artifacts.csv(f"tables/{outputs.study.name}", table)
    task = outputs.planned[0].config.task
    epochs = sorted({run.config.train.epochs for run in outputs.planned})
    degrees = sorted(table["degree"].unique())
    outputs.artifacts.markdown(
        f"tables/{outputs.study.name}",
        ("Model", "Series", *(f"Degree {degree}" for degree in degrees), "Seconds per epoch"),
        _rows(outputs.study, table, degrees),
        f"Final test regret ({' or '.join(map(str, epochs))} epochs) in percent of the optimal value, mean ± standard "
        f"deviation over {seeds_said(outputs.planned)}; {task.n_train} training and {task.n_test} test samples, noise "
        f"tau = {task.tau}. Seconds per epoch of training on one thread. Made by: `{outputs.command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return final and best-validation test regret and seconds per training epoch, one row per group."""
    training = frame[frame["split"] == "train"].groupby([*GROUP, "seed"], as_index=False)["seconds_epoch"].mean()
    parts = [
        ("regret", aggregate(last_test_rows(frame), GROUP, "regret_percent")),
        ("regret_best_validation", aggregate(at_best_validation(frame), GROUP, "regret_percent")),
        ("seconds_epoch", aggregate(training, GROUP, "seconds_epoch")),
    ]
    table = parts[0][1][[*GROUP, "n"]].rename(columns={"n": "seeds"})
    for name, part in parts:
        columns = {"mean": f"{name}_mean", "sd": f"{name}_sd", "ci95": f"{name}_ci95"}
        table = table.merge(part[[*GROUP, *columns]].rename(columns=columns), on=GROUP)
    return table


def _rows(study: Study, table: pd.DataFrame, degrees: Sequence[int]) -> Iterator[list[str]]:
    """Yield one row per model and series, in the order of the study."""
    for model in sorted(table["model"].unique()):
        for series, title in study.titles.items():
            rows = table[(table["model"] == model) & (table["series"] == series)].set_index("degree")
            if rows.empty:
                continue
            regrets = [
                f"{rows.loc[degree, 'regret_mean']:.2f} ± {rows.loc[degree, 'regret_sd']:.2f}"
                if degree in rows.index
                else ""
                for degree in degrees
            ]
            yield [model, title, *regrets, f"{rows['seconds_epoch_mean'].mean():.2f}"]
