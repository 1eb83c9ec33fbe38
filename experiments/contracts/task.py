"""What the trainer asks of a task: data, loss and metrics of one study; the mathematics is in its problem."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from experiments.contracts.backend import Parameters

Samples = dict[str, Tensor]


class Task(Protocol):
    """What the trainer asks of a task.

    problem: the optimization problem whose parameters are predicted, handed to the backend.
    n_inputs, n_outputs: sizes of the model. splits: "train", "val" and "test", each a dict of tensors with the samples
    along the first dimension; "inputs" is what the model gets.
    shared: whether the model returns one set of parameters for all samples, such as a learned operator, instead of
    (B, n_outputs). objective: the column of metrics.csv that the decision loss is an estimate of.
    A task without `prediction_losses` predicts nothing that could be compared with data.

    What a task may have beside these: `truth(samples)`, the true parameters, for SPO+; `prepare(inputs, generator)`,
    the inputs as the model gets them, with random changes for training if there is a generator; `diagnose(outputs,
    samples)`, columns measured on one training batch an epoch; `running`, the metrics to follow over the training
    batches; `exact_gradient(outputs, samples)`, to compare the backend's with.
    """

    problem: Any
    n_inputs: int
    n_outputs: int
    shared: ClassVar[bool]
    objective: ClassVar[str]
    splits: dict[str, Samples]

    def to(self, device: torch.device) -> None:
        """Move the splits to the device."""
        ...

    def parameters(self, outputs: Tensor, samples: Samples) -> Parameters:
        """Return the problem's parameters that the model's outputs stand for, with what the samples add to them."""
        ...

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the loss of each decision, (B,), differentiable."""
        ...

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the prediction error of each sample, (B,), differentiable."""
        ...

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return columns of metrics.csv, `objective` among them, for the outputs of a split, by the exact solver."""
        ...
