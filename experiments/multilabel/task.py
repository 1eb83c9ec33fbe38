"""The multilabel task: top-5 classification of images with noisy labels (paper sections 6 and E.3)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from data.noisy_labels import generate
from experiments.contracts.task import Samples, Task
from experiments.multilabel.problem import TopKProblem
from foldopt.checks import require_positive

CHANNELS, CLASSES = 3, 100
PADDING = 4
TINY = 1e-12  # length of features below which they are not normalized


class MultilabelTask(Task):
    """The multilabel task on the images of `data.noisy_labels.generate`.

    A decision is log x, and its loss is -log x_y with the label y. The metrics "top1" and "top5" are accuracies in
    percent: the share of labels that have the largest logit, or one of the 5 largest.

    Args:
        data: The source of the images, see `data.noisy_labels.generate`.
        temperature: tau in c = z / (tau |z|), above 0, where z are the network's features; the authors' code has 1.
            None: c = z.
        augment: Whether to shift and mirror the training images.
        k, stepsize, solver: See `TopKProblem`.
        seed, n_train, n_val, n_test, noise, groups: See `data.noisy_labels.generate`.
    """

    objective: ClassVar[str] = "top5"
    maximize: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("top1", "top5", "bound_fraction")
    shown: ClassVar[tuple[str, ...]] = ("top1", "top5")
    problem: TopKProblem
    running: ClassVar[tuple[str, ...]] = ("top1", "top5")

    def __init__(
        self,
        seed: int,
        data: str,
        n_train: int,
        n_val: int,
        n_test: int,
        noise: float,
        groups: str,
        k: int,
        temperature: float | None,
        augment: bool,
        stepsize: float,
        solver: str,
    ) -> None:
        if temperature is not None:
            require_positive("temperature", temperature)
        self.temperature, self.augment = temperature, augment
        self.problem = TopKProblem(CLASSES, k, stepsize, solver)
        self.n_inputs, self.n_outputs = CHANNELS, CLASSES
        drawn = generate(data, seed, n_train, n_val, n_test, noise, groups)
        self.splits = {name: {"inputs": drawn.images[name], "labels": y} for name, y in drawn.labels.items()}
        pixels = drawn.images["train"].double() / 255
        self.mean, self.deviation = (
            t.float().view(-1, 1, 1) for t in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)) + TINY)
        )

    def to(self, device: torch.device) -> None:
        """Move the splits and the normalization to the device."""
        super().to(device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return uint8 images (B, 3, h, w) as float32, each channel standardized as in the training images.

        generator: Source of random shifts and mirroring in training; None leaves the images as they are.
        """
        if self.augment and generator is not None:
            inputs = shifted_and_mirrored(inputs, generator)
        return (inputs.float() / 255 - self.mean) / self.deviation

    def parameters(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the logits c, (B, 100), float64."""
        z = outputs.double()
        return z if self.temperature is None else F.normalize(z, dim=1, eps=TINY) / self.temperature

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return -log x_y, (B,), for decisions log x (B, 100)."""
        return -decisions.gather(1, samples["labels"][:, None])[:, 0]

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the cross entropy of softmax(c), (B,): the decision loss plus log k if no x is at its bound."""
        return F.cross_entropy(self.parameters(outputs, samples), samples["labels"], reduction="none")

    def exact_gradient(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the gradient of the mean decision loss at the exact solution with respect to the outputs."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            log_x = self.problem.closed_form(self.parameters(leaf, samples))
            return torch.autograd.grad(self.decision_losses(log_x, samples).mean(), leaf)[0]

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the mean loss, top1 and top5 in percent, and bound_fraction, the share of samples with an x at 1."""
        c = self.parameters(outputs, samples)
        found = self.problem.exact(c)
        hit = c.topk(5, dim=1).indices == samples["labels"][:, None]
        return {
            "loss": float(self.decision_losses(found.log_x, samples).mean()),
            "top1": 100 * float(hit[:, 0].double().mean()),
            "top5": 100 * float(hit.any(1).double().mean()),
            "bound_fraction": float((~found.free).any(1).double().mean()),
        }


def shifted_and_mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, C, h, w) shifted by up to 4 pixels, filled with black, and mirrored with probability 1/2."""
    B, _, h, w = images.shape
    down, right = torch.randint(2 * PADDING + 1, (2, B, 1), generator=generator).to(images.device)
    mirror = (torch.rand(B, 1, generator=generator) < 0.5).to(images.device)
    rows, columns = (torch.arange(size, device=images.device) for size in (h, w))
    columns = torch.where(mirror, w - 1 - columns, columns)
    padded = F.pad(images, (PADDING,) * 4)
    sample = torch.arange(B, device=images.device)[:, None, None]
    chosen = padded.permute(0, 2, 3, 1)[sample, (rows + down)[:, :, None], (columns + right)[:, None]]
    return chosen.permute(0, 3, 1, 2)
