"""Table of the layer's share of a training step of the multilabel study: DenseNet 40-40, one batch."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from experiments.report.measurements import measured_once, seconds
from experiments.report.outputs import Measurement
from experiments.run import components
from experiments.run.components import make as make_component
from experiments.run.configuration import compose
from experiments.run.settings import resolve_device

LAYERS: Mapping[str, tuple[str, list[str]]] = {
    "exact": ("exact", ["backend=exact"]),
    "fold": ("f-PGD, exact forward", ["backend=fold"]),
    "sqp": ("f-SQP, exact forward", ["backend=fold", "backend.optimizer=sqp"]),
    "fold_cvxpy": ("f-PGD, cvxpy forward", ["backend=fold", "backend.forward=cvxpy"]),
    "cvxpylayers": ("cvxpylayers (Clarabel)", ["backend=cvxpylayers"]),
}
IMAGES = 45_000  # number of training images of the paper's study


@dataclass(frozen=True)
class Settings:
    """The network, and the number `repeats` of measured steps per layer, after a first one that is not counted."""

    depth: int = 40
    growth: int = 40
    batch_size: int = 64
    repeats: int = 2
    device: str = "auto"


PROFILES = {
    "smoke": Settings(depth=10, growth=4, batch_size=8, repeats=1),
    "default": Settings(),
    "paper": Settings(repeats=20),
}


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per layer and step: seconds of the network with its optimizer, and seconds of the layer.

    In each step all layers get the same outputs of the network, which is updated with the gradient of the first layer.
    """
    device = resolve_device(settings.device)
    size = [f"task.n_train={settings.batch_size}", "task.n_val=1", "task.n_test=1", "task.data=stand_in"]
    network = [f"model.depth={settings.depth}", f"model.growth={settings.growth}"]
    base = ["task=multilabel", "model=densenet", "optimizer=sgd", *size, *network]
    built = {name: components.build(compose([*base, *overrides])) for name, (_, overrides) in LAYERS.items()}
    model, task = built["exact"].model.to(device).train(), built["exact"].task
    task.to(device)
    samples = task.splits["train"]
    optimizer = make_component(compose(base).optimizer, "optimizer", params=model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for repeat in range(settings.repeats + 1):
        outputs, forward = seconds(lambda: model(task.prepare(samples["inputs"], generator)))
        taken = {}
        for name, parts in built.items():
            taken[name] = seconds(partial(_gradient, parts.backend, task, outputs.detach().requires_grad_()))
        gradient = next(iter(taken.values()))[0]
        _, backward = seconds(partial(_update, optimizer, outputs, gradient))
        if repeat:
            rows += [
                {"layer": name, "seconds_network": forward + backward, "seconds_layer": own}
                for name, (_, own) in taken.items()
            ]
    return pd.DataFrame(rows)


def _gradient(backend: Backend, task: Task, outputs: Tensor) -> Tensor:
    """Return the gradient of the training loss with respect to the network's outputs, through the layer."""
    samples = task.splits["train"]
    log_x = backend(task.parameters(outputs, samples))
    return torch.autograd.grad(task.decision_losses(log_x, samples).mean(), outputs)[0]


def _update(optimizer: torch.optim.Optimizer, outputs: Tensor, gradient: Tensor) -> None:
    """Update the network, given the gradient with respect to its outputs."""
    optimizer.zero_grad(set_to_none=True)
    outputs.backward(gradient)
    optimizer.step()


def make(measurement: Measurement) -> None:
    """Write tables/layer_share.csv and .md, measuring once per profile and device."""
    settings, device = measurement.settings(PROFILES), device_name()
    rows = measured_once("multilabel/layer-share", settings, measure, device, {k: v for k, (_, v) in LAYERS.items()})
    table = rows.groupby("layer", sort=False).median().reset_index()
    measurement.artifacts.csv("tables/layer_share", table)
    where = "one thread of a CPU" if device.startswith("cpu") else device
    measurement.artifacts.markdown(
        "tables/layer_share",
        ("Layer", "Network (ms)", "Layer (ms)", "Layer's share", "Images per second", f"Epoch of {IMAGES} (min)"),
        _rows(table, settings.batch_size),
        f"A training step of DenseNet {settings.depth}-{settings.growth}, batches of {settings.batch_size} stand-in "
        f"images, not CIFAR-100, on {where}; medians of {settings.repeats}. Network: forward, backward and optimizer; "
        f"layer: forward and backward. Made by: `{measurement.command}`",
    )


def device_name() -> str:
    """Return the name of the GPU, or of the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.processor() or platform.machine()}"


def _rows(table: pd.DataFrame, batch_size: int) -> Iterator[list[str]]:
    for row in table.itertuples():
        step = row.seconds_network + row.seconds_layer
        yield [
            LAYERS[row.layer][0],
            f"{1e3 * row.seconds_network:.3g}",
            f"{1e3 * row.seconds_layer:.3g}",
            f"{row.seconds_layer / step:.2%}",
            f"{batch_size / step:.3g}",
            f"{IMAGES / batch_size * step / 60:.3g}",
        ]
