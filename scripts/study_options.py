"""What the scripts have in common: how studies, the user's own included, are named on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.sweep import studies
from foldopt.errors import InputError


def available(arguments: Sequence[str] | None) -> dict[str, str]:
    """Return the studies that can be named, see `studies.available`, with those of --config-dir among the arguments.

    arguments: None for those of the process. A folder without studies ends the process with the reason.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_config_dir(parser)
    try:
        return studies.available(parser.parse_known_args(arguments)[0].config_dir)
    except InputError as error:
        sys.exit(f"error: {error}")


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add --config-dir, the user's folder of configurations."""
    text = "your folder of configurations, with your studies in its folder study/"
    parser.add_argument("--config-dir", type=Path, metavar="FOLDER", help=text)
