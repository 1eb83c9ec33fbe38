"""Put QPLayer and its peers to the Maros-Meszaros programs, to large sparse programs and to the hard cases.

Writes results/bench/qp.md and results/bench/qp.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console

from experiments.benchmark import collection, collection_run, large_sparse, qp_report
from experiments.benchmark.hard_cases import cases
from experiments.benchmark.qp_peers import CONTENDERS
from experiments.benchmark.report import machine
from experiments.report.artifacts import Artifacts, output_root


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench_qp.py", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder of the .mat files and optima.json; without it nothing is written"
    )
    parser.add_argument("--largest", type=int, help="variables of the largest problem (default: no limit)")
    parser.add_argument("--only", action="append", help="a problem, a case or a library; nothing is written")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started
    problems = collection.names(options.data, options.largest) if options.data else []
    sparse, hard, contenders = list(large_sparse.CASES), [case.name for case in cases()], list(CONTENDERS)
    if options.only:
        unknown = set(options.only) - {*problems, *sparse, *hard, *contenders}
        if unknown:
            parser.error(f"--only: {', '.join(sorted(unknown))} is no problem in --data, no case and no library.")
        problems, sparse, chosen, libraries = (
            [name for name in names if name in options.only] for names in (problems, sparse, hard, contenders)
        )
        hard, contenders = chosen or (hard if libraries else []), libraries or (contenders if chosen else [])
    findings = collection_run.examined(options.data, problems, console.print) if problems else pd.DataFrame()
    speed = qp_report.fast(sparse, console.print) if sparse else pd.DataFrame()
    cells = qp_report.compared(hard, contenders, console.print) if hard else {}
    where = machine()
    given = {"DATA": options.data and "folder", "LARGEST": options.largest}
    command = " ".join(["make bench-qp", *(f"{name}={value}" for name, value in given.items() if value)])
    note = f"{where['cpu']}, {where['cores']} cores, one thread; float64. Made by: `{command}`"
    page = qp_report.report(findings, speed, cells, note)
    console.print(page)
    if options.data and not options.only:
        artifacts = Artifacts(output_root("default"))
        artifacts.write("bench/qp.md", page.encode())
        artifacts.csv("bench/qp", findings)
        for line in artifacts.lines():
            console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
