"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def number(value: float | None, form: str = ".2g", missing: str = "") -> str:
    """Return a number as a cell, which is `missing` for None and NaN."""
    return missing if value is None or pd.isna(value) else format(value, form)
