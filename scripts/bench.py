"""Measure every layer against its peers, in the same run, and write the table of targets, all numbers and a figure."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from rich.console import Console

from experiments.benchmark import report
from experiments.benchmark.layers import LAYERS
from experiments.sweep import studies


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench.py", description=__doc__)
    parser.add_argument("--layer", action="append", choices=LAYERS, help="default: all")
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="how long it is measured")
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and as many as there are cores")
    parser.add_argument("--no-cuda", action="store_true", help="leave the GPU out, where there is one")
    options = parser.parse_args(arguments)
    console = Console()
    names = options.layer or list(LAYERS)
    threads = sorted(set(options.threads or (1, os.cpu_count() or 1)))
    command = "make bench" + ("" if options.profile == "default" else f" PROFILE={options.profile}")
    command += f' THREADS="{" ".join(map(str, threads))}"' if options.threads else ""
    if options.layer or options.no_cuda:  # which make bench does not offer
        command = " ".join(["python -m scripts.bench", *(arguments or sys.argv[1:])])
    gpu = None if options.no_cuda or not torch.cuda.is_available() else torch.cuda.get_device_name()
    artifacts, _ = report.make(options.profile, names, threads, command, gpu)
    for table in ("targets", *(["cuda"] if gpu else [])):
        text = (artifacts.root / "bench" / f"{table}.md").read_text()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for line in artifacts.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
