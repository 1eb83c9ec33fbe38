"""One run: ``python run.py task=portfolio backend=fold``; ``python run.py --help`` lists all there is to choose."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.run import folders
from experiments.run.execution import best_validation, execute
from experiments.run.interruption import STOP_CODES
from experiments.run.spelling import misspelt
from experiments.sweep import slurm


class RunFailed(Exception):  # noqa: N818
    """A run of a sweep ended with an exit code that is not 0; the others go on."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Execute the run; return its best validation, which a search minimizes."""
    code = execute(cfg)
    if code in STOP_CODES and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        slurm.requeue()
    if code in STOP_CODES or (code and HydraConfig.get().mode == RunMode.RUN):
        sys.exit(code)
    if code:
        raise RunFailed(f"exit code {code}, see {folders.of(cfg)}")
    return best_validation(cfg)


if __name__ == "__main__":
    if wrong := misspelt(sys.argv[1:]):
        sys.exit(f"error: {wrong}")
    main()
