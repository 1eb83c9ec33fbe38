"""The paper's claims, each a statement and a rule that turns the tables of a results folder into a verdict.

A claim reads the tables of a results folder alone, which are made of run folders and measurements by the commands that
each claim names.
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
    """What was measured, one of VERDICTS, and one sentence why."""

    measured: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Results:
    """The tables under one results folder, by name: "tables/<name>" or "figures/<name>"."""

    root: Path

    def __call__(self, name: str) -> pd.DataFrame:
        """Return a table; FileNotFoundError if it was not made."""
        return pd.read_csv(self.root / f"{name}.csv")

    def multilabel(self, name: str) -> tuple[pd.DataFrame, bool]:
        """Return a table of the multilabel study and whether it is of stand-in images, in want of CIFAR-100's."""
        real = (self.root / f"{name}.csv").is_file()
        return self(name if real else f"{name}_stand_in"), not real


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, where it stands, the commands that make its evidence, and how it is judged."""

    place: str
    statement: str
    commands: tuple[str, ...]
    judge: Callable[[Results], Finding]

    def finding(self, results: Results) -> Finding:
        """Return what the results say; without them, or with a part of them, the claim is not tested here."""
        try:
            return self.judge(results)
        except FileNotFoundError as missing:
            made = " and ".join(f"`{command}`" for command in self.commands)
            name = Path(missing.filename).relative_to(results.root)
            return Finding("–", UNTESTED, f"{name} is not there; {made} makes it.")
        except (KeyError, IndexError) as missing:
            return Finding("–", UNTESTED, f"This profile is too small for it: there is no {missing}.")


def claims(names: Sequence[str] | None = None) -> list[Claim]:
    """Return the CLAIMS of the modules that the studies name, each module once; names: of studies, None for all."""
    modules: dict[str, str] = {}
    for name in studies.names() if names is None else names:
        if module := studies.load(name).claims:
            modules.setdefault(module, name)
    return [claim for module, study in modules.items() for claim in member(f"{module}.CLAIMS", study)]
