"""The portfolio task: predict asset returns, decide by the optimal portfolio, minimize its regret."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from data.portfolio import generate
from experiments.contracts.task import Samples, Task
from experiments.portfolio.problem import PortfolioProblem


class PortfolioTask(Task):
    """The portfolio task on the data of `data.portfolio.generate`.

    Args:
        standardize: The model predicts (c - mean) / deviation, with one mean and one standard deviation over all
            training returns, so that the weights of the assets relative to each other stay the same.
        seed, degree, n_train, n_val, n_test, n_assets, n_features, tau: See `data.portfolio.generate`.
    """

    objective: ClassVar[str] = "regret"
    columns: ClassVar[tuple[str, ...]] = ("regret", "regret_percent", "mse")
    shown: ClassVar[tuple[str, ...]] = ("regret_percent", "mse")
    problem: PortfolioProblem

    def __init__(
        self,
        seed: int,
        degree: int,
        n_train: int,
        n_val: int,
        n_test: int,
        n_assets: int,
        n_features: int,
        tau: float,
        standardize: bool,
    ) -> None:
        drawn = generate(seed, degree, n_train, n_val, n_test, n_assets, n_features, tau)
        self.problem = PortfolioProblem(drawn.V, drawn.gamma)
        self.n_inputs, self.n_outputs = n_features, n_assets
        train = drawn.returns["train"]
        self.shift, self.scale = (float(train.mean()), float(train.std())) if standardize else (0.0, 1.0)
        self.splits = {name: self._samples(drawn.features[name], c) for name, c in drawn.returns.items()}

    def _samples(self, features: Tensor, c: Tensor) -> Samples:
        optimal = self.problem.value(self.problem.exact(c).x, c)
        return {"inputs": features.float(), "returns": c, "optimal": optimal}

    def parameters(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the predicted returns (B, n), float64."""
        return self.shift + self.scale * outputs.double()

    def truth(self, samples: Samples) -> Tensor:
        """Return the true returns (B, n)."""
        return samples["returns"]

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the regret of the portfolios, (B,)."""
        return samples["optimal"] - self.problem.value(decisions, samples["returns"])

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the mean squared error over the assets in units of the outputs, (B,)."""
        return (outputs - (samples["returns"] - self.shift) / self.scale).square().mean(1)

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the mean regret, also in percent of the sum of |optimal values|, and the MSE of the returns."""
        c = self.parameters(outputs, samples)
        regret = self.decision_losses(self.problem.exact(c).x, samples)
        return {
            "regret": float(regret.mean()),
            "regret_percent": float(100 * regret.sum() / samples["optimal"].abs().sum()),
            "mse": float((c - samples["returns"]).square().mean()),
        }
