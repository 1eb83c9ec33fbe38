"""From configuration to objects: tasks, models, backends, linear solvers and optimizers, from any package.

Each YAML of conf/task, conf/model, conf/backend, conf/linear_solver and conf/optimizer names its class as
``_target_``; all other keys except ``name`` are arguments of the class. A class of another package needs such a YAML
and a place on PYTHONPATH, no more.
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
from torch.optim import Optimizer

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
    """The chosen backend or model does not fit the chosen task; the message says why, and what fits."""


@dataclass
class Components:
    """The objects of a run, made from its configuration."""

    task: Task
    model: Model
    backend: Backend
    optimizer: Optimizer


def target_of(node: DictConfig, group: str) -> Any:
    """Return the class that a group's configuration names as _target_; InputError if it cannot be imported."""
    path = node.get("_target_")
    if not path:
        raise InputError(f"{group}: its configuration has no _target_, the dotted path of its class.")
    try:
        return get_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{group}._target_={path!r} cannot be imported: {error}") from error


def make(node: DictConfig, group: str, **context: Any) -> Any:
    """Make the object that a group's configuration describes.

    context: further arguments, which are objects and so cannot stand in a YAML. Raises InputError for settings that the
    class does not take or refuses.
    """
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
    except Exception as error:  # a class of another package may raise any type
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{group}={node.get('name')}: {dotted(target)} refuses its settings {options}: "
            f"{type(error).__name__}: {error} (line {place.lineno} of {Path(place.filename).name})"
        ) from error


def _signature(target: Any) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # an annotation has a name that is imported for type checkers only
        return inspect.signature(target)


def build(cfg: DictConfig, device: torch.device | str = "cpu") -> Components:
    """Build task, model, backend and optimizer of a run; task and model are moved to the device.

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
    _require_trainable(cfg.train, task, model)
    task.to(torch.device(device))
    model = model.to(device)
    optimizer = make(cfg.optimizer, "optimizer", params=model.parameters(), lr=cfg.train.lr)
    return Components(task, model, backend, optimizer)


def task_class(cfg: DictConfig) -> type[Task]:
    """Return the class of a run's task. Raises ContractError if it lacks a member that the trainer needs."""
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
    """Try two samples: raise CombinationError unless the model takes the inputs and the task takes its outputs."""
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


def _require_trainable(train: DictConfig, task: Task, model: Model) -> None:
    """Raise InputError for settings of the training that this task or this model cannot take."""
    if train.mse_epochs and task.lacks("prediction_losses"):
        raise InputError(f"train.mse_epochs={train.mse_epochs}: this task has no prediction error to train on; take 0.")
    size = min(train.batch_size, len(task.splits["train"]["inputs"]))
    if size == 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        raise InputError(
            f"train.batch_size={train.batch_size}: this model normalizes over the samples of a batch, and 1 "
            "is too few; take at least 2, and as many training samples."
        )


def trained(folder: Path) -> Components:
    """Build the components of a run from its folder, with the weights of its last checkpoint, in eval mode.

    Raises InputError if the folder has no configuration or no checkpoint.
    """
    try:
        parts = build(load_yaml(folder / "config.yaml"))
        load(folder / "checkpoint.pt", {"model": parts.model})
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no trained model ({error}); run this configuration first.") from error
    parts.model.eval()
    return parts
