"""Table of the solvers of the adjoint equation on the layers of all four studies: products, time and accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from torch import Tensor

from experiments.backends.layer import LayerBackend
from experiments.contracts.problem import Parameters
from experiments.contracts.task import Task
from experiments.denoising.problem import differencing
from experiments.report.measurements import measured_once, seconds
from experiments.report.outputs import Measurement
from experiments.run import components
from experiments.run.configuration import compose
from foldopt.linear_solve import LinearSolveInfo

MULTILABEL = ["task=multilabel", "task.data=stand_in", "model=densenet", "model.depth=10", "model.growth=4"]
# Title and overrides of each layer.
LAYERS: Mapping[str, tuple[str, list[str]]] = {
    "portfolio": ("portfolio, f-SQP", ["task=portfolio"]),
    "bilinear": ("bilinear, f-PGD", ["task=bilinear", "task.kappa=0.9", "task.n_variables=50"]),
    "denoising": ("denoising, f-FDPG", ["task=denoising", "model=operator"]),
    "multilabel": ("multilabel, f-PGD, τ = 1", [*MULTILABEL, "task.temperature=1"]),
    "multilabel_saturated": (
        "multilabel, f-PGD, τ = 0.05",
        [*MULTILABEL, "task.temperature=0.05"],
    ),
}
SOLVERS = ("lfpi", "anderson", "gmres", "bicgstab", "direct", "least_squares", "auto")
REFERENCE = "direct"


@dataclass(frozen=True)
class Settings:
    """Size of the measurement; noise is added to the parameters, relative to their standard deviation."""

    repeats: int = 5
    batch_size: int = 32
    noise: float = 0.3
    seed: int = 0


PROFILES = {"smoke": Settings(repeats=1, batch_size=4), "default": Settings(), "paper": Settings(repeats=15)}


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per layer, solver and repetition; the solvers take turns, and their first calls do not count."""
    rows = []
    size = [f"task.n_train={settings.batch_size}", "task.n_val=1", "task.n_test=1", "backend=fold"]
    for name, (_, overrides) in LAYERS.items():
        built = {
            solver: components.build(compose([*overrides, *size, f"linear_solver={solver}"])) for solver in SOLVERS
        }
        task = built[REFERENCE].task
        leaves = parameters_in_training(task, settings.noise, torch.Generator().manual_seed(settings.seed))
        exact: Tensor | None = None
        for repeat in range(settings.repeats + 1):
            for solver in sorted(SOLVERS, key=lambda solver: solver != REFERENCE):
                backend = cast(LayerBackend, built[solver].backend)
                gradient, backward, info = _called(backend, task, leaves)
                exact = gradient if exact is None else exact
                if repeat:
                    rows.append(
                        {
                            "layer": name,
                            "solver": solver,
                            "products": float(info.iterations.double().mean()),
                            "solved": float(info.ok.double().mean()),
                            "seconds_backward": backward,
                            "error": float((gradient - exact).norm() / exact.norm()),
                        }
                    )
    return pd.DataFrame(rows)


def parameters_in_training(task: Task, noise: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return parameters for a task's training samples, like those that a network predicts during training.

    They are the true parameters plus `noise` times their standard deviation times standard normal numbers. Where a task
    has no true parameters, they are random logits; where it learns one operator, the differencing operator plus noise.
    """
    samples = task.splits["train"]
    if task.shared:
        D = differencing(task.n_inputs)
        return D + 0.02 * torch.randn(D.shape, generator=generator, dtype=D.dtype), samples["noisy"]
    if task.lacks("truth"):
        z = torch.randn(len(samples["labels"]), task.n_outputs, generator=generator, dtype=torch.float64)
        return (task.parameters(z, samples),)
    truth = task.truth(samples)
    known = truth if isinstance(truth, tuple) else (truth,)
    return tuple(t + noise * t.std() * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in known)


def _called(backend: LayerBackend, task: Task, parameters: tuple[Tensor, ...]) -> tuple[Tensor, float, LinearSolveInfo]:
    """Return the gradient, the seconds of the backward pass, and what the solver of the adjoint equation reports."""
    leaves = tuple(p.clone().requires_grad_() for p in parameters)
    given: Parameters = leaves if len(leaves) > 1 else leaves[0]
    losses = task.decision_losses(backend(given), task.splits["train"])
    gradients, backward = seconds(lambda: torch.autograd.grad(losses.mean(), leaves))
    last = backend.layer.last
    info = None if last is None else last.backward
    assert info is not None, "the layer has just run forward and backward"
    backend.take_failures()
    return torch.cat([g.flatten() for g in gradients]), backward, info


def make(measurement: Measurement) -> None:
    """Write tables/linear_solvers.csv and .md, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("linear-solvers", settings, measure, {k: v for k, (_, v) in LAYERS.items()})
    table = rows.groupby(["layer", "solver"], sort=False).median().reset_index()
    measurement.artifacts.csv("tables/linear_solvers", table)
    measurement.artifacts.markdown(
        "tables/linear_solvers",
        ("Layer", "Solver", "Products with Φ", "Solved", "Backward (ms)", "Error of the gradient"),
        _rows(table),
        f"One batch of {settings.batch_size} samples, float64, one thread, medians of {settings.repeats} rounds in "
        "which the solvers take turns. Products with Φ and solved: means over the samples. Errors are relative to a "
        "direct solve; samples that are not solved have no gradient. `auto` takes closed forms where the step has "
        f"them. Made by: `{measurement.command}`",
    )


def _rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for name, (title, _) in LAYERS.items():
        part = table[table["layer"] == name].set_index("solver")
        for solver in SOLVERS:
            row = part.loc[solver]
            yield [
                title,
                f"`{solver}`",
                f"{row['products']:.3g}",
                f"{row['solved']:.0%}",
                f"{1e3 * row['seconds_backward']:.3g}",
                f"{row['error']:.0e}",
            ]
