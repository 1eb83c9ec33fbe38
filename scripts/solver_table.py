"""Measure accuracy and time of the portfolio solvers and write the table."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from experiments import studies
from experiments.reproduction import make_solver_table


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/solver_table.py", description=__doc__)
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="size of the measurement")
    options = parser.parse_args(arguments)
    make_solver_table(options.profile, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
