"""Run all libraries on the collection: true derivatives, answers and optima, in processes with time limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.benchmark.apart import in_turn
from experiments.benchmark.collection import Arguments, Problem, arguments, read
from experiments.benchmark.examination import Observation, examine, finding
from experiments.benchmark.libraries import LIBRARIES, Answer
from experiments.benchmark.optima import OFF, corrected, recomputed
from experiments.benchmark.truth import LARGEST, Truth, given, truth_of

OURS, PEERS = "foldopt", ("moreau", "moreau_tight", "dqp", "dqp_tight")
LIMIT = 60.0  # seconds for an answer, forward and backward
REFERENCE_LIMIT = 300.0  # seconds for the differences of a problem, and for its optimum by two solvers
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """The answer of a library that differentiated a problem with respect to one argument."""

    library: str
    problem: str
    argument: str
    seen: Observation


def examined(folder: Path, names: Sequence[str], say: Say) -> pd.DataFrame:
    """Judge the answers of all libraries to the problems in `names`.

    Returns:
        One row per answer with the fields of `Finding` as columns; the numbers of equalities, inequalities and bounds;
        published, the published optimum; piqp and Clarabel, their optima where the published one is in doubt.
    """
    problems = {name: read(folder, name) for name in names}
    args = {name: arguments(problem) for name, problem in problems.items()}
    compared = [name for name in names if problems[name].n <= LARGEST]
    truths: dict[str, Truth] = {}
    for name, (truth, reason) in zip(
        compared, in_turn(truth_of, [(folder, name) for name in compared], REFERENCE_LIMIT), strict=True
    ):
        say(f"{name}: differences {reason or 'taken'}")
        truths[name] = truth or Truth()
    cells = [cell for library in (OURS, *PEERS) for cell in _answers(folder, library, args, say)]
    optima = _optima(folder, problems, cells)
    rows = []
    for cell in cells:
        problem, found = problems[cell.problem], optima.get(cell.problem, {})
        optimum = corrected(problem.optimum, found)
        judged = finding(
            *(cell.library, problem.name, cell.argument, problem.n, optimum), cell.seen, truths.get(problem.name)
        )
        rows.append({**asdict(judged), **_size(args[problem.name]), "published": problem.optimum, **found})
    return pd.DataFrame(rows)


def _answers(folder: Path, library: str, args: Mapping[str, Arguments], say: Say) -> Iterator[Cell]:
    """Yield the answers of `library`: all gradients that are compared for foldopt, that of p for other libraries."""
    if not LIBRARIES[library].installed():
        say(f"{library}: not installed")
        return
    asked = [
        (name, argument)
        for name, given_args in args.items()
        for argument in (given(given_args) if library == OURS and len(given_args.p) <= LARGEST else ["p"])
    ]
    items = [(folder, library, name, argument) for name, argument in asked]
    for (name, argument), (seen, reason) in zip(asked, in_turn(examine, items, LIMIT), strict=True):
        cell = Cell(library, name, argument, seen or Observation(Answer("raw", error=reason)))
        say(f"{name}, {library}, {argument}: {cell.seen.answer.said} {cell.seen.answer.error}")
        yield cell


def _optima(folder: Path, problems: Mapping[str, Problem], cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Return the optima of two solvers for problems on which no answer of foldopt has the published objective."""
    agreed = {
        cell.problem
        for cell in cells
        if cell.library == OURS
        and abs(cell.seen.objective - (published := problems[cell.problem].optimum)) <= OFF * max(1, abs(published))
    }
    doubted = [name for name in problems if name not in agreed]
    found = in_turn(recomputed, [(folder, name) for name in doubted], REFERENCE_LIMIT)
    return {name: values or {} for name, (values, _) in zip(doubted, found, strict=True)}


def _size(args: Arguments) -> dict[str, int]:
    bounds = np.isfinite(args.lower).sum() + np.isfinite(args.upper).sum()
    return {"equalities": len(args.b), "inequalities": len(args.h), "bounds": int(bounds)}
