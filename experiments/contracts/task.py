"""What the trainer asks of a task: data, loss and metrics of one study; the mathematics is in its problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.contracts.base import Contract
from experiments.contracts.problem import Parameters, Problem

Samples = dict[str, Tensor]


class Task(Contract, ABC):
    """What is learned. A class is made with `seed` and the keys of its YAML, and sets:

    problem: the optimization problem whose parameters are predicted, handed to the backend.
    n_inputs, n_outputs: sizes of the model. splits: "train", "val" and "test", each a dict of tensors with the samples
    along the first dimension; "inputs" is what the model gets.

    and of the class:

    objective: the column by which a run is judged: its best validation is what a search minimizes.
    maximize: whether more of it is better. columns: all that `metrics` and `diagnose` return, "loss" excepted; they
    become columns of metrics.csv. shown: those of them that the console shows after an epoch; () for the objective.
    shared: whether the model returns one set of parameters for all samples, such as a learned operator, instead of
    (B, n_outputs). running: the metrics that are also measured over the training batches.
    """

    ABSENT: ClassVar[Mapping[str, str]] = {
        "truth": "it has no true parameters (truth)",
        "prediction_losses": "it predicts nothing that could be compared with data",
        "exact_gradient": "it does not know the exact gradient (exact_gradient)",
    }

    problem: Problem
    n_inputs: int
    n_outputs: int
    splits: dict[str, Samples]
    objective: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    maximize: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[bool] = False
    running: ClassVar[tuple[str, ...]] = ()

    def to(self, device: torch.device) -> None:
        """Move the splits to the device."""
        self.splits = {name: {k: v.to(device) for k, v in s.items()} for name, s in self.splits.items()}

    @abstractmethod
    def parameters(self, outputs: Tensor, samples: Samples) -> Any:
        """Return the problem's parameters that the model's outputs stand for, with what the samples add to them."""

    @abstractmethod
    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the loss of each decision, (B,), differentiable."""

    @abstractmethod
    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the metrics of a split's outputs, by the exact solver: some of `columns`, with the objective.

        "loss", if it is among them, is the mean decision loss. Else the decision loss is an estimate of the objective
        (of minus the objective if `maximize`), which is then recorded as the loss of validation and test samples.
        """

    def truth(self, samples: Samples) -> Parameters:
        """Return the true parameters, of the form that `parameters` returns; spo_plus and pyepo need them."""
        self._absent("truth")

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the prediction error of each sample, (B,), differentiable; two_stage and train.mse_epochs need it."""
        self._absent("prediction_losses")

    def exact_gradient(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the exact gradient of the mean decision loss in the outputs, of their shape, to compare with."""
        self._absent("exact_gradient")

    def prepare(self, inputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the inputs as the model gets them, with random changes for training if there is a generator."""
        return inputs

    def diagnose(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return what is measured on one training batch per epoch: some of `columns`."""
        return {}
