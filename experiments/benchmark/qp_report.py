"""The page of `make bench-qp`: the collection, large sparse programs, and the hard cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.benchmark import collection_report
from experiments.benchmark.apart import in_turn
from experiments.benchmark.hard_cases import cases
from experiments.benchmark.large_sparse import CONTENDERS as FAST
from experiments.benchmark.large_sparse import ROUNDS, first, rounds
from experiments.benchmark.libraries import LIBRARIES
from experiments.benchmark.qp_peers import CONTENDERS, answer
from experiments.report.markdown import number, table

Cells = Mapping[str, Mapping[str, str]]  # contender -> case -> result of `judged`
CASE_LIMIT, SPARSE_LIMIT, ROUNDS_LIMIT = 30.0, 60.0, 600.0  # seconds
SLOW = 5.0  # a library whose pass takes more seconds than this has no rounds
RIVAL = "dqp_piqp"  # the library to whose times others are compared
KINDS = ("right", "wrong", "refused", "raw")


def compared(names: Sequence[str], contenders: Sequence[str], say: Callable[[str], None]) -> Cells:
    """Return the judgements of the installed contenders on the hard cases in `names`."""
    cells: dict[str, dict[str, str]] = {}
    for contender in contenders:
        if not CONTENDERS[contender].installed():
            say(f"{contender}: not installed")
            continue
        answers = in_turn(answer, [(contender, name) for name in names], CASE_LIMIT)
        cells[contender] = {
            name: found or f"raw: {reason}" for name, (found, reason) in zip(names, answers, strict=True)
        }
        say(f"{contender}: {dict(counted(cells[contender].values()))}")
    return cells


def counted(answers: Iterable[str]) -> Counter[str]:
    """Count the answers that are right, wrong, refused or raw."""
    return Counter(text.split(":")[0] for text in answers)


def fast(names: Sequence[str], say: Callable[[str], None]) -> pd.DataFrame:
    """Return one row per case in `names` and library with `COLUMNS`; seconds are from `rounds` unless it is slow."""
    keys = [key for key in FAST if LIBRARIES[key].installed()]
    items = [(name, key) for name in names for key in keys]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (name, key), (found, reason) in zip(items, in_turn(first, items, SPARSE_LIMIT), strict=True):
        rows[name, key] = {"error": reason, **(found or {})}
        say(f"{name}, {key}: {rows[name, key]['error'] or 'measured'}")
    for name in names:
        quick = tuple(key for key in keys if _seconds(rows[name, key]) < SLOW)
        ((found, _),) = in_turn(rounds, [(name, quick)], ROUNDS_LIMIT)
        for key, taken in (found or {}).items():
            rows[name, key].update(taken)
    return pd.DataFrame([{"case": name, "library": key, **row} for (name, key), row in rows.items()], columns=COLUMNS)


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row.get("seconds_forward", math.inf)) + float(row.get("seconds_backward", math.inf))


def report(findings: pd.DataFrame, speed: pd.DataFrame, cells: Cells, note: str) -> str:
    """Return the page with all summaries and tables."""
    parts = ["# Quadratic programs: is the derivative right, or refused by its cause?", ""]
    if len(findings):
        parts += collection_report.report(findings)
    if len(speed):
        header = ("Case", "Library", *SPEED_HEADER)
        parts += ["## Large and sparse", "", SPEED, *table(header, _speed_rows(speed)), ""]
    if cells:
        parts += ["## Hard cases: all libraries", "", *table(("", *KINDS), _tally(cells)), "", HARD]
        parts += [*table(("Case", *_titles(cells)), _case_rows(cells)), ""]
    return "\n".join([*parts, note, ""])


COLUMNS = (
    *("case", "library", "seconds_cold", "seconds_forward", "seconds_backward", "error_x", "error_gradient"),
    *("peak_bytes", "nnz", "error"),
)
SPEED_HEADER = (
    *("Forward (s)", "Backward (s)", "Times libdqp", "First call (s)", "Error of x", "Error of the gradient"),
    *("Memory (MB)", "Bytes per entry"),
)
SPEED = f"""\
Medians of {ROUNDS} rounds in which all take turns, or a single call if a pass takes more than {SLOW:g} s. First call:
the first one with this program, in a process that has solved a small program before. Times are compared with libdqp
with piqp at 1e-6, its default tolerance. The projection onto the simplex is compared with its closed form. The control
problem is compared with a solution whose optimality conditions hold to rounding, and with the gradient on its active
set. Errors are the largest, relative to the largest entry. Memory is the growth of the process during a second call;
entries are those of the matrices plus the finite bounds.
"""
HARD = """\
Each library is judged by x and by the gradient of sum(x) with respect to p. Wrong: an answer that is off by more than
1e-4 (x) or 1e-3 (gradient), or any answer where none exists, without an error, a failure status or NaN. Refused: an
error that the library raises on purpose, a failure status or NaN, where an answer exists; where none exists, a
refusal is right (foldopt has to name the reason). Raw: an unintended exception, a crash, or more than 30 s. Every
library runs with its default settings and, if it has them, with tighter ones.
"""


def _speed_rows(speed: pd.DataFrame) -> Iterable[Sequence[str]]:
    for case, rows in speed.groupby("case", sort=False):
        rival = rows.loc[rows["library"] == RIVAL, ["seconds_forward", "seconds_backward"]].sum(axis=1, min_count=1)
        for _, row in rows.iterrows():
            if pd.isna(row["seconds_forward"]):
                yield [str(case), LIBRARIES[row["library"]].named(), row["error"], *[""] * (len(SPEED_HEADER) - 1)]
                continue
            yield [
                str(case),
                LIBRARIES[row["library"]].named(),
                *(number(row[key]) for key in ("seconds_forward", "seconds_backward")),
                number(_seconds(row) / rival.iloc[0] if len(rival) else None),
                number(row["seconds_cold"]),
                *(number(row[key], ".0e") for key in ("error_x", "error_gradient")),
                number(row["peak_bytes"] / 1e6, ".0f"),
                number(row["peak_bytes"] / row["nnz"], ".0f"),
            ]


def _titles(cells: Cells) -> list[str]:
    return [CONTENDERS[contender].named() for contender in cells]


def _tally(cells: Cells) -> Iterable[Sequence[str]]:
    for contender, title in zip(cells, _titles(cells), strict=True):
        counts = counted(cells[contender].values())
        yield [title, *(str(counts[kind]) for kind in KINDS)]


def _case_rows(cells: Cells) -> Iterable[Sequence[str]]:
    for case in cases():
        if all(case.name in answers for answers in cells.values()):
            title = f"{case.name} ({case.refusal})" if case.refusal else case.name
            yield [title, *(_short(answers[case.name]) for answers in cells.values())]


def _short(said: str) -> str:
    """Return the cell of an answer: the kind, or what is wrong."""
    kind, _, what = said.partition(": ")
    if kind == "wrong":
        return "**answers**" if what.startswith("answers") else f"**{what.split(' by ')[0]}**"
    return "time limit" if what.startswith("time limit") else kind
