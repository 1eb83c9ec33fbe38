"""The tables of the denoising study: classical and learned test error per reading of the data, lambda and structure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor

from experiments.denoising.problem import DenoisingProblem, differencing
from experiments.denoising.task import DenoisingTask
from experiments.report.aggregation import aggregate, collect, require_finished
from experiments.report.artifacts import Artifacts
from experiments.report.measurements import measured_once
from experiments.run import components, configuration, folders
from experiments.sweep.studies import Study, StudyRun

READINGS = ("centred", "optnet", "literal")
STRUCTURES = {
    "": "all of D, as in the paper",
    "_zero_sum": "rows of sum zero, decaying step",
    "_filter": "one filter, weighted rows",
}
GROUP = ["series", "weight"]


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write tables/<study> and tables/<study>_best, .csv and .md, from the finished runs and their trained models.

    `command` and `run_command` as in `figure_4b.make`.
    """
    require_finished(planned, run_command)
    task, epochs = planned[0].config.task, planned[0].config.train.epochs
    table = summarize(collect(planned))
    artifacts.csv(f"tables/{study.name}", table)
    artifacts.markdown(
        f"tables/{study.name}",
        ("Data", "λ", "Classical", *(f"Learned: {how}" for how in STRUCTURES.values()), "Seconds per epoch"),
        _rows(study, table),
        f"Test MSE before training and after {epochs} epochs, mean ± standard deviation over {table['seeds'].max()} "
        f"seed(s); {task.n_train} training and {task.n_test} test signals. In bold what is below the classical "
        f"denoiser of the same λ. Seconds per epoch of training on one thread. Made by: `{command}`",
    )
    best = margins(planned, best_classical(planned))
    artifacts.csv(f"tables/{study.name}_best", best)
    artifacts.markdown(
        f"tables/{study.name}_best",
        ("Data", "Learned", "λ, by validation", "Test MSE", "Best classical λ", "Its test MSE", "Difference"),
        [_best_row(study, row) for row in best.to_dict("records")],
        "The best learned denoiser, its λ chosen on the validation signals, against the classical denoiser of the λ "
        "that is best on the test signals themselves. Difference of the mean squared errors signal by signal, with "
        f"its 95% confidence interval over all test signals of {best['seeds'].max()} seed(s). Made by: `{command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return classical and final test error and seconds per training epoch, one row per series and weight."""
    test = frame[frame["split"] == "test"]
    learned = aggregate(test[test["epoch"] == test["epoch"].max()], GROUP, "mse")
    table = learned[[*GROUP, "n", "mean", "sd"]].rename(columns={"n": "seeds", "mean": "learned", "sd": "learned_sd"})
    for name, part in {
        "classical": aggregate(test[test["epoch"] == 0], GROUP, "mse"),
        "seconds_epoch": aggregate(frame[frame["split"] == "train"], GROUP, "seconds_epoch"),
    }.items():
        table = table.merge(part[[*GROUP, "mean"]].rename(columns={"mean": name}), on=GROUP)
    return table


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
    """Return the classical denoiser of the least test error: reading, seed, weight, mse, one row per data set.

    lambda is sought between the smallest and the largest of the study for that reading.
    """
    sets = {}
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

        def error(log_weight: float, task: DenoisingTask = task) -> float:
            return float(_classical_errors(task, math.exp(log_weight)).mean())

        bounds = math.log(place.low), math.log(place.high)
        found = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-3})
        rows.append({"reading": place.reading, "seed": place.seed, "weight": math.exp(found.x), "mse": found.fun})
    return pd.DataFrame(rows)


def _classical_errors(task: DenoisingTask, weight: float) -> Tensor:
    """Return the squared error of each test signal after total variation of this weight, (samples,)."""
    task.problem = DenoisingProblem(weight, task.n_inputs)
    return task.errors(differencing(task.n_inputs), task.splits["test"])


def margins(planned: Sequence[StudyRun], classical: pd.DataFrame) -> pd.DataFrame:
    """Return, per reading and structure, the best learned denoiser against the best classical one.

    Columns: reading, structure, seeds, weights (lambda by validation, per seed), learned, classical_weights, classical,
    difference (mean over all test signals), ci95 (its half width, paired by signal).
    """
    place = classical.set_index(["reading", "seed"])
    rows = []
    for reading in READINGS:
        for suffix in STRUCTURES:
            learned, base, weights, classical_weights = [], [], [], []
            for seed in sorted({run.seed for run in planned if run.series == reading + suffix}):
                run = _best_by_validation([r for r in planned if (r.series, r.seed) == (reading + suffix, seed)])
                parts = components.trained(run.folder)
                test = parts.task.splits["test"]
                with torch.no_grad():
                    learned.append(parts.task.errors(parts.model(test["inputs"]), test))
                weights.append(run.point["task.weight"])
                classical_weights.append(place.loc[(reading, seed), "weight"])
                base.append(_classical_errors(parts.task, classical_weights[-1]))
            mine, theirs = torch.cat(learned), torch.cat(base)
            difference = mine - theirs
            rows.append(
                {
                    "reading": reading,
                    "structure": suffix,
                    "seeds": len(weights),
                    "weights": " ".join(f"{weight:g}" for weight in weights),
                    "learned": float(mine.mean()),
                    "classical_weights": " ".join(f"{weight:.3g}" for weight in classical_weights),
                    "classical": float(theirs.mean()),
                    "difference": float(difference.mean()),
                    "ci95": float(stats.t.ppf(0.975, len(difference) - 1) * difference.std() / len(difference) ** 0.5),
                }
            )
    return pd.DataFrame(rows)


def _best_by_validation(candidates: Sequence[StudyRun]) -> StudyRun:
    """Return the run whose last validation error is the smallest."""

    def error(run: StudyRun) -> float:
        return float(folders.load_summary(run.folder)["final"]["val"]["mse"])

    return min(candidates, key=error)


def _best_row(study: Study, row: dict) -> list[str]:
    percent = 100 / row["classical"]
    better = row["difference"] + row["ci95"] < 0
    difference = f"{percent * row['difference']:+.2f} ± {percent * row['ci95']:.2f}%"
    return [
        study.titles[row["reading"]],
        STRUCTURES[row["structure"]],
        ", ".join(row["weights"].split()),
        f"{row['learned']:.4g}",
        ", ".join(row["classical_weights"].split()),
        f"{row['classical']:.4g}",
        f"**{difference}**" if better else difference,
    ]


def _rows(study: Study, table: pd.DataFrame) -> Iterator[list[str]]:
    indexed = table.set_index(GROUP)
    for reading in READINGS:
        for weight in sorted(table.loc[table["series"] == reading, "weight"]):
            classical = indexed.loc[(reading, weight)]
            learned = [
                _learned(indexed.loc[(reading + suffix, weight)]) if (reading + suffix, weight) in indexed.index else ""
                for suffix in STRUCTURES
            ]
            yield [
                study.titles[reading],
                f"{weight:g}",
                f"{classical['classical']:.4g}",
                *learned,
                f"{classical['seconds_epoch']:.1f}",
            ]


def _learned(row: pd.Series) -> str:
    text = f"{row['learned']:.4g}" + ("" if pd.isna(row["learned_sd"]) else f" ± {row['learned_sd']:.1g}")
    return f"**{text}**" if row["learned"] < row["classical"] else text
