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

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from experiments.run.checkpoint import load
from experiments.run.configuration import group_options
from experiments.run.spelling import meant
from foldopt.checks import require_type
from foldopt.errors import FoldoptError, InputError


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
    signature = _signature(target)
    try:
        signature.bind(**context, **options)
    except TypeError as error:
        takes = [name for name in signature.parameters if name not in context]
        unknown = next((name for name in options if name not in takes), None)
        guess = f" {unknown}: {meant(unknown, takes)}" if unknown else ""
        raise InputError(f"{group}={node.get('name')}: {error}; its keys are: {', '.join(takes)}.{guess}") from error
    for name, value in options.items():
        if name in signature.parameters:
            require_type(f"{group}.{name}", value, signature.parameters[name].annotation)
    try:
        return target(**context, **options)
    except FoldoptError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{group}={node.get('name')} refuses its settings {options}: {error}") from error


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # annotations of names that are imported for type checkers only
        return inspect.signature(target)


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
    _require_fit(cfg, task, model)
    return Components(task, model, backend)


@torch.no_grad()
def _require_fit(cfg: DictConfig, task: Task, model: nn.Module) -> None:
    """Raise CombinationError unless the model takes the task's inputs, and the task what it returns for them."""
    samples = {name: values[:2] for name, values in task.splits["val"].items()}
    prepare = getattr(task, "prepare", lambda inputs, _: inputs)
    model.eval()
    try:
        task.parameters(model(prepare(samples["inputs"], None)), samples)
    except (RuntimeError, InputError) as error:
        raise CombinationError(
            f"model={cfg.model.name} does not fit task={cfg.task.name}, whose inputs are of shape "
            f"{tuple(samples['inputs'].shape)} and which learns {task.n_outputs} outputs; choose another model: {error}"
        ) from error
    model.train()


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
