"""Make figures and tables of the studies from the run folders alone, or check those in results/; nothing is trained."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from experiments.report.reproduction import make_figures
from experiments.report.verification import verify
from experiments.run.settings import TRACKING_MODES
from experiments.sweep import studies
from scripts import study_options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the figures; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/figures.py", description=__doc__)
    available = study_options.available(arguments)
    parser.add_argument("--study", action="append", choices=available, help="default: all")
    study_options.add_config_dir(parser)
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="size of the studies")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where results/ has other numbers")
    parser.add_argument("--tracking", choices=TRACKING_MODES, help="log them to W&B; default: as the study says")
    options = parser.parse_args(arguments)
    names = [available[name] for name in options.study or available]
    if options.check:
        return verify(names, options.profile, Console())
    return make_figures(names, options.profile, Console(), options.tracking)


if __name__ == "__main__":
    sys.exit(main())
