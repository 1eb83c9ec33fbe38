"""The paper's claims: statements, each with a rule that derives a verdict from the tables of a results folder.

A rule reads only these tables. The commands that a claim names make them from run folders and measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments.report.outputs import member
from experiments.sweep import studies

CONFIRMED = "confirmed"
CONDITIONAL = "confirmed with a condition"
REFUTED = "not confirmed"
UNTESTED = "not tested here"
VERDICTS = (CONFIRMED, CONDITIONAL, REFUTED, UNTESTED)


class Finding(NamedTuple):
    """What was measured, one of VERDICTS, and the reason."""

    measured: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Results:
    """The tables of a results folder, which are named "tables/<name>" or "figures/<name>"."""

    root: Path

    def __call__(self, name: str) -> pd.DataFrame:
        """Return a table. Raises FileNotFoundError if it has not been made."""
        return pd.read_csv(self.root / f"{name}.csv")

    def multilabel(self, name: str) -> tuple[pd.DataFrame, bool]:
        """Return a table of the multilabel study, of CIFAR-100 if there is one, and whether it is the stand-in."""
        real = (self.root / f"{name}.csv").is_file()
        return self(name if real else f"{name}_stand_in"), not real


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, its place there, the commands that make the evidence, and the rule that judges it."""

    place: str
    statement: str
    commands: tuple[str, ...]
    judge: Callable[[Results], Finding]

    def finding(self, results: Results) -> Finding:
        """Judge the claim; the verdict is UNTESTED if a table is missing, or lacks rows as in a small profile."""
        try:
            return self.judge(results)
        except FileNotFoundError as missing:
            made = " and ".join(f"`{command}`" for command in self.commands)
            name = Path(missing.filename).relative_to(results.root)
            return Finding("–", UNTESTED, f"{name} does not exist; {made} makes it.")
        except (KeyError, IndexError) as missing:
            return Finding("–", UNTESTED, f"The tables of this profile are too small: there is no {missing}.")


def claims(names: Sequence[str] | None = None) -> list[Claim]:
    """Return the CLAIMS of the studies' modules, each module once; names: of the studies, None for all."""
    modules: dict[str, str] = {}
    for name in studies.names() if names is None else names:
        if module := studies.load(name).claims:
            modules.setdefault(module, name)
    return [claim for module, study in modules.items() for claim in member(f"{module}.CLAIMS", study)]
