"""From configuration to objects: tasks, models, backends and linear solvers, wherever their code lives.

Each YAML of conf/task, conf/model, conf/backend, conf/linear_solver and conf/optimizer names its class as
``_target_``; all other keys but ``name`` are arguments of it. A class outside this package needs no more than that and
a place in the search path.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.backends import Backend
from experiments.checkpoint import load
from experiments.runs import group_options
from experiments.tasks import Task
from foldopt.errors import InputError


class CombinationError(InputError):
    """The chosen backend cannot work on the chosen task; says why, and which backends can."""


@dataclass
class Components:
    """What a run is made of."""

    task: Task
    model: nn.Module
    backend: Backend


def target_of(node: DictConfig, group: str) -> Any:
    """Return the class that a group's configuration names; InputError if there is none."""
    path = node.get("_target_")
    if not path:
        raise InputError(f"{group}: its configuration has no _target_, the dotted path of its class.")
    try:
        return get_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{group}._target_={path!r} cannot be imported: {error}") from error


def make(node: DictConfig, group: str, **context: Any) -> Any:
    """Make the object that a group's configuration describes; `context` adds arguments that no YAML can hold."""
    target = target_of(node, group)
    options = {k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k not in ("_target_", "name")}
    try:
        inspect.signature(target).bind(**context, **options)
    except TypeError as error:
        takes = ", ".join(name for name in inspect.signature(target).parameters if name not in context)
        raise InputError(f"{group}={node.get('name')}: {error}; its keys are: {takes}.") from error
    return target(**context, **options)


def build(cfg: DictConfig) -> Components:
    """Build task, model and backend of a run.

    Raises InputError for options that do not fit a class, CombinationError for a backend that cannot do the task.
    """
    task = make(cfg.task, "task", seed=cfg.seed)
    reason = target_of(cfg.backend, "backend").unsuitable(task)
    if reason:
        able = [name for name, node in group_options("backend").items() if not target_of(node, name).unsuitable(task)]
        raise CombinationError(
            f"backend={cfg.backend.name} cannot do task={cfg.task.name}: {reason}. "
            f"Backends that can: {', '.join(able) or 'none'}."
        )
    solver = make(cfg.linear_solver, "linear_solver")
    backend = make(cfg.backend, "backend", task=task, linear_solver=solver)
    model = make(cfg.model, "model", n_inputs=task.n_inputs, n_outputs=task.n_outputs)
    return Components(task, model, backend)


def trained(folder: Path) -> Components:
    """Build the parts of a run from its folder, the model with the weights of its last checkpoint, in eval mode.

    Raises InputError if the folder has no configuration or no checkpoint.
    """
    try:
        parts = build(OmegaConf.load(folder / "config.yaml"))
        load(folder / "checkpoint.pt", {"model": parts.model})
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no trained model ({error}); run this configuration first.") from error
    parts.model.eval()
    return parts
