"""The configuration of a run: composed from conf/ and overrides, and the identity that follows from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from foldopt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
NOT_IDENTITY = ("device", "deterministic", "paths", "progress", "tracking")
# Keys that came after runs had been made without them, and the value that says the same as their absence. It is the
# default of the argument too, so that those runs can still be built.
ADDED: Mapping[str, Any] = {
    "backend.forward_tol": None,
    "task.csv": None,
    "task.digest": None,
    "task.date": None,
    "task.returns": None,
    "task.features": None,
    "task.max_gap": None,
    "task.lags": 1,
    "task.feature_lag": 1,
    "task.val_share": 0.15,
    "task.test_share": 0.3,
    "task.folds": 1,
    "task.fold": 0,
    "task.risk": 1.2,
}


def sha256_of_file(path: Any) -> str | None:
    """Return the SHA-256 of a file's content, None if it cannot be read or the path is no text."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if isinstance(path, str) else None
    return None


OmegaConf.register_new_resolver("sha256", sha256_of_file, replace=True)


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


def load_yaml(path: Path) -> DictConfig:
    """Return a YAML file of keys and values. Raises InputError for one that holds something else."""
    content = OmegaConf.load(path)
    if not isinstance(content, DictConfig):
        raise InputError(f"{path} holds a list; expected keys with values.")
    return content


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
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, absent in ADDED.items():
        group, _, name = key.partition(".")
        if content[group].get(name, absent) == absent:
            content[group].pop(name, None)
    kept = {key: _without_targets(value) for key, value in content.items() if key not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_targets(value: Any) -> Any:
    """Return a value of a configuration without `_target_`: a run stays the same run when its classes move."""
    if isinstance(value, dict):
        return {key: _without_targets(inner) for key, inner in value.items() if key != "_target_"}
    return value
