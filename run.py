"""One run: ``python run.py task=portfolio backend=fold``; ``python run.py --help`` lists all there is to choose."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from experiments.execution import execute
from experiments.interruption import STOP_CODES

exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Execute the run; a sweep goes on after a failed one, but not after a signal."""
    exit_codes.append(execute(cfg))
    if exit_codes[-1] in STOP_CODES:
        sys.exit(exit_codes[-1])


if __name__ == "__main__":
    main()
    sys.exit(max(exit_codes, default=0))
