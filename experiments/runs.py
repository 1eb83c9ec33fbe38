"""Runs: their configuration, identity and folder, and the one way to read what a folder holds.

A folder holds config.yaml, metrics.csv (one row per epoch and split), summary.json, checkpoint.pt, log.txt and, after
a failure, error.txt.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from foldopt.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
NOT_IDENTITY = ("device", "deterministic", "paths", "progress", "tracking")
COLUMNS = (
    "epoch",
    "split",
    "loss",
    "regret",
    "regret_percent",
    "mse",
    "top1",
    "top5",
    "operator_norm",
    "seconds_network",
    "seconds_solve",
    "seconds_backward",
    "seconds_epoch",
    "samples",
    "zero_gradient_fraction",
    "solver_failures",
    "adjoint_products",
    "prediction_scale",
    "spectral_radius",
    "global_fraction",
    "solver_timeouts",
    "gradient_error",
    "gradient_error_max",
    "bound_fraction",
)


def compose(overrides: list[str]) -> DictConfig:
    """Return the configuration of ``python run.py <overrides>``."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides)


def compose_launcher(name: str, settings: list[str]) -> DictConfig:
    """Return conf/hydra/launcher/<name>.yaml with `settings`, key=value each; InputError for an unknown key."""
    # ++ would add any key; additional_parameters is where there are new ones
    added = ["++" if setting.startswith("additional_parameters.") else "" for setting in settings]
    values = [f"{plus}hydra.launcher.{setting}" for plus, setting in zip(added, settings, strict=True)]
    overrides = [f"hydra/launcher={name}", *values]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra_compose("config", overrides, return_hydra_config=True).hydra.launcher
        except HydraException as error:
            raise InputError(f"{' '.join(settings)}: {error.__cause__ or error}") from error


def group_options(group: str) -> dict[str, DictConfig]:
    """Return every configuration of a group by name: those of conf/<group> and of the search path of this run."""
    if not GlobalHydra.instance().is_initialized():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return _options(GlobalHydra.instance().config_loader(), group)
    return _options(GlobalHydra.instance().config_loader(), group)


def _options(loader: ConfigLoader, group: str) -> dict[str, DictConfig]:
    repository = loader.repository  # type: ignore[attr-defined]
    return {name: repository.load_config(f"{group}/{name}").config for name in loader.get_group_options(group)}


def identity(cfg: DictConfig) -> str:
    """Return the hash of all that the numbers of a configuration depend on, so not where and how it is executed."""
    content = OmegaConf.to_container(cfg, resolve=True)
    kept = {key: value for key, value in content.items() if key not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def folder(cfg: DictConfig) -> Path:
    """Return the folder of a run; equal configurations share it."""
    name = f"{cfg.backend.name}-{cfg.model.name}-seed{cfg.seed}-{identity(cfg)[:12]}"
    return ROOT / cfg.paths.runs / cfg.task.name / name


def status(path: Path) -> str:
    """Return missing, interrupted, failed or finished."""
    if (path / "summary.json").is_file():
        return load_summary(path)["status"]
    begun = (path / "config.yaml").is_file() or (path / "checkpoint.pt").is_file()
    return "interrupted" if begun else "missing"


def load_summary(path: Path) -> dict[str, Any]:
    """Return summary.json of a run folder. Raises InputError where there is none that can be read."""
    try:
        return json.loads((path / "summary.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise InputError(f"{path / 'summary.json'} cannot be read ({error}); run this configuration first.") from error


def load_metrics(path: Path) -> pd.DataFrame:
    """Return metrics.csv of a run folder. Raises InputError where there is none."""
    try:
        return pd.read_csv(path / "metrics.csv")
    except FileNotFoundError as error:
        raise InputError(f"{path / 'metrics.csv'} does not exist; run this configuration first.") from error


def write_atomically(path: Path, content: str) -> None:
    """Write a text file so that a reader, or a kill, finds the old or the new content and nothing between."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
