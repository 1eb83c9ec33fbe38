"""The metrics of all runs of a study in one table; an error names the runs that are not finished."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from experiments.run import folders
from experiments.sweep.studies import StudyRun, axis
from foldopt.errors import FoldoptError


class MissingRunsError(FoldoptError, LookupError):
    """A figure or table needs runs that are not finished; the message names them and the command that runs them."""


def require_finished(planned: Sequence[StudyRun], command: str) -> None:
    """Raise MissingRunsError unless every planned run is finished; `command` is the one that runs them."""
    missing = [(run, status) for run in planned if (status := folders.status(run.folder)) != "finished"]
    if missing:
        named = "\n".join(f"  {run.label} ({status})" for run, status in missing[:12])
        more = f"\n  and {len(missing) - 12} more" if len(missing) > 12 else ""
        raise MissingRunsError(
            f"{len(missing)} of {len(planned)} runs are not finished:\n{named}{more}\nMake them with: {command}"
        )


def collect(planned: Sequence[StudyRun]) -> pd.DataFrame:
    """Return the metrics of all planned runs, one row per run, epoch and split.

    Beside the columns of metrics.csv there are `run`, `series`, `seed` and one column per grid key (degree, model).
    """
    frames = []
    for run in planned:
        place = {axis(key): value for key, value in run.point.items()}
        frames.append(folders.load_metrics(run.folder).assign(run=run.label, series=run.series, seed=run.seed, **place))
    return pd.concat(frames, ignore_index=True)
