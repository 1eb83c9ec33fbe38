"""The configuration of a run, composed from the files of conf/ and overrides."""

from __future__ import annotations

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from foldopt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


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
    """Return a YAML file of keys and values. Raises InputError if it is no YAML or holds something else."""
    try:
        content = OmegaConf.load(path)
    except YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from error
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
