"""The portfolio task: predict asset returns, decide by the optimal portfolio, minimize its regret."""

from __future__ import annotations

from torch import Tensor

from data import returns_csv
from data.portfolio import PortfolioData, generate
from experiments.contracts.regret import RegretTask
from experiments.contracts.task import Samples
from experiments.portfolio.problem import PortfolioProblem
from foldopt.errors import InfeasibleError, InputError


class PortfolioTask(RegretTask):
    """The portfolio task on the data of `data.portfolio.generate`, or on returns from a CSV file.

    Args:
        standardize: The model predicts (c - mean) / deviation, with one mean and one standard deviation over all
            training returns, so that the weights of the assets relative to each other stay the same.
        seed, degree, n_train, n_val, n_test, n_assets, n_features, tau: See `data.portfolio.generate`; not used with a
            file.
        csv: Path of a file of returns, see `data.returns_csv.read`; None generates the data.
        digest, date, returns, features, max_gap: See `data.returns_csv.read`.
        lags, feature_lag, val_share, test_share, folds, fold: See `data.returns_csv.WalkForward`.
        risk: See `data.returns_csv.split`.
    """

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
        csv: str | None = None,
        digest: str | None = None,
        date: str | None = None,
        returns: list[str] | None = None,
        features: list[str] | None = None,
        max_gap: float | None = None,
        lags: int = 1,
        feature_lag: int = 1,
        val_share: float = 0.15,
        test_share: float = 0.3,
        folds: int = 1,
        fold: int = 0,
        risk: float = 1.2,
    ) -> None:
        walk = returns_csv.WalkForward(lags, feature_lag, val_share, test_share, folds, fold)
        if csv is not None:
            table = returns_csv.read(csv, digest, date, returns, features, max_gap)
            data = returns_csv.split(table, walk, risk)
        elif folds > 1:
            raise InputError(f"task.folds={folds}: only the data of a file have folds; name one by task.csv.")
        else:
            data = generate(seed, degree, n_train, n_val, n_test, n_assets, n_features, tau)
        self.problem = _problem(data, risk)
        self.n_inputs, self.n_outputs = data.features["train"].shape[1], len(data.V)
        train = data.returns["train"]
        if standardize:
            self.standardize(train)
        self.splits = {name: self._samples(data.features[name], c) for name, c in data.returns.items()}

    def _samples(self, features: Tensor, c: Tensor) -> Samples:
        optimal = self.problem.value(self.problem.exact(c).x, c)
        return {"inputs": features.float(), "returns": c, "optimal": optimal}

    def truth(self, samples: Samples) -> Tensor:
        """Return the true returns (B, n)."""
        return samples["returns"]


def _problem(data: PortfolioData, risk: float) -> PortfolioProblem:
    try:
        return PortfolioProblem(data.V, data.gamma)
    except InfeasibleError as error:
        raise InputError(
            f"task.risk={risk}: {error} gamma is task.risk times the variance of equal weights."
        ) from error
