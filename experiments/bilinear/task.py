"""The bilinear task: predict the linear coefficients of a nonconvex bilinear program, minimize regret (paper E.1)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from data import bilinear
from experiments.bilinear.problem import BilinearProblem
from experiments.contracts.task import Samples, Task
from foldopt.checks import require_whole
from foldopt.errors import InputError

INTERACTIONS = 15


class BilinearTask(Task):
    """The bilinear task on the data of `data.bilinear.generate`, with one of 15 matrices `data.bilinear.interaction`.

    The loss of a decision is its regret in the *smoothed* program. The metrics are those of the program without
    smoothing.

    Args:
        interaction: Which Q, 0..14. It is the seed of Q, which is independent of the seed of the data.
        n_variables: Number of variables n of each block.
        standardize: The model predicts (target - mean) / deviation, with one mean and one standard deviation over all
            training targets.
        p, q, kappa, smoothing, stepsize, starts, time_limit: See `BilinearProblem`.
        seed, n_train, n_val, n_test, n_features, hidden: See `data.bilinear.generate`.
    """

    objective: ClassVar[str] = "regret"
    columns: ClassVar[tuple[str, ...]] = (
        *("regret", "regret_percent", "mse", "prediction_scale"),
        *("spectral_radius", "global_fraction", "solver_timeouts"),
    )
    shown: ClassVar[tuple[str, ...]] = ("regret_percent", "mse")
    problem: BilinearProblem

    def __init__(
        self,
        seed: int,
        interaction: int,
        n_variables: int,
        p: int,
        q: int,
        kappa: float,
        smoothing: str,
        stepsize: float,
        starts: int,
        time_limit: float,
        standardize: bool,
        n_train: int,
        n_val: int,
        n_test: int,
        n_features: int,
        hidden: int,
    ) -> None:
        require_whole("interaction", interaction, 0)
        if interaction >= INTERACTIONS:
            raise InputError(
                f"interaction={interaction}: there are {INTERACTIONS} matrices Q; choose one of 0..{INTERACTIONS - 1}."
            )
        require_whole("n_variables", n_variables, 2)
        drawn = bilinear.generate(seed, n_train, n_val, n_test, 2 * n_variables, n_features, hidden)
        Q = bilinear.interaction(interaction, n_variables)
        self.problem = BilinearProblem(Q, p, q, kappa, smoothing, stepsize, starts, time_limit)
        self.n_inputs, self.n_outputs = n_features, 2 * n_variables
        train = drawn.targets["train"]
        self.shift, self.scale = (float(train.mean()), float(train.std())) if standardize else (0.0, 1.0)
        self.splits = {name: self._samples(drawn.features[name], t) for name, t in drawn.targets.items()}

    def _samples(self, features: Tensor, targets: Tensor) -> Samples:
        c, d = targets.chunk(2, dim=1)
        optimum = torch.cat(
            [self.problem.solve("exact", *part) for part in zip(c.split(100), d.split(100), strict=True)]
        )
        return {
            "inputs": features.float(),
            "targets": targets,
            "optimal": self.problem.vertex(c, d).value,
            "smoothed_optimal": self.problem.smoothed_value(optimum, c, d),
        }

    def parameters(self, outputs: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the predicted coefficients (c, d), (B, n) each, float64."""
        c, d = (self.shift + self.scale * outputs.double()).chunk(2, dim=1)
        return c, d

    def truth(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the true coefficients (c, d)."""
        c, d = samples["targets"].chunk(2, dim=1)
        return c, d

    def decision_losses(self, decisions: Tensor, samples: Samples) -> Tensor:
        """Return the regret of the decisions in the smoothed program, (B,)."""
        return samples["smoothed_optimal"] - self.problem.smoothed_value(decisions, *self.truth(samples))

    def prediction_losses(self, outputs: Tensor, samples: Samples) -> Tensor:
        """Return the mean squared error over the coefficients in units of the outputs, (B,)."""
        return (outputs - (samples["targets"] - self.shift) / self.scale).square().mean(1)

    def metrics(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return the mean regret, also in percent of the sum of |optimal values|, the MSE and the prediction scale."""
        c, d = self.parameters(outputs, samples)
        regret = samples["optimal"] - self.problem.value(self.problem.decide(c, d), *self.truth(samples))
        predicted = torch.cat([c, d], 1)
        return {
            "regret": float(regret.mean()),
            "regret_percent": float(100 * regret.sum() / samples["optimal"].abs().sum()),
            "mse": float((predicted - samples["targets"]).square().mean()),
            "prediction_scale": float(predicted.square().mean().sqrt()),
        }

    def diagnose(self, outputs: Tensor, samples: Samples) -> dict[str, float]:
        """Return spectral_radius, global_fraction and solver_timeouts (since the last call) for a training batch.

        global_fraction is the share of samples in which the local optimum reached from the centre is as good as the
        best one reached from n vertices. Without smoothing only solver_timeouts is returned.
        """
        problem = self.problem
        late, problem.timeouts = problem.timeouts, 0
        if not problem.kappa:
            return {"solver_timeouts": late}
        c, d = self.parameters(outputs, samples)
        best = problem.smoothed(c, d, starts=problem.spread(problem.n))
        local = problem.smoothed(c, d, starts=problem.centre[None, : problem.n])
        return {
            "spectral_radius": float(problem.spectral_radius(torch.cat([best.x, best.y], 1)).mean()),
            "global_fraction": float((local.value >= best.value - 1e-9 * best.value.abs()).double().mean()),
            "solver_timeouts": late,
        }
