"""SPO+, a convex surrogate of the regret (Elmachtoub and Grigas, "Smart predict, then optimize", 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.problem import Parameters
from experiments.contracts.task import Task
from foldopt.linear_solve import LinearSolver
from foldopt.step import as_tuple


class SPOPlusBackend(Backend):
    """The SPO+ loss of a problem whose value is linear in the parameters, maximized.

    With v(w, t) the value of decision w at parameters t, and V(t) its maximum, the loss is
    V(2t' - t) - 2 v(w*(t), t') + V(t) for predictions t' and truth t: PyEPO's definition (Tang and Khalil, 2024)
    for the costs -t, which are minimized; a term of v without t counts as a decision with the known coefficient 1. The
    loss is convex in t', never below the regret, 0 at t' = t, and 2 (w*(2t' - t) - w*(t)) is a subgradient.
    """

    trains_on: ClassVar[Literal["surrogate"]] = "surrogate"

    def __init__(self, task: Task, linear_solver: LinearSolver) -> None:
        self.problem = task.problem

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why there is no SPO+ loss of the task, None if there is."""
        return task.lacks("truth") or task.problem.lacks("decide", "value")

    def losses(self, parameters: Parameters, truth: Parameters) -> Tensor:
        """Return the SPO+ loss of each sample, (B,), differentiable in `parameters`."""
        predicted, true = as_tuple(parameters), as_tuple(truth)
        extrapolated = tuple(2 * a - b for a, b in zip(predicted, true, strict=True))
        with torch.no_grad():
            optimal, best = self.problem.decide(*true), self.problem.decide(*extrapolated)
        value = self.problem.value
        return value(best, *extrapolated) - 2 * value(optimal, *predicted) + value(optimal, *true)

    def __call__(self, parameters: Any) -> Tensor:
        """Return the optimal decisions for the predicted parameters (no gradient)."""
        return self.problem.decide(*as_tuple(parameters))
