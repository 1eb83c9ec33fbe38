"""The tables of the Maros-Meszaros collection: QPLayer's gradients and refusals, and all libraries beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from experiments.benchmark.collection_run import LIMIT, OURS
from experiments.benchmark.examination import OBJECTIVE, ROWS
from experiments.benchmark.libraries import LIBRARIES
from experiments.benchmark.optima import corrected
from experiments.benchmark.tables import number, table
from experiments.benchmark.truth import LARGEST, WITH_RESPECT_TO

CAUSES = ("not unique", "kink", "dependent rows")
CLOSE = 1e-4  # error of the objective, violation of rows and bounds up to which the x of any library is right
KINDS = {
    "right": "right",
    "right refusal": "refused where there is none",
    "wrong x": "wrong: x",
    "wrong gradient": "wrong: gradient",
    "wrong, none": "wrong: answers where there is none",
    "refused": "refused",
    "raw": "raw",
    "time limit": f"over {LIMIT:g} s",
    "not judged": "not compared",
}


def report(findings: pd.DataFrame) -> list[str]:
    """Return the lines of the section; findings: of `examined`."""
    ours = findings[findings["library"] == OURS]
    lines = ["## Maros-Meszaros through `QPLayer`", "", *table(("", "Number"), summary(ours)), "", COLLECTION]
    lines += [*table(_columns(), _problems(ours)), ""]
    if len(misprinted := misprints(ours)):
        lines += ["### Published optima that are misprints", "", MISPRINTS]
        lines += [*table(("Problem", "Published", "piqp", "Clarabel", "QPLayer"), misprinted), ""]
    asked_all = findings[findings["argument"] == "p"].assign(kind=lambda rows: rows.apply(kind, axis=1))
    lines += ["## Maros-Meszaros: all libraries", "", *table(("Library", *KINDS.values(), *TIMES), _tally(asked_all))]
    lines += ["", LIBRARIES_NOTE, *table(("Problem", "n", *_titles(asked_all)), _beside(asked_all)), ""]
    return lines


COLLECTION = f"""\
Rows l = u are equalities, the bounds of the variables are `lower` and `upper`, all else is G, h; Q, G and A are given
as sparse matrices. Violations are relative to the terms of their own row, in the units of the files. A derivative is
that of w'x, w random and fixed, along two random directions of each argument. It is compared with differences from
both sides, at the steps on which they agree, by piqp at 1e-12 (Clarabel where that fails) with its active rows solved
as equalities and checked by the optimality conditions. A refusal is confirmed where differences from the left and from
the right disagree, where there is no solution on a side, or where w'x differs between solutions.
† differences from both sides agree: a derivative was refused that exists along these directions.
‡ more than {LARGEST:,} variables: the solution is checked, the gradient of p is not compared.
"""
MISPRINTS = """\
Where no answer has the published objective, piqp and Clarabel are asked. They agree to 1e-8 on another one, which is
what all libraries are judged by.
"""
LIBRARIES_NOTE = f"""\
Each is asked for x and for the gradient of w'x with respect to p. Wrong, without an error, a status or NaN: x, where
the objective or a row or a bound is off by more than 1e-4; the gradient, where it is off by more than 1e-3 along one of
two directions; any answer where differences show that there is no derivative. Refused: an error of the library's own, a
status or NaN, where there is a derivative or where that is not known. Raw: an exception that was not meant, or a crash.
Not compared: more than {LARGEST:,} variables, or differences that are not resolved; x is right there. libdqp gets the
bounds of variables as rows, and is asked in its sparse form. Seconds are forward and backward, of a first call.
"""
TIMES = ("Median (s)", "Slowest (s)", "Seconds on what all answer")


def summary(ours: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what is counted of foldopt's answers: titles and numbers."""
    first = ours.drop_duplicates("problem")
    said, answered = ours["derivative"], ours["said"] == "answered"
    verdicts = first["verdict"].replace("", "none").value_counts()
    seconds = first["seconds_forward"] + first["seconds_backward"].fillna(0.0)
    lost, raw = first["error"].str.startswith("time limit"), first["said"] == "raw"
    causes = first["problem"] + " (" + first["error"].str.split(":").str[0] + ")"
    return [
        ("Problems", str(len(first))),
        (f"Solved: objective to {OBJECTIVE:.0e}, rows and bounds to {ROWS:.0e}", _count(first["solution"] == "solved")),
        ("Wrong x without a word", _list(first.loc[first["solution"] == "wrong", "problem"])),
        ("Not solved, refused by cause", _list(causes[(first["solution"] == "") & ~raw])),
        ("Raw exceptions", _list(causes[raw & ~lost])),
        (f"Over {LIMIT:g} s", _list(first.loc[lost, "problem"])),
        ("Slowest (s)", number(seconds.max())),
        ("Most memory (MB)", number(first["peak_bytes"].max() / 1e6, ".0f")),
        ("Verdicts on p", ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())),
        ("Gradients that are compared, one per problem and argument", _count(said != "not compared")),
        ("Given, and confirmed by differences", _count(answered & (said == "confirmed"))),
        ("Given, to 1e-3 and not to 1e-4", _count(answered & (said == "close"))),
        ("Given, and contradicted by differences", _count(answered & said.str.startswith("contradicted"))),
        ("Given, and not resolved by differences", _count(answered & (said == "unresolved"))),
        *((f"Refused, {cause}, which differences confirm", _count(said == f"{cause} confirmed")) for cause in CAUSES),
        ("Refused, though differences see a derivative (†)", _count(~answered & said.str.endswith(" contradicted"))),
        ("Refused, and not resolved by differences", _count(~answered & said.str.endswith(" unresolved"))),
        ("Refused for another cause", _count(~answered & said.str.startswith("refused"))),
    ]


def _count(mask: pd.Series) -> str:
    return str(int(mask.sum()))


def _list(names: pd.Series) -> str:
    return ", ".join(names) or "0"


def misprints(ours: pd.DataFrame) -> list[Sequence[str]]:
    """Return the published optima on another value than which two solvers agree: name, and all values."""
    rows: list[Sequence[str]] = []
    for _, row in ours.drop_duplicates("problem").iterrows():
        found = {solver: row[solver] for solver in ("piqp", "Clarabel") if solver in row and not pd.isna(row[solver])}
        if len(found) == 2 and corrected(row["published"], found) != row["published"]:
            values = (row["published"], *found.values(), row["objective"])
            rows.append([row["problem"], *(number(value, ".10g") for value in values)])
    return rows


def _columns() -> tuple[str, ...]:
    return (
        *("Problem", "n", "Equalities", "Inequalities", "Bounds", "Solved", "Objective", "Worst row", "Worst bound"),
        *(f"∂/∂{name}" for name in WITH_RESPECT_TO),
        *("Forward (s)", "Backward (s)", "Memory (MB)"),
    )


def _problems(ours: pd.DataFrame) -> Iterable[Sequence[str]]:
    for name, rows in ours.groupby("problem", sort=False):
        first = rows.iloc[0]
        cells = {row["argument"]: _derivative(row) for _, row in rows.iterrows()}
        yield [
            str(name),
            *(str(first[key]) for key in ("n", "equalities", "inequalities", "bounds")),
            {"solved": "yes", "wrong": "**no**"}.get(first["solution"], first["error"].split(":")[0]),
            *(number(first[key], ".0e") for key in ("objective_error", "row_violation", "bound_violation")),
            *(cells.get(argument, "") for argument in WITH_RESPECT_TO),
            *(number(rows[key].min()) for key in ("seconds_forward", "seconds_backward")),
            number(first["peak_bytes"] / 1e6, ".0f"),
        ]


def _derivative(row: pd.Series) -> str:
    """Return the cell of a derivative."""
    said, reason = row["derivative"], row["verdict"] or row["error"].split(":")[0]
    if row["said"] == "raw":
        return reason
    if said == "not compared":
        return f"{reason} ‡"
    if row["said"] == "answered":
        known = {"confirmed": "right", "close": "right to 1e-3", "unresolved": "unresolved"}
        return known.get(said, f"**wrong**{said.removeprefix('contradicted')}")
    return reason + {"confirmed": "", "contradicted": " †", "unresolved": " (unresolved)"}[said.split(" ")[-1]]


def kind(row: pd.Series) -> str:
    """Return which of `KINDS` an answer is."""
    said = row["derivative"]
    if row["said"] == "raw":
        return "time limit" if row["error"].startswith("time limit") else "raw"
    if row["said"] == "refused":
        return "right refusal" if said.endswith(" confirmed") else "refused"
    if not max(row["objective_error"], row["row_violation"], row["bound_violation"]) <= CLOSE:
        return "wrong x"
    if said.startswith("contradicted"):
        return "wrong gradient" if said == "contradicted" else "wrong, none"
    return "right" if said in ("confirmed", "close") else "not judged"


def _titles(asked: pd.DataFrame) -> list[str]:
    return [LIBRARIES[library].named() for library in asked["library"].unique()]


def _tally(asked: pd.DataFrame) -> Iterable[Sequence[str]]:
    asked = asked.assign(seconds=asked["seconds_forward"] + asked["seconds_backward"])
    answered = asked[asked["said"] == "answered"]
    common = answered.groupby("problem")["library"].nunique() == asked["library"].nunique()
    for library, rows in asked.groupby("library", sort=False):
        counts, own = rows["kind"].value_counts(), answered[answered["library"] == library]
        shared = own.loc[own["problem"].isin(common[common].index), "seconds"]
        yield [
            LIBRARIES[str(library)].named(),
            *(str(counts.get(kind, 0)) for kind in KINDS),
            *(number(value) for value in (own["seconds"].median(), own["seconds"].max())),
            f"{shared.sum():.2g} (of {len(shared)})",
        ]


def _beside(asked: pd.DataFrame) -> Iterable[Sequence[str]]:
    for name, rows in asked.groupby("problem", sort=False):
        yield [str(name), str(rows["n"].iloc[0]), *(_cell(row) for _, row in rows.iterrows())]


def _cell(row: pd.Series) -> str:
    """Return the cell of an answer: what it is, and the seconds that it took."""
    words = {"right refusal": "refused: right", "wrong, none": "**answers**", "not judged": "not compared"}
    said = words.get(row["kind"], row["kind"])
    if said.startswith("wrong"):
        said = f"**{said.removeprefix('wrong ')}**"
    return f"{said} {number(row[['seconds_forward', 'seconds_backward']].sum(min_count=1))}".strip()
