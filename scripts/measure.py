"""Measure what needs no training (accuracy, time, memory of layers) and write its table or figure."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from experiments.report.reproduction import measure, measurements
from experiments.sweep import studies
from foldopt.errors import FoldoptError
from scripts import study_options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/measure.py", description=__doc__)
    names = list(study_options.available(arguments).values())
    targets = measurements(names)
    parser.add_argument("target", choices=targets, help="what to measure; its make target has the same name")
    study_options.add_config_dir(parser)
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="size of the measurement")
    options = parser.parse_args(arguments)
    try:
        measure(options.target, options.profile, Console(), names)
    except FoldoptError as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
