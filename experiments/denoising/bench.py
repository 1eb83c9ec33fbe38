"""Times and errors of layers on one batch of the denoising study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
from torch import Tensor

from experiments.contracts.task import Samples
from experiments.denoising.problem import DenoisingStep
from experiments.denoising.task import DenoisingTask
from experiments.report.measurements import LAST_BITS, timed_gradient
from experiments.run import components, configuration
from experiments.run.components import Components
from foldopt import fold

Layer = Callable[[Tensor], Tensor]
STUDY = "figure_4b"
REFERENCE = "fold"
OVERRIDES: Mapping[str, list[str]] = {
    "fold": ["backend=fold"],
    "fold_fdpg": ["backend=fold", "backend.forward=fdpg"],
    "unroll": ["backend=unroll", "backend.iterations=300", "backend.tol=1e6"],
    "qpth": ["backend=qpth"],
    "qpth_float32": ["backend=qpth", "backend.dtype=float32", "backend.ridge=1e-4", "backend.eps=1e-6"],
    "cvxpylayers": ["backend=cvxpylayers"],
}


@dataclass(frozen=True)
class Settings:
    """Size of the measurement.

    Attributes:
        profile: The profile of the study whose readings of the data and lambdas are measured.
        repeats: Number of calls of each layer.
        batch_size: Number of signals.
        learned: Standard deviation of the noise that is added to D, as if D had been trained.
        seed: Seed of the data and of that noise.
    """

    profile: str
    repeats: int = 2
    batch_size: int = 32
    learned: float = 0.02
    seed: int = 0


class Bench:
    """One batch of signals and one operator D, on which layers are measured.

    Args:
        overrides: The overrides of a run of the study; those of the backend are left out.
        settings: The size of the measurement.
    """

    def __init__(self, overrides: list[str], settings: Settings) -> None:
        self.place = [part for part in overrides if not part.startswith("backend")]
        parts = self.built("fold")
        self.task = cast(DenoisingTask, parts.task)
        self.samples: Samples = {k: v[: settings.batch_size] for k, v in self.task.splits["train"].items()}
        start = parts.model(self.samples["inputs"]).detach()
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        self.D = start + settings.learned * noise
        self.before = start
        self.turn = count()

    def built(self, name: str) -> Components:
        """Build the components of the run with the backend `name` of OVERRIDES."""
        return components.build(configuration.compose([*self.place, *OVERRIDES[name]]))

    def layer(self, name: str) -> Layer:
        """Return the layer `name`, a function from D to the denoised signals."""
        if name == "fold_warm":
            return self._warm()
        parts = self.built(name)
        return lambda D: parts.backend(parts.task.parameters(D, self.samples))

    def _warm(self) -> Layer:
        """Return folding around the exact solver, which starts from the dual solution for D without noise."""
        problem, d = self.task.problem, self.samples["noisy"]
        memory = problem.exact(self.before, d).w
        folded = fold(lambda D, d, _: problem.exact(D, d, warm=memory).w, DenoisingStep(), dtype=torch.float64)

        def layer(D: Tensor) -> Tensor:
            params = problem.params((D, d))
            return problem.decisions(folded(*params), *params)

        return layer

    def loss(self, x: Tensor) -> Tensor:
        """Return the training loss of denoised signals."""
        return self.task.decision_losses(x, self.samples).mean()

    def call(self, layer: Layer) -> tuple[Tensor, Tensor, float, float]:
        """Return x, the gradient with respect to D, and the seconds of the forward and the backward pass."""
        leaf = (self.D * (1 + next(self.turn) * LAST_BITS)).requires_grad_()
        return timed_gradient(layer, leaf, self.loss)

    def errors(self, x: Tensor, gradient: Tensor, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Return the relative errors of x and of the gradient against the exact ones."""
        x_exact, g_exact = exact
        return {
            "error_x": float(((x - x_exact).norm(dim=1) / x_exact.norm(dim=1)).max()),
            "error_gradient": float((gradient - g_exact).norm() / g_exact.norm()),
        }
