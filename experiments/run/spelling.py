"""Finds misspelt keys in ``key=value`` arguments, and suggests the key that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig

from experiments.run.configuration import CONF, load_yaml


def meant(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the known name closest to `name`, or the list of known names if none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."


def misspelt(arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the first misspelt key among the arguments of ``run.py``; None if every key exists.

    Values and Hydra's own settings are checked by Hydra, and so is every key if --config-dir adds groups.
    """
    if any(argument.startswith("--config") or argument in ("-cd", "-cn", "-cp") for argument in arguments):
        return None
    overrides = dict(argument.split("=", 1) for argument in arguments if "=" in argument and argument[0] not in "-+~")
    config = load_yaml(CONF / "config.yaml")
    groups = {group: name for default in config.pop("defaults") for group, name in _choice(default)}
    known = {*groups, *_keys(config)}
    for group, name in groups.items():
        chosen = overrides.get(group, name).split(",")
        files = [CONF / group / f"{option.strip()}.yaml" for option in chosen]
        known |= {f"{group}.{key}" for file in files for key in _keys_of(file)}
    for key in overrides:
        node, _, last = key.rpartition(".")
        if key in known or key.startswith("hydra") or any(key.startswith(f"{k}.") for k in known - _parents(known)):
            continue
        if node in groups and _keys_missing(node, overrides.get(node, groups[node])):
            continue  # the chosen option does not exist, for which Hydra lists those that do
        if node in _parents(known):
            inside = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == node}
            where = f"{node}={overrides.get(node, groups[node])}" if node in groups else node or "the configuration"
            return f"{key}: {where} has no key {last!r}; {meant(last, inside)}"
        return f"{key}: there is no such key; {meant(key, known)}"
    return None


def _choice(default: str | DictConfig) -> Iterator[tuple[str, str]]:
    if isinstance(default, DictConfig):
        yield from ((str(group), name) for group, name in default.items() if not str(group).startswith("override "))


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a configuration, including those of inner nodes."""
    for name, value in node.items():
        key = str(name)
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")


def _keys_of(file: Path) -> list[str]:
    return list(_keys(load_yaml(file))) if file.is_file() else []


def _keys_missing(group: str, chosen: str) -> bool:
    return not any((CONF / group / f"{option.strip()}.yaml").is_file() for option in chosen.split(","))


def _parents(known: set[str]) -> set[str]:
    return {"", *(key.rpartition(".")[0] for key in known)}
