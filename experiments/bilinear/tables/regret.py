"""Table of the bilinear study: final regret, its ratio to two-stage, wins by matrix Q, and tracked quantities."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.bilinear.series import ratios
from experiments.report.aggregation import last_test_rows
from experiments.report.outputs import StudyOutputs
from experiments.sweep.studies import Study

HEADER = (
    "n",
    "Series",
    "Regret",
    "Over two-stage's",
    "Below two-stage on",
    "Zero gradients, first to last epoch",
    "Prediction scale",
    "ρ(Φ)",
    "Local = global",
    "Seconds per epoch",
)


def make(outputs: StudyOutputs) -> None:
    """Write tables/<study>.csv and .md from the finished runs."""
    table = summarize(outputs.metrics())
    outputs.artifacts.csv(f"tables/{outputs.study.name}", table)
    task, seeds = outputs.planned[0].config.task, len({run.seed for run in outputs.planned})
    outputs.artifacts.markdown(
        f"tables/{outputs.study.name}",
        HEADER,
        _rows(outputs.study, table),
        f"Test regret after the last epoch: mean over the matrices Q ± standard deviation of that mean over {seeds} "
        "seeds. Over two-stage's: ratio of the means on the same Q. Below two-stage on: number of Q, by means over the "
        "seeds. Zero gradients: share of training samples whose loss has a zero gradient. Prediction scale: root mean "
        "square of the predicted coefficients. Local = global: share of training samples in which the optimum reached "
        "from the centre is as good as the best one found (`global_fraction`). "
        f"{task.n_train} training and {task.n_test} test samples. "
        f"Made by: `{outputs.command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per n and series."""
    last, rows = last_test_rows(frame), []
    training = frame[frame["split"] == "train"]
    for (n, series), part in last.groupby(["n_variables", "series"]):
        own = training[(training["n_variables"] == n) & (training["series"] == series)]
        ends = [own[own["epoch"] == epoch] for epoch in (own["epoch"].min(), own["epoch"].max())]
        by_q = part.groupby("interaction")["regret"].mean()
        base = last[(last["n_variables"] == n) & (last["series"] == "two_stage")]
        base = base.groupby("interaction")["regret"].mean().loc[by_q.index]
        by_seed = part.groupby("seed")["regret"].mean()
        ratio = ratios(last, n).set_index("series").loc[[series], "ratio"]
        rows.append(
            {
                "n_variables": n,
                "series": series,
                "matrices": len(by_q),
                "seeds": len(by_seed),
                "regret_mean": by_seed.mean(),
                "regret_sd": by_seed.std(),
                "ratio_mean": ratio.mean(),
                "ratio_low": ratio.min(),
                "ratio_high": ratio.max(),
                "wins": int((by_q < base).sum()),
                "zero_first": ends[0]["zero_gradient_fraction"].mean(),
                "zero_last": ends[1]["zero_gradient_fraction"].mean(),
                "prediction_scale": part["prediction_scale"].mean(),
                "spectral_radius": ends[1]["spectral_radius"].mean(),
                "global_fraction": ends[1]["global_fraction"].mean(),
                "solver_failures": own["solver_failures"].sum(),
                "seconds_epoch": own["seconds_epoch"].mean(),
            }
        )
    return pd.DataFrame(rows)


def _rows(study: Study, table: pd.DataFrame) -> Iterator[list[str]]:
    for n in sorted(table["n_variables"].unique(), reverse=True):
        rows = table[table["n_variables"] == n].set_index("series")
        for series, title in study.titles.items():
            if series not in rows.index:
                continue
            row = rows.loc[series]
            smoothed = series.startswith("fold") and pd.notna(row["spectral_radius"])
            yield [
                str(n),
                title,
                f"{row['regret_mean']:.2f} ± {row['regret_sd']:.2f}",
                f"{row['ratio_mean']:.2f}",
                "" if series == "two_stage" else f"{row['wins']:.0f} of {row['matrices']:.0f}",
                f"{row['zero_first']:.0%} to {row['zero_last']:.0%}" if series.startswith("fold") else "",
                f"{row['prediction_scale']:.1f}",
                f"{row['spectral_radius']:.2f}" if smoothed else "",
                f"{row['global_fraction']:.0%}" if smoothed else "",
                f"{row['seconds_epoch']:.2f}",
            ]
