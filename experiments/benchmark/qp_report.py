"""The page of `make bench-qp`: the collection, large and sparse programs, and all libraries on the hard cases."""

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
from experiments.benchmark.tables import number, table

Cells = Mapping[str, Mapping[str, str]]  # contender -> case -> what `judged` says
CASE_LIMIT, SPARSE_LIMIT, ROUNDS_LIMIT = 30.0, 60.0, 600.0  # seconds
SLOW = 5.0  # seconds of a pass from which there are no rounds
RIVAL = "dqp_piqp"  # whose seconds are the unit
KINDS = ("right", "wrong", "refused", "raw")


def compared(names: Sequence[str], contenders: Sequence[str], say: Callable[[str], None]) -> Cells:
    """Return what each contender that is installed does with the hard cases in `names`."""
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
    """Return how many answers are right, wrong, refused or raw."""
    return Counter(text.split(":")[0] for text in answers)


def fast(names: Sequence[str], say: Callable[[str], None]) -> pd.DataFrame:
    """Return one row per case in `names` and library: `COLUMNS`, its seconds by `rounds` where it is not slow."""
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
    """Return the page: summaries and tables of what was measured."""
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
Medians of {ROUNDS} rounds in which all take turns; where a pass takes more than {SLOW:g} s it is that of one call. The
first call is the first with this program, in a process that has solved a small one. Times are compared with those of
libdqp with piqp at 1e-6, its default tolerance. The projection onto the simplex is compared with its closed form, the
control problem with a solution whose optimality conditions hold to rounding and the gradient on its active set. Errors
are the largest, relative to the largest entry. Memory is by how much a second call raises what the process uses;
entries are those of the matrices and of the bounds.
"""
HARD = """\
Judged on x and on the gradient of sum(x) with respect to p. Wrong: an answer that is off by more than 1e-4 (x) or
1e-3 (gradient), or any answer where there is none, without an error, a status or NaN. Refused: an error of the
library's own, a status or NaN, where there is an answer; where there is none that is right (foldopt has to name
the cause). Raw: an exception that was not meant, a crash, or more than 30 s. Every library is at its default and,
where it has one, at a tighter setting.
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
    """Return the cell of an answer: what is wrong with it in one or two words."""
    kind, _, what = said.partition(": ")
    if kind == "wrong":
        return "**answers**" if what.startswith("answers") else f"**{what.split(' by ')[0]}**"
    return "time limit" if what.startswith("time limit") else kind
