"""Put NLPLayer and general solvers to S2MPJ's nonlinear programs; write results/bench/nlp.md and nlp.csv."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from experiments.benchmark import nlp_report, nlp_run, s2mpj
from experiments.benchmark.report import machine
from experiments.report.artifacts import Artifacts, output_root


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench_nlp.py", description=__doc__)
    parser.add_argument("--prefix", default="", help="only problems whose names start so, such as HS (default: all)")
    parser.add_argument("--only", action="append", help="a problem; nothing is written")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started
    known = s2mpj.names(options.prefix)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is no problem of S2MPJ.")
    findings = nlp_run.examined(options.only or nlp_run.small(known, console.print), console.print)
    where = machine()
    command = "make bench-nlp" + (f" PREFIX={options.prefix}" if options.prefix else "")
    note = f"{where['cpu']}, {where['cores']} cores, one thread; float64. Made by: `{command}`"
    page = nlp_report.report(findings, note)
    console.print(page)
    if not options.only:
        artifacts = Artifacts(output_root("default"))
        artifacts.write("bench/nlp.md", page.encode())
        artifacts.csv("bench/nlp", findings)
        for line in artifacts.lines():
            console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
