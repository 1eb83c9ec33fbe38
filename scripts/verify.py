"""Check that the figures and tables in results/ are those of the run folders at hand."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from experiments import studies
from experiments.verification import verify


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and verify; return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/verify.py", description=__doc__)
    parser.add_argument("--study", action="append", choices=studies.names(), help="default: all")
    parser.add_argument("--profile", default="default", choices=studies.PROFILES, help="size of the studies")
    options = parser.parse_args(arguments)
    return verify(options.study or studies.names(), options.profile, Console())


if __name__ == "__main__":
    sys.exit(main())
