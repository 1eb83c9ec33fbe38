"""The denoising task: learn the operator of a total variation denoiser (paper sections 6 and E.2)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from data.denoising import generate
from experiments.contracts.task import Samples, Task
from experiments.denoising.problem import DenoisingProblem
from foldopt.errors import InputError


class DenoisingTask(Task):
    """The denoising task on the signals of `data.denoising.generate`; the loss is the MSE of the denoised signals.

    Args:
        weight: The denoiser's lambda, above 0.
        seed, n_train, n_val, n_test, length, max_segments, low, high, noise: See `data.denoising.generate`.
    """

    shared: ClassVar[bool] = True
    objective: ClassVar[str] = "mse"
    columns: ClassVar[tuple[str, ...]] = ("mse", "operator_norm")
    problem: DenoisingProblem

    def __init__(
        self,
        seed: int,
        weight: float,
        n_train: int,
        n_val: int,
        n_test: int,
        length: int,
        max_segments: int,
        low: float,
        high: float,
        noise: float,
    ) -> None:
        drawn = generate(seed, n_train, n_val, n_test, length, max_segments, low, high, noise)
        self.problem = DenoisingProblem(weight, length)
        self.n_inputs, self.n_outputs = length, length - 1
        self.splits = {
            name: {"inputs": d.float(), "noisy": d, "signals": drawn.signals[name]} for name, d in drawn.noisy.items()
        }

    def parameters(self, outputs: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the operator (n - 1, n) and the noisy signals (B, n).

        Raises:
            InputError: The model's output does not have the shape of the operator.
        """
        if tuple(outputs.shape) != (self.n_outputs, self.n_inputs):
            raise InputError(
                f"the model returned shape {tuple(outputs.shape)}, but task=denoising learns an operator of shape "
                f"{(self.n_outputs, self.n_inputs)}; choose model=operator."
            )
        return outputs.double(), samples["noisy"]

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the mean squared error of each denoised signal, (B,)."""
        return (decisions - samples["signals"]).square().mean(1)

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the mean squared error with the exact solver, and the spectral norm of the operator."""
        return {
            "mse": float(self.errors(outputs, samples).mean()),
            "operator_norm": float(torch.linalg.matrix_norm(outputs.double(), 2)),
        }

    def errors(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the mean squared error of each signal with the exact solver, (B,)."""
        D, d = self.parameters(outputs, samples)
        x = torch.cat([self.problem.exact(D, part).x for part in d.split(256)])
        return self.decision_losses(x, samples)
