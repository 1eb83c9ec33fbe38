"""One run: ``python run.py task=portfolio backend=fold``; ``python run.py --help`` lists all there is to choose."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.run import folders
from experiments.run.execution import execute
from experiments.run.interruption import STOP_CODES
from experiments.run.spelling import misspelt
from experiments.run.summary import best_validation
from experiments.sweep import slurm


class RunFailed(Exception):  # noqa: N818
    """A run of a sweep ended with an exit code other than 0; the sweep goes on with the others."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Execute the run; as a part of a sweep return its best validation, which a search minimizes."""
    code = execute(cfg)
    if code in STOP_CODES and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        slurm.requeue()
    swept = HydraConfig.get().mode == RunMode.MULTIRUN
    if code in STOP_CODES or (code and not swept):
        sys.exit(code)
    if code:
        raise RunFailed(f"exit code {code}, see {folders.of(cfg)}")
    return best_validation(cfg) if swept else None


if __name__ == "__main__":
    if wrong := misspelt(sys.argv[1:]):
        sys.exit(f"error: {wrong}")
    main()
