"""Unrolling (paper section 2): every iteration of the optimizer on the graph."""

from __future__ import annotations

from typing import Any

import torch

from experiments.backends import LayerBackend, lacks
from foldopt import SQP, unroll
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver


class UnrollBackend(LayerBackend):
    """`iterations` SQP steps from the problem's cold start; tol and on_failure as for `foldopt.unroll`."""

    def __init__(
        self,
        task: Any,
        linear_solver: LinearSolver,
        optimizer: str,
        iterations: int,
        tol: float | None,
        on_failure: str,
    ) -> None:
        problem = task.problem
        if optimizer != "sqp":
            raise InputError(f"backend.optimizer={optimizer!r} is not there for this task; choose sqp.")

        def start(parameters: Any, *_: Any) -> Any:
            return problem.sqp_start(parameters)

        layer = unroll(start, SQP(problem), iterations=iterations, tol=tol, on_failure=on_failure, dtype=torch.float64)
        super().__init__(problem, layer)

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem cannot be unrolled, None if it can."""
        return lacks(task, "sqp_start", "its problem has no optimizer with a start (sqp_start)")
