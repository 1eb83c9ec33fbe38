"""From configuration to objects: tasks, models, backends and linear solvers, wherever their code lives.

Each YAML of conf/task, conf/model, conf/backend, conf/linear_solver and conf/optimizer names its class as
``_target_``; all other keys but ``name`` are arguments of it. A class outside this package needs no more than that and
a place in the search path.
"""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.contracts.backend import TRAINS_ON, Backend
from experiments.contracts.base import ContractError, dotted, require_attributes, require_contract
from experiments.contracts.model import Model
from experiments.contracts.problem import Problem
from experiments.contracts.task import Task
from experiments.run.checkpoint import load
from experiments.run.configuration import group_options, load_yaml
from experiments.run.spelling import meant
from foldopt.checks import require_type
from foldopt.errors import FoldoptError, InputError


class CombinationError(InputError):
    """The chosen backend cannot work on the chosen task; says why, and which backends can."""


@dataclass
class Components:
    """What a run is made of."""

    task: Task
    model: Model
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
    settings: Any = OmegaConf.to_container(node, resolve=True)
    options: dict[str, Any] = {k: v for k, v in settings.items() if k not in ("_target_", "name")}
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
    except Exception as error:  # whatever a class from outside raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{group}={node.get('name')}: {dotted(target)} refuses its settings {options}: "
            f"{type(error).__name__}: {error} (line {place.lineno} of {Path(place.filename).name})"
        ) from error


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # annotations of names that are imported for type checkers only
        return inspect.signature(target)


def build(cfg: DictConfig) -> Components:
    """Build task, model and backend of a run.

    Raises InputError for options that do not fit a class, CombinationError for a backend that cannot do the task.
    """
    task = _task(cfg)
    chosen = target_of(cfg.backend, "backend")
    require_contract(chosen, Backend, f"backend={cfg.backend.name}")
    reason = chosen.unsuitable(task)
    if reason:
        able = [name for name, node in group_options("backend").items() if not target_of(node, name).unsuitable(task)]
        raise CombinationError(
            f"backend={cfg.backend.name} cannot do task={cfg.task.name}: {reason}. "
            f"Backends that can: {', '.join(able) or 'none'}."
        )
    solver = make(cfg.linear_solver, "linear_solver")
    backend = make(cfg.backend, "backend", task=task, linear_solver=solver)
    if backend.trains_on not in TRAINS_ON:
        raise ContractError(f"{dotted(chosen)}.trains_on={backend.trains_on!r} is unknown; choose one of {TRAINS_ON}.")
    if backend.trains_on == "surrogate" and backend.lacks("losses"):
        raise ContractError(f"{dotted(chosen)} trains on its own loss, but {backend.lacks('losses')}; add it.")
    model = make(cfg.model, "model", n_inputs=task.n_inputs, n_outputs=task.n_outputs)
    if not isinstance(model, nn.Module):
        raise ContractError(
            f"model={cfg.model.name}: {dotted(type(model))} is no torch.nn.Module; derive it from that."
        )
    _require_fit(cfg, task, model)
    return Components(task, model, backend)


def task_class(cfg: DictConfig) -> type[Task]:
    """Return the class of a run's task. Raises ContractError for one that lacks what the trainer needs of a class."""
    target = target_of(cfg.task, "task")
    group = f"task={cfg.task.name}"
    require_contract(target, Task, group)
    for name in ("objective", "columns"):
        if not hasattr(target, name):
            raise ContractError(
                f"{group}: {dotted(target)} does not declare {name}; set it in the class, such as "
                'objective = "regret" and columns = ("regret",).'
            )
    if target.objective not in ("loss", *target.columns):
        raise ContractError(
            f"{group}: the objective {target.objective!r} of {dotted(target)} is none of its columns {target.columns}; "
            "add it there."
        )
    return target


def _task(cfg: DictConfig) -> Task:
    task_class(cfg)
    task: Task = make(cfg.task, "task", seed=cfg.seed)
    require_attributes(task, Task, f"task={cfg.task.name}")
    if not isinstance(task.problem, Problem):
        raise ContractError(
            f"task={cfg.task.name}: {dotted(type(task.problem))} is no Problem; derive it from {dotted(Problem)}."
        )
    for split in ("train", "val", "test"):
        if "inputs" not in task.splits.get(split, {}):
            raise ContractError(
                f"task={cfg.task.name}: splits of {dotted(type(task))} have no {split!r} with 'inputs'; add it."
            )
    return task


@torch.no_grad()
def _require_fit(cfg: DictConfig, task: Task, model: Model) -> None:
    """Raise CombinationError unless the model takes the task's inputs, and the task what it returns for them."""
    samples = {name: values[:2] for name, values in task.splits["val"].items()}
    model.eval()
    try:
        task.parameters(model(task.prepare(samples["inputs"], None)), samples)
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
        parts = build(load_yaml(folder / "config.yaml"))
        load(folder / "checkpoint.pt", {"model": parts.model})
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no trained model ({error}); run this configuration first.") from error
    parts.model.eval()
    return parts
