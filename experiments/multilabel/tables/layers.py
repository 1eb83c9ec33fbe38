"""Table of the layers of the multilabel study: errors of their solutions and gradients, and times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.contracts.task import Samples
from experiments.multilabel.task import MultilabelTask
from experiments.report.markdown import number
from experiments.report.measurements import measured_once, timed_gradient
from experiments.report.outputs import Measurement
from experiments.run import components, configuration
from foldopt.errors import SolverError

BASE = ["task=multilabel", "model=densenet", "task.data=stand_in", "task.n_train=2", "task.n_val=1", "task.n_test=1"]
FOLD = ["backend=fold", "backend.forward=cvxpy"]
# Title and overrides of each layer. Layers whose forward pass is cvxpy's differ only in the backward pass.
LAYERS: Mapping[str, tuple[str, list[str]]] = {
    "exact": ("exact", ["backend=exact"]),
    "fold_exact": ("f-PGD, exact forward", ["backend=fold"]),
    "unfold": ("unfolded PGD, exact forward, 100 iterations", ["backend=unfold"]),
    "pgd": ("f-PGD", [*FOLD, "backend.optimizer=pgd"]),
    "pgd_lfpi": ("f-PGD, by LFPI", [*FOLD, "backend.optimizer=pgd", "linear_solver=lfpi"]),
    "pgd_a": ("f-PGDa, projecting with qpth", [*FOLD, "backend.optimizer=pgd_a"]),
    "pgd_b": ("f-PGDb, projecting with folded ADMM", [*FOLD, "backend.optimizer=pgd_b"]),
    "sqp": ("f-SQP", [*FOLD, "backend.optimizer=sqp"]),
    "cvxpylayers": ("cvxpylayers (Clarabel)", ["backend=cvxpylayers"]),
    "cvxpylayers_scs": ("cvxpylayers (SCS, its default)", ["backend=cvxpylayers", "backend.solver=SCS"]),
}
REFERENCE = "exact"
SLOW = ("pgd_a", "pgd_b", "cvxpylayers", "cvxpylayers_scs")


@dataclass(frozen=True)
class Settings:
    """Size of the measurement.

    Attributes:
        temperatures: Values of tau.
        repeats: Number of calls of each layer.
        batch_size: Number of samples.
        peak: What is added to the feature of a sample's class, and to those of the 5 classes of its group, as if the
            network had been trained.
        seed: Seed of the features.
    """

    temperatures: tuple[float, ...] = (1.0, 0.05)
    repeats: int = 3
    batch_size: int = 64
    peak: tuple[float, float] = (6.0, 2.0)
    seed: int = 0


PROFILES = {"smoke": Settings((1.0,), repeats=1, batch_size=2), "default": Settings(), "paper": Settings(repeats=5)}


class Bench:
    """One batch of features like those of a trained network, on which layers are measured at one temperature."""

    def __init__(self, settings: Settings, temperature: float) -> None:
        self.place = [*BASE, f"task.temperature={temperature}"]
        generator = torch.Generator().manual_seed(settings.seed)
        seen, drawn = torch.randint(100, (2, settings.batch_size), generator=generator)
        labels = torch.where(drawn < 30, seen, seen // 5 * 5 + drawn % 5)
        own, group = settings.peak
        features = torch.randn(settings.batch_size, 100, generator=generator, dtype=torch.float64)
        classes = torch.arange(100)
        features += group * (classes // 5 == seen[:, None] // 5) + own * F.one_hot(seen, 100)
        self.features, self.samples = features, {"labels": labels}
        parts = components.build(configuration.compose([*self.place, "backend=exact"]))
        self.task = cast(MultilabelTask, parts.task)

    def layer(self, name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[], int]]:
        """Return the layer from features to log x, and a function that returns its number of new failures."""
        parts = components.build(configuration.compose([*self.place, *LAYERS[name][1]]))
        samples: Samples = self.samples
        return lambda z: parts.backend(parts.task.parameters(z, samples)), parts.backend.take_failures

    def call(self, layer: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, float, float]:
        """Return x, the gradient with respect to the features, and the seconds of the forward and the backward pass."""
        leaf = self.features.clone().requires_grad_()
        log_x, gradient, forward, backward = timed_gradient(layer, leaf, self.loss)
        return log_x.exp(), gradient, forward, backward

    def loss(self, log_x: Tensor) -> Tensor:
        """Return the training loss of log x."""
        return self.task.decision_losses(log_x, self.samples).mean()

    def at_bound(self) -> float:
        """Return the share of samples with an x at its bound 1."""
        found = self.task.problem.exact(self.task.parameters(self.features, self.samples))
        return float((~found.free).any(1).double().mean())


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per temperature, layer and repetition; the layers take turns after a first call of each.

    SLOW layers are measured once, with a first call, which imports modules, only at the first temperature. A layer that
    raises an error has neither errors nor times, and counts as failed for all samples.
    """
    rows = []
    for temperature in settings.temperatures:
        bench = Bench(settings, temperature)
        layers = {name: bench.layer(name) for name in LAYERS}
        place = {"temperature": temperature, "at_bound": bench.at_bound()}
        exact = bench.call(layers[REFERENCE][0])[:2]
        for repeat in range(settings.repeats + 1):
            for name, (layer, failures) in layers.items():
                warm = repeat or temperature == settings.temperatures[0]
                if name in SLOW and (repeat > 1 or not warm):
                    continue
                row = {**place, "layer": name, **_measured(bench, layer, exact)}
                row["failures"] = failures() / settings.batch_size if "error_x" in row else 1.0
                if repeat:
                    rows.append(row)
    return pd.DataFrame(rows)


def _measured(bench: Bench, layer: Callable[[Tensor], Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    try:
        x, gradient, forward, backward = bench.call(layer)
    except SolverError:
        return {}
    return {
        "seconds_forward": forward,
        "seconds_backward": backward,
        "error_x": float((x - exact[0]).abs().max()),
        "error_gradient": float((gradient - exact[1]).norm() / exact[1].norm()),
    }


def make(measurement: Measurement) -> None:
    """Write tables/topk_layers.csv and .md, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("multilabel/layers", settings, measure, {k: v for k, (_, v) in LAYERS.items()})
    table = rows.groupby(["temperature", "layer"], sort=False).median().reset_index()
    measurement.artifacts.csv("tables/topk_layers", table)
    bounds = table.groupby("temperature", sort=False)["at_bound"].first()
    said = ", ".join(f"{share:.0%} at τ = {temperature:g}" for temperature, share in bounds.items())
    measurement.artifacts.markdown(
        "tables/topk_layers",
        ("τ", "Layer", "Forward (ms)", "Backward (ms)", "Error of x*", "Error of the gradient", "Without a gradient"),
        _rows(table),
        f"One batch of {settings.batch_size} features like those of a trained network, float64, one thread, medians "
        f"of {settings.repeats} rounds (qpth, ADMM and cvxpylayers: 1) in which the layers take turns. The forward "
        f"pass is cvxpy's with Clarabel unless another is named. Samples with an indicator at its bound: {said}. "
        "Errors are those from exact: the largest of x*, and the relative one of the gradient of the study's loss, in "
        "which samples without a certified gradient count as zero. –: the layer raised an error. "
        f"Made by: `{measurement.command}`",
    )


def _rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for row in table.itertuples():
        yield [
            f"{row.temperature:g}",
            LAYERS[row.layer][0],
            number(1e3 * row.seconds_forward, ".3g", "–"),
            number(1e3 * row.seconds_backward, ".3g", "–"),
            number(row.error_x, ".0e", "–"),
            number(row.error_gradient, ".0e", "–"),
            f"{row.failures:.0%}",
        ]
