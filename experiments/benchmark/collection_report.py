"""Tables on the Maros-Meszaros collection: QPLayer's gradients and refusals, and those of all libraries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from experiments.benchmark.collection_run import LIMIT, OURS
from experiments.benchmark.examination import OBJECTIVE, ROWS
from experiments.benchmark.libraries import LIBRARIES
from experiments.benchmark.optima import corrected
from experiments.benchmark.truth import LARGEST, WITH_RESPECT_TO
from experiments.report.markdown import number, table

CAUSES = ("not unique", "kink", "dependent rows")
CLOSE = 1e-4  # largest error of the objective, and largest violation of rows and bounds, of a right x
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
    """Return the lines of both sections; findings: the result of `examined`."""
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
Rows with l = u are equalities, the bounds of the variables are `lower` and `upper`, all other rows are G, h. Q, G and A
are sparse matrices. Violations are relative to the terms of their row, in the units of the files. Derivatives are those
of w'x with random fixed w along two random directions of each argument. They are compared with one-sided differences
from both sides, at steps on which the differences agree. The solver of the differences is piqp at 1e-12 (Clarabel
where piqp fails); its active rows are then solved as equalities, and the optimality conditions are checked. A refusal
is confirmed if the differences from the left and the right disagree, if a side has no solution, or if w'x differs
between solutions.
† Differences from both sides agree: the layer refused a derivative that exists along these directions.
‡ More than {LARGEST:,} variables: the solution is checked, but the gradient of p is not compared.
"""
MISPRINTS = """\
Where no answer has the published objective, piqp and Clarabel solve the problem, too. They agree to 1e-8 on another
optimum, by which all libraries are judged.
"""
LIBRARIES_NOTE = f"""\
Each library computes x and the gradient of w'x with respect to p. Wrong means: without an error, a failure status or
NaN, x is off by more than 1e-4 in the objective, a row or a bound; or the gradient is off by more than 1e-3 along one
of two directions; or there is an answer where differences show that no derivative exists. Refused: an error that the
library raises on purpose, a failure status or NaN, where a derivative exists or where that is unknown. Raw: an
unintended exception, or a crash. Not compared: more than {LARGEST:,} variables, or unresolved differences; x is right
there. libdqp gets the bounds of the variables as rows, and runs in its sparse form. Seconds are those of a first call,
forward and backward.
"""
TIMES = ("Median (s)", "Slowest (s)", "Seconds on what all answer")


def summary(ours: pd.DataFrame) -> list[tuple[str, str]]:
    """Return counts of foldopt's answers: titles and numbers."""
    first = ours.drop_duplicates("problem")
    said, answered = ours["derivative"], ours["said"] == "answered"
    verdicts = first["verdict"].replace("", "none").value_counts()
    seconds = first["seconds_forward"] + first["seconds_backward"].fillna(0.0)
    lost, raw = first["error"].str.startswith("time limit"), first["said"] == "raw"
    causes = first["problem"] + " (" + first["error"].str.split(":").str[0] + ")"
    return [
        ("Problems", str(len(first))),
        (f"Solved: objective to {OBJECTIVE:.0e}, rows and bounds to {ROWS:.0e}", _count(first["solution"] == "solved")),
        ("Wrong x without an error", _list(first.loc[first["solution"] == "wrong", "problem"])),
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
    """Return the misprinted optima, where two solvers agree on another value: the name, and all values."""
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
    """Return the cell of an answer: its kind and its seconds."""
    words = {"right refusal": "refused: right", "wrong, none": "**answers**", "not judged": "not compared"}
    said = words.get(row["kind"], row["kind"])
    if said.startswith("wrong"):
        said = f"**{said.removeprefix('wrong ')}**"
    return f"{said} {number(row[['seconds_forward', 'seconds_backward']].sum(min_count=1))}".strip()
