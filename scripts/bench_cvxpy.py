"""Put CvxpyLayer and cvxpylayers to the same kinds of problems; write results/bench/cvxpy.md."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from rich.console import Console

from experiments.benchmark import cvxpy_report
from experiments.benchmark.cvxpy_kinds import KINDS
from experiments.benchmark.report import machine
from experiments.report.artifacts import Artifacts, output_root


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench_cvxpy.py", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(KINDS), help="a kind of problem; nothing is written")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    contenders = cvxpy_report.installed()
    errors = cvxpy_report.compared(options.only or list(KINDS), contenders, console.print)
    if options.only:
        return 0
    times = cvxpy_report.timed(contenders, console.print)
    made = cvxpy_report.sizes(contenders, console.print)
    where = machine()
    note = f"{where['cpu']}, {where['cores']} cores, one thread; float64. Made by: `make bench-cvxpy`"
    artifacts = Artifacts(output_root("default"))
    artifacts.write("bench/cvxpy.md", cvxpy_report.report(errors, times, made, contenders, note).encode())
    for line in artifacts.lines():
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
