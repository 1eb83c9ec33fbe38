"""Compare QPLayer's verdicts and gradients with exact arithmetic on small random programs with integer data."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

from experiments.benchmark.integer_sweep import (
    OTHER,
    RAW,
    RIGHT,
    TOLERANCE,
    WRONG,
    WRONG_X,
    Asked,
    Sweep,
    confusion,
    false_refusals,
    sweep,
)

PATH = Path("results/tables/verdicts.md")
TITLES: dict[tuple[str, Asked], str] = {
    ("alone", "p"): "Gradient with respect to p, one program at a time, errors raised",
    ("batches", "p"): "Gradient with respect to p, batches of equal shapes with policies",
    ("alone", "right-hand sides"): "The right-hand sides as well, one program at a time, errors raised",
    (
        "batches",
        "right-hand sides",
    ): "The same, batches of equal shapes with policies",
}


def report(result: Sweep, first: int, command: str) -> str:
    """Return the tables in Markdown."""
    kinds = Counter(one.truth.status for one in result.samples)
    solvable = kinds["solved"]
    lines = [
        "# QPLayer's verdicts against exact arithmetic",
        "",
        f"{len(result.samples)} random programs with integer data, 1 to 5 variables, seeds from {first} on: "
        + ", ".join(f"{count} {'with a solution' if kind == 'solved' else kind}" for kind, count in kinds.items())
        + f". Two integer vectors g each; what is true of g'x is found in exact rational arithmetic. A gradient is "
        f"right if no entry is off by more than {TOLERANCE:g} of the largest (or of 1).",
        "",
        f"The truth itself was checked against exact one-sided differences on {result.examined} of the programs: "
        f"{result.judged.pop('agrees', 0)} verdicts agree, {result.judged.total()} do not.",
        "",
    ]
    for key, title in TITLES.items():
        answers = result.answers[key]
        said = Counter(answer.said for answer in answers)
        worst = max((answer.error for answer in answers if answer.said == RIGHT), default=0.0)
        header, *rows = confusion(answers)
        lines += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            "",
            f"Wrong gradients called differentiable: {said[WRONG]}. Wrong solutions: {said[WRONG_X]}. Refusals of a "
            f"gradient that exists: {len(false_refusals(answers))}. Refusals by another cause: {said[OTHER]}. Raw "
            f"exceptions: {said[RAW]}. Largest error of a right gradient: {worst:.0e}.",
            "",
        ]
    lines += ['## `degenerate="one_sided"` at kinks of programs with one solution', ""]
    lines += [f"- {text}: {count} of {result.one_sided.total()}" for text, count in result.one_sided.most_common()]
    isolated = sum(derivative.isolated for one in result.samples for derivative in one.derivatives)
    lines += [
        "",
        f"Of {2 * solvable} pairs of a program and g, {isolated} are kinks at which programs nearby have several g'x; "
        '"not unique" is as good an answer there.',
        "",
        f"Made by: `{command}`",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep and write the tables; return 1 if a gradient called differentiable is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/verdicts.py", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--solvable", type=int, default=1500, help="number of programs that have a solution")
    parser.add_argument("--failing", type=int, default=100, help="number of infeasible, unbounded, nonconvex ones each")
    parser.add_argument("--differences", type=int, default=150, help="number of programs whose truth is checked")
    parser.add_argument("--show", type=int, default=0, help="print so many answers that are not right")
    parser.add_argument("--output", type=Path, default=PATH, help="file of the tables")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    result = sweep(options.first, options.solvable, options.failing, options.differences)
    given = [] if arguments is None and len(sys.argv) == 1 else sys.argv[1:] if arguments is None else arguments
    command = "python -m scripts.verdicts " + " ".join(given) if given else "make verdicts"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(result, options.first, command))
    sys.stdout.write(options.output.read_text())
    answers = [answer for part in result.answers.values() for answer in part]
    for answer in [answer for answer in answers if not answer.as_true][: options.show]:
        sys.stdout.write(f"{answer}\n")
    return int(any(answer.said in (WRONG, WRONG_X) for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
