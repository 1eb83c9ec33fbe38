"""The table beside Figure 4(c): final regret and seconds per epoch, per degree, model and series."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.aggregation import aggregate, at_best_validation, collect, require_finished
from experiments.artifacts import Artifacts
from experiments.studies import Study, StudyRun

GROUP = ["degree", "model", "series"]
COLUMNS = (
    "Degree",
    "Model",
    "Series",
    "Final regret (%)",
    "Regret at best validation (%)",
    "Seconds per epoch",
)


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write tables/final_regret.csv and .md (mean and standard deviation over seeds) from the finished runs.

    `command` made the table and stands in its note; `run_command` makes the runs and stands in the
    MissingRunsError raised when some are not finished.
    """
    require_finished(planned, run_command)
    table = summarize(collect(planned))
    artifacts.csv("tables/final_regret", table)
    order = {name: position for position, name in enumerate(study.series)}
    rows = table.sort_values(GROUP, key=lambda column: column.map(order) if column.name == "series" else column)
    task = planned[0].config.task
    artifacts.markdown(
        "tables/final_regret",
        COLUMNS,
        [_row(study, row) for row in rows.to_dict("records")],
        f"Test regret in percent of the optimal value, mean ± standard deviation over seeds; {task.n_train} "
        f"training and {task.n_test} test samples. Seconds per epoch: training, one thread. "
        f"Made by: `{command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return final and best-validation test regret and seconds per training epoch, one row per group."""
    test = frame[frame["split"] == "test"]
    last = test[test["epoch"] == test.groupby([*GROUP, "seed"])["epoch"].transform("max")]
    training = frame[frame["split"] == "train"].groupby([*GROUP, "seed"], as_index=False)["seconds_epoch"].mean()
    parts = [
        ("regret", aggregate(last, GROUP, "regret_percent")),
        ("regret_best_validation", aggregate(at_best_validation(frame), GROUP, "regret_percent")),
        ("seconds_epoch", aggregate(training, GROUP, "seconds_epoch")),
    ]
    table = parts[0][1][[*GROUP, "n"]].rename(columns={"n": "seeds"})
    for name, part in parts:
        columns = {"mean": f"{name}_mean", "sd": f"{name}_sd", "ci95": f"{name}_ci95"}
        table = table.merge(part[[*GROUP, *columns]].rename(columns=columns), on=GROUP)
    return table


def _row(study: Study, row: dict) -> list[str]:
    return [
        str(row["degree"]),
        row["model"],
        study.titles[row["series"]],
        f"{row['regret_mean']:.2f} ± {row['regret_sd']:.2f}",
        f"{row['regret_best_validation_mean']:.2f} ± {row['regret_best_validation_sd']:.2f}",
        f"{row['seconds_epoch_mean']:.2f} ± {row['seconds_epoch_sd']:.2f}",
    ]
