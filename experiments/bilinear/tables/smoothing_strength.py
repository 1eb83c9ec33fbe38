"""Table of the validation regret by strength kappa of the smoothing, and the kappa of smallest regret."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from experiments.report.aggregation import aggregate
from experiments.report.outputs import StudyOutputs

GROUP = ["n_variables", "series", "kappa"]
KINDS: Mapping[str, tuple[str, bool | None]] = {
    "quadratic, nonconvex": ("fold", False),
    "quadratic, convex": ("fold", True),
    "entropy": ("fold_entropy", None),
}


def make(outputs: StudyOutputs) -> None:
    """Write tables/<study>.csv and .md from the finished runs."""
    table = summarize(outputs.metrics())
    outputs.artifacts.csv(f"tables/{outputs.study.name}", table)
    kappas = sorted(table["kappa"].unique())
    config, matrices = outputs.planned[0].config, {run.point["task.interaction"] for run in outputs.planned}
    outputs.artifacts.markdown(
        f"tables/{outputs.study.name}",
        ("n", "Smoothing", *(f"κ = {kappa:g}" for kappa in kappas)),
        _rows(table, kappas),
        f"Validation regret after {config.train.epochs} epochs, mean over {len(matrices)} matrices Q and "
        f"{len({run.seed for run in outputs.planned})} seed(s), {config.task.n_val} validation samples. Bold: the "
        "smallest of each row, whose κ is used in Figure 4(a). No test samples were used. "
        f"Made by: `{outputs.command}`",
    )


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the final validation regret by n, kind of smoothing and kappa, and which kappa is chosen for each kind."""
    last = frame[(frame["split"] == "val") & (frame["epoch"] == frame["epoch"].max())]
    means = aggregate(last, GROUP, "regret")[[*GROUP, "mean", "sd", "n"]].rename(columns={"n": "runs"})
    parts = []
    for kind, (series, convex) in KINDS.items():
        part = means[means["series"] == series]
        part = part if convex is None else part[(part["kappa"] >= 1) == convex]
        least = part.groupby("n_variables")["mean"].transform("min")
        parts.append(part.assign(kind=kind, chosen=part["mean"] == least))
    return pd.concat(parts)[["n_variables", "kind", "kappa", "mean", "sd", "runs", "chosen"]]


def _rows(table: pd.DataFrame, kappas: Sequence[float]) -> Iterator[list[str]]:
    for n in sorted(table["n_variables"].unique()):
        for kind in KINDS:
            row = table[(table["n_variables"] == n) & (table["kind"] == kind)].set_index("kappa")
            cells = [_cell(row.loc[kappa]) if kappa in row.index else "" for kappa in kappas]
            yield [str(n), kind, *cells]


def _cell(entry: pd.Series) -> str:
    return f"**{entry['mean']:.3f}**" if entry["chosen"] else f"{entry['mean']:.3f}"
