"""Run every study (or those named), then make figures, tables and the report. Resumable: call it again after a stop."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from experiments.report import page as report
from experiments.report.reproduction import reproduce
from experiments.run.settings import TRACKING_MODES
from experiments.sweep import studies
from foldopt.errors import FoldoptError
from scripts import study_options


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and reproduce; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/reproduce.py", description=__doc__)
    available = study_options.available(arguments)
    parser.add_argument("--study", action="append", choices=available, help="default: all")
    study_options.add_config_dir(parser)
    parser.add_argument("--profile", choices=studies.PROFILES, help="size; default: by the hardware and data at hand")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument(
        "--tracking", choices=TRACKING_MODES, help="of the runs left to do, by W&B; default: the study's"
    )
    options = parser.parse_args(arguments)
    names = [available[name] for name in options.study or available]
    try:
        code = reproduce(names, options.profile, options.workers, Console(), options.tracking)
        if code < 128:  # not stopped
            print("\n".join(report.make(options.profile or "default", list(available.values())).lines()))
    except FoldoptError as error:
        sys.exit(f"error: {error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
