"""Table of the paired tests between the series of a study."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.report.aggregation import paired
from experiments.report.outputs import StudyOutputs, member
from experiments.sweep.studies import Pairing, Study
from foldopt.errors import InputError

LEVEL = 0.05
HEADERS = {"n_variables": "n", "weight": "λ", "temperature": "τ", "setting": "Learned"}
UNITS = {"seed": "seeds", "interaction": "matrices Q, means over the seeds"}


def make(outputs: StudyOutputs) -> None:
    """Write tables/<study>_paired.csv and .md from the finished runs."""
    pairing = outputs.study.paired
    if pairing is None:
        raise InputError(f"study {outputs.study.name} lists {__name__} in its outputs but has no `paired`.")
    frame = member(pairing.rows, outputs.study.name)(outputs.metrics())
    table = paired(frame, pairing.by, pairing.unit, pairing.value, pairing.comparisons)
    if table.empty:  # a profile of one seed
        return
    name = f"tables/{outputs.study.name}_paired{outputs.suffix}"
    unit = UNITS.get(pairing.unit, pairing.unit)
    outputs.artifacts.csv(name, table)
    outputs.artifacts.markdown(
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
        _rows(outputs.study, table, pairing),
        f"Difference of {pairing.value.replace('_', ' ')} on the test split after the last epoch, with its 95% "
        f"confidence interval, over pairs of equal {unit}; two-sided paired t test, p adjusted for all "
        f"rows (Benjamini and Yekutieli). In bold where the adjusted p is below {LEVEL}. Made by: `{outputs.command}`",
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
