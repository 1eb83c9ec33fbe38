"""The table of the denoising study: classical and learned test error and seconds per epoch, per reading and lambda."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from experiments.aggregation import aggregate, collect, require_finished
from experiments.artifacts import Artifacts
from experiments.figures.figure_4b import READINGS, ROWS
from experiments.studies import Study, StudyRun

GROUP = ["series", "weight"]


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write tables/<study>.csv and .md from the finished runs; `command` and `run_command` as in `figure_4b.make`."""
    require_finished(planned, run_command)
    table = summarize(collect(planned))
    artifacts.csv(f"tables/{study.name}", table)
    task, epochs = planned[0].config.task, planned[0].config.train.epochs
    artifacts.markdown(
        f"tables/{study.name}",
        ("Data", "λ", "Classical", *(f"Learned, {how}" for how in ROWS.values()), "Seconds per epoch"),
        _rows(study, table),
        f"Test MSE before training and after {epochs} epochs, mean over {table['seeds'].max()} seed(s); {task.n_train} "
        f"training and {task.n_test} test signals. In bold what is below the classical denoiser of the same λ. Seconds "
        f"per epoch of training on one thread. Made by: `{command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return classical and final test error and seconds per training epoch, one row per series and weight."""
    test = frame[frame["split"] == "test"]
    parts = {
        "classical": aggregate(test[test["epoch"] == 0], GROUP, "mse"),
        "learned": aggregate(test[test["epoch"] == test["epoch"].max()], GROUP, "mse"),
        "seconds_epoch": aggregate(frame[frame["split"] == "train"], GROUP, "seconds_epoch"),
    }
    table = parts["classical"][[*GROUP, "n"]].rename(columns={"n": "seeds"})
    for name, part in parts.items():
        table = table.merge(part[[*GROUP, "mean"]].rename(columns={"mean": name}), on=GROUP)
    return table


def _rows(study: Study, table: pd.DataFrame) -> Iterator[list[str]]:
    indexed = table.set_index(GROUP)
    for reading in READINGS:
        for weight in sorted(table.loc[table["series"] == reading, "weight"]):
            rows = [indexed.loc[(name, weight)] for s in ROWS if (name := reading + s, weight) in indexed.index]
            learned = [
                f"**{row['learned']:.4g}**" if row["learned"] < row["classical"] else f"{row['learned']:.4g}"
                for row in rows
            ]
            learned += [""] * (len(ROWS) - len(rows))
            yield [
                study.titles[reading],
                f"{weight:g}",
                f"{rows[0]['classical']:.4g}",
                *learned,
                f"{rows[0]['seconds_epoch']:.1f}",
            ]
