"""Write the report from the figures and tables that are there: REPORT.md and report.html."""

from __future__ import annotations

import argparse
import sys

from experiments.report import page as report
from experiments.sweep import studies


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/report.py", description=__doc__)
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="whose results")
    options = parser.parse_args(arguments)
    print("\n".join(report.make(options.profile).lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
