"""Predict the costs of a linear program, decide by its optimum, lose regret (Tang and Khalil, 2024)."""

from __future__ import annotations

from torch import Tensor

from data import linear_program as data
from experiments.contracts.regret import RegretTask
from experiments.contracts.task import Samples
from experiments.linear_program import polytope
from experiments.linear_program.problem import LinearProgramProblem
from foldopt.checks import require_positive
from foldopt.errors import InputError

INSTANCES = ("shortest_path", "knapsack", "assignment")


class LinearProgramTask(RegretTask):
    """A linear program on the data of `data.linear_program`.

    Args:
        seed: of the data.
        instance: "shortest_path", "knapsack" or "assignment".
        rows, columns: nodes of the grid of a shortest path.
        items, dimensions, capacity: of a knapsack.
        size: workers, and jobs, of an assignment.
        smoothing: "quadratic", "entropy" or "barrier", of the program that is trained through.
        strength: of the smoothing, relative to the mean absolute cost of the training samples.
        standardize: whether the model predicts (cost - mean) / deviation, with one mean and one deviation of all
            training costs.
        n_train, n_val, n_test, n_features, degree, noise: of the data.
    """

    problem: LinearProgramProblem

    def __init__(
        self,
        seed: int,
        instance: str,
        rows: int,
        columns: int,
        items: int,
        dimensions: int,
        capacity: float,
        size: int,
        smoothing: str,
        strength: float,
        standardize: bool,
        n_train: int,
        n_val: int,
        n_test: int,
        n_features: int,
        degree: int,
        noise: float,
    ) -> None:
        require_positive("task.strength", strength)
        sizes = {"train": n_train, "val": n_val, "test": n_test}
        shared = n_features, degree, noise
        if instance == "shortest_path":
            feasible = polytope.shortest_path(rows, columns)
            drawn = data.shortest_path(seed, sizes, rows, columns, *shared)
        elif instance == "knapsack":
            drawn, weights = data.knapsack(seed, sizes, items, dimensions, *shared)
            feasible = polytope.knapsack(weights, capacity)
        elif instance == "assignment":
            feasible = polytope.assignment(size)
            drawn = data.assignment(seed, sizes, size, *shared)
        else:
            raise InputError(f"task.instance={instance!r} is unknown; choose one of {', '.join(INSTANCES)}.")
        train = drawn.costs["train"]
        strength *= float(train.abs().mean())
        self.problem = LinearProgramProblem(feasible, instance == "knapsack", smoothing, strength)
        self.n_inputs, self.n_outputs = n_features, feasible.n
        if standardize:
            self.standardize(train)
        self.splits = {name: self._samples(drawn.features[name], c) for name, c in drawn.costs.items()}

    def _samples(self, features: Tensor, c: Tensor) -> Samples:
        return {"inputs": features.float(), "costs": c, "optimal": self.problem.value(self.problem.decide(c), c)}

    def truth(self, samples: Samples) -> Tensor:
        """Return the true costs (B, n)."""
        return samples["costs"]
