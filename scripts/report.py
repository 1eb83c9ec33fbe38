"""Write the report from the figures and tables that are there: REPORT.md and report.html."""

from __future__ import annotations

import argparse
import sys

from experiments.report import page as report
from experiments.sweep import studies
from foldopt.errors import FoldoptError
from scripts import study_options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/report.py", description=__doc__)
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="whose results")
    study_options.add_config_dir(parser)
    options = parser.parse_args(arguments)
    names = list(study_options.available(arguments).values())
    try:
        print("\n".join(report.make(options.profile, names).lines()))
    except FoldoptError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
