"""Tables of the denoising study: test error of classical and learned denoisers by reading, lambda and structure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import pandas as pd
import torch
from scipy import stats

from experiments.denoising.classical import best_classical, classical_errors
from experiments.denoising.series import READINGS, STRUCTURES
from experiments.denoising.task import DenoisingTask
from experiments.report.aggregation import aggregate, last_test_rows
from experiments.report.outputs import StudyOutputs
from experiments.run import components, folders
from experiments.sweep.studies import Study, StudyRun

GROUP = ["series", "weight"]


def make(outputs: StudyOutputs) -> None:
    """Write tables/<study> and tables/<study>_best, .csv and .md, from the finished runs and their trained models."""
    task, epochs = outputs.planned[0].config.task, outputs.planned[0].config.train.epochs
    table = summarize(outputs.metrics())
    outputs.artifacts.csv(f"tables/{outputs.study.name}", table)
    outputs.artifacts.markdown(
        f"tables/{outputs.study.name}",
        ("Data", "λ", "Classical", *(f"Learned: {how}" for how in STRUCTURES.values()), "Seconds per epoch"),
        _rows(outputs.study, table),
        f"Test MSE before training and after {epochs} epochs, mean ± standard deviation over {table['seeds'].max()} "
        f"seed(s); {task.n_train} training and {task.n_test} test signals. Bold: below the classical denoiser with "
        f"the same λ. Seconds per epoch of training on one thread. Made by: `{outputs.command}`",
    )
    best = margins(outputs.planned, best_classical(outputs.planned))
    outputs.artifacts.csv(f"tables/{outputs.study.name}_best", best)
    outputs.artifacts.markdown(
        f"tables/{outputs.study.name}_best",
        ("Data", "Learned", "λ, by validation", "Test MSE", "Best classical λ", "Its test MSE", "Difference"),
        [_best_row(outputs.study, row) for row in best.to_dict("records")],
        "The best learned denoiser, with the λ that is best on the validation signals, against the classical denoiser, "
        "with the λ that is best on the test signals. Difference: of the mean squared errors, paired by signal, with "
        f"its 95% confidence interval over all test signals of {best['seeds'].max()} seed(s). "
        f"Made by: `{outputs.command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return test errors before and after training and seconds per epoch, one row per series and weight."""
    test = frame[frame["split"] == "test"]
    learned = aggregate(last_test_rows(frame), GROUP, "mse")
    table = learned[[*GROUP, "n", "mean", "sd"]].rename(columns={"n": "seeds", "mean": "learned", "sd": "learned_sd"})
    for name, part in {
        "classical": aggregate(test[test["epoch"] == 0], GROUP, "mse"),
        "seconds_epoch": aggregate(frame[frame["split"] == "train"], GROUP, "seconds_epoch"),
    }.items():
        table = table.merge(part[[*GROUP, "mean"]].rename(columns={"mean": name}), on=GROUP)
    return table


def margins(planned: Sequence[StudyRun], classical: pd.DataFrame) -> pd.DataFrame:
    """Compare the best learned denoiser of each reading and structure with the best classical one.

    Returns:
        One row per reading and structure with the columns reading; structure; seeds; weights, the lambda of each seed
        that is best on validation signals; learned, its test error; classical_weights; classical; difference of the
        errors, mean over all test signals; ci95, the half width of its 95% confidence interval, paired by signal.
    """
    place = classical.set_index(["reading", "seed"])
    rows = []
    for reading in READINGS:
        for suffix in STRUCTURES:
            learned, base, weights, classical_weights = [], [], [], []
            for seed in sorted({run.seed for run in planned if run.series == reading + suffix}):
                run = _best_by_validation([r for r in planned if (r.series, r.seed) == (reading + suffix, seed)])
                parts = components.trained(run.folder)
                task = cast(DenoisingTask, parts.task)
                test = task.splits["test"]
                with torch.no_grad():
                    learned.append(task.errors(parts.model(test["inputs"]), test))
                weights.append(run.point["task.weight"])
                classical_weights.append(place.loc[(reading, seed), "weight"])
                base.append(classical_errors(task, classical_weights[-1]))
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


def _best_row(study: Study, row: Mapping[Hashable, Any]) -> list[str]:
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
