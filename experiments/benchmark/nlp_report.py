"""The page of `make bench-nlp`: what became of each of S2MPJ's problems, and how many of each kind there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.benchmark import nlp_truth
from experiments.benchmark.nlp_run import FEASIBLE, PEERS, SAME
from experiments.report.markdown import number, table

EXACT = 1e-6  # relative error of a derivative that agrees with the KKT system
CLOSE = 1e-3  # relative error of a derivative that agrees with differences
WRONG = nlp_truth.NO_KKT, nlp_truth.NO_MINIMUM


def report(findings: pd.DataFrame, note: str) -> str:
    """Return the page in Markdown. findings: as of `nlp_run.examined`. note: machine and command."""
    return "\n".join(
        [
            "# Nonlinear programs of S2MPJ",
            "",
            note,
            "",
            "Each problem is a layer whose objective has a linear term t'x and whose constraints have shifts s of the "
            "right-hand sides, from the start of the collection, with explicit first and second derivatives. The "
            "derivative is that of a random combination of x with respect to t and s.",
            "",
            *_solutions(findings),
            "",
            *_derivatives(findings),
            "",
            *_peers(findings),
            "",
            *_problems(findings),
            "",
        ]
    )


def _solutions(findings: pd.DataFrame) -> list[str]:
    solved = findings.status == "solved"
    certified = solved & ~findings.kind.isin(WRONG)
    rows = [
        ("an optimum that the file states", certified & findings.reached),
        ("another local minimum, or no optimum stated; checked in NumPy", certified & ~findings.reached),
        ("called solved, but no local minimum", solved & ~certified),
        *((f"refused: {cause}", findings.status == cause) for cause in sorted(set(findings.status[~solved]))),
    ]
    return [
        f"## Solutions, {len(findings)} problems",
        "",
        *table(["NLPLayer found", "Problems", "Which"], [_counted(*row, findings) for row in rows]),
        "",
        "Checked in NumPy: the KKT conditions hold to 1e-6 with the problem's own derivatives, and the Hessian of the "
        "Lagrangian has no negative curvature along the active constraints.",
    ]


def _derivatives(findings: pd.DataFrame) -> list[str]:
    solved = findings[(findings.status == "solved") & ~findings.kind.isin(WRONG)]
    regular, given = solved.kind == nlp_truth.REGULAR, solved.verdict == "given"
    differed = regular & given & (solved.difference > CLOSE)
    rows = [
        (
            f"regular, error at most {EXACT:g} against the KKT system in NumPy",
            regular & given & (solved.error <= EXACT),
        ),
        ("regular, larger error", regular & given & ~(solved.error <= EXACT)),
        ("regular, but refused", regular & ~given),
        *(
            (f"{kind}, {said}", (solved.kind == kind) & (given == (said == "given")))
            for kind in (nlp_truth.KINK, nlp_truth.DEPENDENT, nlp_truth.SINGULAR)
            for said in ("refused", "given")
        ),
        (f"regular, and further than {CLOSE:g} from central differences", differed),
    ]
    worst = solved.error[regular & given].max()
    median = solved.difference[regular & given].median()
    return [
        "## Derivatives at these solutions",
        "",
        *table(["Solution, derivative", "Problems", "Which"], [_counted(*row, solved) for row in rows]),
        "",
        f"Largest error against the KKT system: {number(worst, '.1e')}; median against differences: "
        f"{number(median, '.1e')}. A derivative at a kink or at dependent rows is given where the combination of x "
        "does not feel them.",
    ]


def _counted(what: str, which: pd.Series, findings: pd.DataFrame) -> Sequence[str]:
    names = findings.problem[which]
    listed = ", ".join(names) if len(names) <= 12 else ""
    return what, str(int(which.sum())), listed


def _peers(findings: pd.DataFrame) -> list[str]:
    columns = {"NLPLayer": ("objective", "violation", "seconds")}
    columns |= {peer: (f"{peer} objective", f"{peer} violation", f"{peer} seconds") for peer in PEERS}
    known = {who: names for who, names in columns.items() if names[0] in findings}
    feasible = {
        who: findings[f].where((findings[v] <= FEASIBLE) & ((who != "NLPLayer") | (findings.status == "solved")))
        for who, (f, v, _) in known.items()
    }
    best = pd.DataFrame(feasible).min(axis=1)
    rows = []
    for who, found in feasible.items():
        near = (found - best) <= SAME * np.maximum(1, best.abs())
        rows.append(
            [who, str(int(found.notna().sum())), str(int(near.sum())), number(findings[known[who][2]].median())]
        )
    return [
        "## Beside general solvers, from the same starts",
        "",
        *table(["Solver", "Feasible answers", "Among them the best objective", "Median time (s)"], rows),
        "",
        f"Feasible: violation at most {FEASIBLE:g} (1 + |x|); of NLPLayer only what it calls solved. Best: within "
        f"{SAME:g} of the lowest feasible objective. The time of NLPLayer includes the backward pass; the others "
        "evaluate NumPy without PyTorch between.",
    ]


def _problems(findings: pd.DataFrame) -> list[str]:
    rows = [
        [
            row.problem,
            str(row.n),
            str(row.m),
            row.status,
            number(row.objective, ".9g"),
            row.published,
            row.kind,
            row.verdict,
            number(row.error, ".0e"),
            number(row.difference, ".0e"),
        ]
        for row in findings.itertuples()
    ]
    header = ["Problem", "n", "Rows", "Status", "Objective", "Stated", "Solution", "Derivative", "Error", "Differences"]
    return ["## Every problem", "", *table(header, rows)]
