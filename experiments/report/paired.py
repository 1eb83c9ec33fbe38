"""Paired tests of the series of a study against each other, one table for each study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.multilabel.figures.figure_7 import EXACT, suffix
from experiments.report.aggregation import collect, paired, require_finished
from experiments.report.artifacts import Artifacts
from experiments.sweep.studies import Study, StudyRun

LEVEL = 0.05


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of the last epoch of each run."""
    test = frame[frame["split"] == "test"]
    return test[test["epoch"] == test.groupby("run")["epoch"].transform("max")]


def _learned_and_classical(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of the last epoch and, as the series "classical", of the one before training."""
    before = frame[(frame["split"] == "test") & (frame["epoch"] == 0)]
    return pd.concat(
        [
            part.assign(setting=part["series"], series=name)
            for name, part in (("learned", _last(frame)), ("classical", before))
        ]
    )


@dataclass(frozen=True)
class Pairing:
    """What a study compares: the column `value` within each group `by`, over the column `unit`."""

    value: str
    by: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]
    unit: str = "seed"
    rows: Callable[[pd.DataFrame], pd.DataFrame] = _last


PAIRINGS: Mapping[str, Pairing] = {
    "figure_4a": Pairing(
        "regret",
        ("n_variables",),
        (("fold", "two_stage"), ("fold", "two_stage_standardized"), ("fold", "spo_plus")),
        unit="interaction",
    ),
    "figure_4b": Pairing("mse", ("setting", "weight"), (("learned", "classical"),), rows=_learned_and_classical),
    "figure_4c": Pairing(
        "regret_percent",
        ("degree", "model"),
        (
            ("fold", "fold_gurobi"),
            ("fold", "cvxpylayers_paper"),
            ("fold", "cvxpylayers_normalized"),
            ("fold", "two_stage"),
            ("fold_tuned", "two_stage_tuned"),
        ),
    ),
    "figure_6": Pairing("mse", ("weight",), (("fold", "qpth"),)),
    "figure_7": Pairing(
        "top5", ("temperature",), tuple((name, EXACT) for name in ("cvxpylayers", "pgd", "pgd_a", "sqp", "perturbed"))
    ),
}
HEADERS = {"n_variables": "n", "weight": "λ", "temperature": "τ", "setting": "Learned"}
UNITS = {"seed": "seeds", "interaction": "matrices Q, means over the seeds"}


def make(study: Study, planned: Sequence[StudyRun], artifacts: Artifacts, command: str, run_command: str) -> None:
    """Write tables/<study>_paired.csv and .md from the finished runs; arguments as for `figure_4b.make`."""
    require_finished(planned, run_command)
    pairing = PAIRINGS[study.name]
    frame = pairing.rows(collect(planned))
    table = paired(frame, pairing.by, pairing.unit, pairing.value, pairing.comparisons)
    if table.empty:  # a profile of one seed
        return
    name = f"tables/{study.name}_paired{suffix(planned)}"
    artifacts.csv(name, table)
    artifacts.markdown(
        name,
        (
            *(HEADERS.get(key, key.capitalize()) for key in pairing.by),
            "Series",
            "Against",
            "Pairs",
            "Difference",
            "p",
            "adjusted p",
        ),
        _rows(study, table, pairing),
        f"Difference of {pairing.value.replace('_', ' ')} on the test split after the last epoch, with its 95% "
        f"confidence interval, over pairs of equal {UNITS[pairing.unit]}; two-sided paired t test, p adjusted for all "
        f"rows (Benjamini and Yekutieli). In bold where the adjusted p is below {LEVEL}. Made by: `{command}`",
    )


def _rows(study: Study, table: pd.DataFrame, pairing: Pairing) -> Iterator[list[str]]:
    for row in table.to_dict("records"):
        difference = f"{row['difference']:+.3g} ± {row['ci95']:.2g}"
        yield [
            *(f"{row[key]:g}" if isinstance(row[key], (int, float)) else row[key] for key in pairing.by),
            *(study.titles.get(row[key], row[key]) for key in ("series", "against")),
            str(row["pairs"]),
            f"**{difference}**" if row["p_adjusted"] < LEVEL else difference,
            f"{row['p']:.1g}",
            f"{row['p_adjusted']:.1g}",
        ]
