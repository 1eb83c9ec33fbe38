"""Fixed-point unfolding (paper section 4): iterations of the optimizer on the graph, from the solution."""

from __future__ import annotations

from typing import Any

import torch

from experiments.backends import LayerBackend, lacks
from experiments.backends.fold import TOLERANCES, solver_and_step
from foldopt import unfold
from foldopt.linear_solve import LinearSolver


class UnfoldBackend(LayerBackend):
    """`iterations` steps of the problem's optimizer from what its forward solver found, in float64.

    Others: as for `FoldBackend`. By Theorem 1 the backward pass is LFPI with as many iterations.
    """

    def __init__(
        self,
        task: Any,
        linear_solver: LinearSolver,
        optimizer: str,
        forward: str,
        iterations: int,
        tol: float | None,
        on_failure: str,
        forward_tol: float | None = None,
    ) -> None:
        solve, update = solver_and_step(task.problem, optimizer, forward, forward_tol)
        options = {
            "tol": TOLERANCES[forward] if tol is None else tol,
            "on_failure": on_failure,
            "iterations": iterations,
        }
        super().__init__(task.problem, unfold(solve, update, dtype=torch.float64, **options))

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem cannot be unfolded, None if it can."""
        return lacks(task, "optimizers", "its problem has no update step (optimizers)")
