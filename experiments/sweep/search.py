"""Hyperparameter search by Hydra's Optuna sweeper: keeps its trials and writes its best configuration to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.run import configuration, folders


class Search(Callback):
    """Hydra calls it around a search: it creates the folder of the trials, and at the end writes conf/tuned/."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the folder; end the process if it holds trials of a search that fixed other values.

        By SystemExit, because Hydra turns any other error of a callback into a warning.
        """
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        fixed = {"fixed": sorted(config.hydra.overrides.task)}
        record = folder / "fixed.yaml"
        if record.is_file() and OmegaConf.load(record) != OmegaConf.create(fixed):
            raise SystemExit(
                f"error: hydra.sweeper.study_name={config.hydra.sweeper.study_name}: its trials belong to a search "
                f"with {OmegaConf.load(record).fixed}; give this search another name: hydra.sweeper.study_name=..."
            )
        OmegaConf.save(OmegaConf.create(fixed), record)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the best parameters of the storage as a file for +tuned=<study_name>."""
        found = OmegaConf.load(Path(config.hydra.sweep.dir) / "optimization_results.yaml")
        path = write_tuned(config.hydra.sweeper.study_name, found.best_params, found.best_value)
        print(f"Best validation {found.best_value:.6g}; use it with: +tuned={path.stem}")


def write_tuned(name: str, params: DictConfig, value: float) -> Path:
    """Write conf/tuned/<name>.yaml, which sets `params` (options of groups, or values); return its path."""
    chosen = {str(key): value for key, value in params.items()}
    groups = [key for key in chosen if (configuration.CONF / key).is_dir()]
    content = OmegaConf.create({"defaults": [{f"override /{group}": chosen[group]} for group in groups]})
    for key in chosen.keys() - set(groups):
        OmegaConf.update(content, key, chosen[key])
    path = configuration.CONF / "tuned" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    header = f"# @package _global_\n# The best of a search: {value:.6g} on validation.\n"
    folders.write_atomically(path, header + OmegaConf.to_yaml(content, sort_keys=True))
    return path
