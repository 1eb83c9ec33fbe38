"""What tasks share that predict the coefficients of a linear objective and lose regret."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from experiments.contracts.task import Samples, Task


class RegretTask(Task):
    """A task whose problem has one tensor of parameters, the coefficients of its objective.

    A class derived from it sets `problem` (with `decide` and `value`), splits with "optimal", the value of the optimal
    decision of each sample, and gives the true coefficients in `truth`.

    shift, scale: The model predicts (coefficient - shift) / scale; `standardize` sets them.
    """

    objective: ClassVar[str] = "regret"
    columns: ClassVar[tuple[str, ...]] = ("regret", "regret_percent", "mse")
    shown: ClassVar[tuple[str, ...]] = ("regret_percent", "mse")
    shift: float = 0.0
    scale: float = 1.0

    def standardize(self, coefficients: Tensor) -> None:
        """Take the mean and the deviation of all training coefficients as shift and scale.

        One number each, so that the weights of the coefficients relative to each other stay the same.
        """
        self.shift, self.scale = float(coefficients.mean()), float(coefficients.std())

    @abstractmethod
    def truth(self, samples: Samples) -> Tensor:
        """Return the true coefficients (B, n)."""

    def parameters(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the predicted coefficients (B, n), float64."""
        return self.shift + self.scale * outputs.double()

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the regret of the decisions, (B,); below 0 where a relaxed decision beats every feasible one."""
        return samples["optimal"] - self.problem.value(decisions, self.truth(samples))

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the mean squared error over the coefficients in units of the outputs, (B,)."""
        return (outputs - (self.truth(samples) - self.shift) / self.scale).square().mean(1)

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the mean regret, also in percent of the sum of |optimal values|, and the MSE of the coefficients."""
        c = self.parameters(outputs, samples)
        regret = self.decision_losses(self.problem.decide(c), samples)
        return {
            "regret": float(regret.mean()),
            "regret_percent": float(100 * regret.sum() / samples["optimal"].abs().sum()),
            "mse": float((c - self.truth(samples)).square().mean()),
        }
