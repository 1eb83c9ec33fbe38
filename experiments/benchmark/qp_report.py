"""The tables of `make bench-qp`: QPLayer on the Maros-Meszaros collection, and all libraries on the hard cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.benchmark.apart import in_turn
from experiments.benchmark.examination import OBJECTIVE, ROWS, WITH_RESPECT_TO, examine
from experiments.benchmark.hard_cases import cases
from experiments.benchmark.qp_peers import CONTENDERS, answer

Cells = Mapping[str, Mapping[str, str]]  # contender -> case -> what `judged` says
PROBLEM_LIMIT, CASE_LIMIT = 300.0, 30.0  # seconds
SLOW = 5.0  # seconds, forward and backward, from which a problem is called slow
KINDS = ("right", "wrong", "refused", "raw")


def examined(folder: Path, names: Sequence[str], say: Callable[[str], None]) -> pd.DataFrame:
    """Return the findings of the problems in `names`; one that crashed or took too long has a row that says so."""
    rows: list[dict[str, object]] = []
    for name, (found, reason) in zip(
        names, in_turn(examine, [(folder, name) for name in names], PROBLEM_LIMIT), strict=True
    ):
        lost = {"problem": name, "argument": "p", "solution": "raw", "derivative": "raw exception", "error": reason}
        rows += found or [lost]
        say(f"{name}: {reason or ', '.join(sorted({str(row['derivative']) for row in found}))}")
    return pd.DataFrame(rows)


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


def summary(findings: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what is counted of the collection: titles and numbers."""
    first = findings.drop_duplicates("problem")
    refused = first["solution"].loc[~first["solution"].isin(["solved", "wrong", "raw"])]
    said = findings["derivative"].fillna("")
    reasons = [(cause, "confirmed") for cause in ("not unique", "kink", "dependent rows")]
    seconds = first["seconds_forward"] + first["seconds_backward"].fillna(0)
    slow = first.loc[(seconds > SLOW).to_numpy(), "problem"]
    return [
        ("Problems", str(len(first))),
        (
            f"Solved: objective to {OBJECTIVE:.0e}, rows and bounds to {ROWS:.0e}",
            str((first.solution == "solved").sum()),
        ),
        ("Wrong without a word", str((first.solution == "wrong").sum())),
        ("Not solved, refused by cause", _causes(refused)),
        ("Raw exceptions", str(findings.loc[said == "raw exception", "problem"].nunique())),
        ("Gradients, one per problem and argument", str(len(findings))),
        ("Given, and confirmed by differences", str((said == "confirmed").sum())),
        ("Given, and contradicted by differences", str(said.str.startswith("contradicted").sum())),
        ("Given, and not resolved by differences", str((said == "unresolved").sum())),
        *(
            (f"Refused, {cause}, which differences confirm", str((said == f"{cause} {how}").sum()))
            for cause, how in reasons
        ),
        ("Refused, though differences see a derivative (†)", str(said.str.endswith(" contradicted").sum())),
        ("Refused for another cause", str(said.isin(["", "refused", "raw exception"]).sum())),
        ("Refused, and not resolved by differences", str(said.str.endswith(" unresolved").sum())),
        (f"Slower than {SLOW:g} s", ", ".join(slow) or "0"),
    ]


def _causes(refused: pd.Series) -> str:
    counts = refused.value_counts()
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "0"


def report(findings: pd.DataFrame, cells: Cells, note: str) -> str:
    """Return the page: both summaries, both tables."""
    parts = ["# Quadratic programs: is the derivative right, or refused by its cause?", ""]
    if len(findings):
        parts += ["## Maros-Meszaros through `QPLayer`", "", *_table(("", "Number"), summary(findings)), "", COLLECTION]
        parts += [*_table(_columns(), _problem_rows(findings)), ""]
    if cells:
        parts += ["## Hard cases: all libraries", "", *_table(("", *KINDS), _tally(cells)), "", HARD]
        parts += [*_table(("Case", *_titles(cells)), _case_rows(cells)), ""]
    return "\n".join([*parts, note, ""])


COLLECTION = """\
Rows l = u are equalities, the bounds of the variables are `lower` and `upper`, all else is G, h. Violations are
relative to the terms of their own row, in the units of the files. A derivative is that of w'x, w random and fixed,
along two random directions of each argument; it is compared with differences from both sides, by piqp at 1e-12
with its active rows solved as equalities, at the steps on which they agree. A refusal is confirmed where
differences from the left and from the right disagree, where there is no solution on a side, or where w'x differs
between solutions.
† differences from both sides agree: a derivative was refused that exists along these directions.
"""
HARD = """\
Judged on x and on the gradient of sum(x) with respect to p. Wrong: an answer that is off by more than 1e-4 (x) or
1e-3 (gradient), or any answer where there is none, without an error, a status or NaN. Refused: an error of the
library's own, a status or NaN, where there is an answer; where there is none that is right (foldopt has to name
the cause). Raw: an exception that was not meant, a crash, or more than 30 s. Every library is at its default and,
where it has one, at a tighter setting.
"""


def _columns() -> tuple[str, ...]:
    return (
        *("Problem", "n", "Equalities", "Inequalities", "Bounds", "Solved", "Objective", "Worst row", "Worst bound"),
        *(f"∂/∂{name}" for name in WITH_RESPECT_TO),
        *("Forward (s)", "Backward (s)"),
    )


def _problem_rows(findings: pd.DataFrame) -> Iterable[Sequence[str]]:
    for name, rows in findings.groupby("problem", sort=False):
        first = rows.iloc[0]
        by_argument = dict(zip(rows["argument"], rows["derivative"].fillna(""), strict=True))
        sizes = [first.get(key) for key in ("n", "equalities", "inequalities", "bounds")]
        errors = [first.get(key) for key in ("objective_error", "row_violation", "bound_violation")]
        seconds = [rows[key].min() if key in rows else None for key in ("seconds_forward", "seconds_backward")]
        yield [
            str(name),
            *("" if pd.isna(size) else str(int(size)) for size in sizes),
            {"solved": "yes", "wrong": "**no**"}.get(first["solution"], str(first["solution"])),
            *("" if pd.isna(error) else f"{error:.0e}" for error in errors),
            *(_derivative(by_argument.get(argument, "")) for argument in WITH_RESPECT_TO),
            *("" if second is None or pd.isna(second) else f"{second:.2g}" for second in seconds),
        ]


def _derivative(said: str) -> str:
    """Return the cell of a derivative."""
    if said.startswith("contradicted"):
        return f"**wrong**{said.removeprefix('contradicted')}"
    for ending, mark in ((" confirmed", ""), (" contradicted", " †"), (" unresolved", " (unresolved)")):
        if said.endswith(ending):
            return said.removesuffix(ending) + mark
    return {"confirmed": "right"}.get(said, said)


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


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
