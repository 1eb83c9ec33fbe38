"""The classical denoiser: total variation with the weight lambda of smallest error on the test signals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import pandas as pd
from scipy.optimize import minimize_scalar
from torch import Tensor

from experiments.denoising.problem import DenoisingProblem, differencing
from experiments.denoising.series import READINGS
from experiments.denoising.task import DenoisingTask
from experiments.report.measurements import measured_once
from experiments.run import components, configuration
from experiments.sweep.studies import StudyRun


@dataclass(frozen=True)
class DataSet:
    """One data set of the study, as a run's overrides describe it, and the range of lambda to search."""

    reading: str
    seed: int
    overrides: tuple[str, ...]
    low: float
    high: float


@dataclass(frozen=True)
class DataSets:
    """All data sets of the study."""

    sets: tuple[DataSet, ...]


def best_classical(planned: Sequence[StudyRun]) -> pd.DataFrame:
    """Return the weight lambda of smallest test error for each data set, and that error.

    lambda is searched between the smallest and the largest value that the study has for this reading of the data.

    Returns:
        One row per data set with the columns reading, seed, weight and mse.
    """
    sets: dict[tuple[str, int], DataSet] = {}
    for run in planned:
        if run.series in READINGS:
            weights = [other.point["task.weight"] for other in planned if other.series == run.series]
            place = DataSet(run.series, run.seed, run.overrides, min(weights), max(weights))
            sets.setdefault((run.series, run.seed), place)
    return measured_once("denoising/best_classical", DataSets(tuple(sets.values())), _search)


def _search(settings: DataSets) -> pd.DataFrame:
    rows = []
    for place in settings.sets:
        task = components.build(configuration.compose(list(place.overrides))).task
        error = partial(_mean_error, cast(DenoisingTask, task))
        bounds = math.log(place.low), math.log(place.high)
        found = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-3})
        rows.append({"reading": place.reading, "seed": place.seed, "weight": math.exp(found.x), "mse": found.fun})
    return pd.DataFrame(rows)


def _mean_error(task: DenoisingTask, log_weight: float) -> float:
    return float(classical_errors(task, math.exp(log_weight)).mean())


def classical_errors(task: DenoisingTask, weight: float) -> Tensor:
    """Return the mean squared error of each test signal denoised with this weight, (samples,)."""
    task.problem = DenoisingProblem(weight, task.n_inputs)
    return task.errors(differencing(task.n_inputs), task.splits["test"])
