"""qpth: the problem as a quadratic program, solved and differentiated by its interior point (Amos and Kolter, 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.contracts.backend import Backend
from experiments.contracts.task import Task
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver
from foldopt.solvers.qpth import qp_function, solve_qpth

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class QpthBackend(Backend):
    """qpth on the quadratic program that the problem's `qp` returns.

    dtype: "float64" or "float32", in which qpth computes. eps, max_iter: qpth's tolerance and its largest number of
    iterations. ridge: number above 0 for the diagonal of variables without curvature; qpth needs a positive definite Q.

    A sample counts as failed if its solution is not finite; qpth does not report any other failure.
    """

    def __init__(
        self, task: Task, linear_solver: LinearSolver, dtype: str, eps: float, max_iter: int, ridge: float
    ) -> None:
        qp_function()  # raises here, before any work, if qpth is missing
        if dtype not in DTYPES:
            raise InputError(f"backend.dtype={dtype!r} is unknown; choose one of {sorted(DTYPES)}.")
        if not 0 < ridge < float("inf"):
            raise InputError(f"backend.ridge={ridge}: qpth needs a positive definite Q, take a number above 0.")
        require_positive("backend.eps", eps)
        require_whole("backend.max_iter", max_iter, 1)
        self.problem, self.ridge, self.dtype = task.problem, ridge, DTYPES[dtype]
        self._eps, self._max_iter = eps, max_iter
        self._failures = 0

    @staticmethod
    def unsuitable(task: Task) -> str | None:
        """Return why the task's problem is no quadratic program, None if it is."""
        return task.problem.lacks("qp", "qp_decisions")

    def __call__(self, parameters: Any) -> Tensor:
        """Return the decisions for the task's parameters."""
        params = self.problem.params(parameters)
        parts = (t.to(self.dtype) for t in self.problem.qp(*params, self.ridge))
        found = solve_qpth(*parts, eps=self._eps, max_iter=self._max_iter)
        sound = found.detach().isfinite().all(1)
        self._failures += int((~sound).sum())
        return self.problem.qp_decisions(found).to(torch.float64)

    def take_failures(self) -> int:
        """Return how many samples failed since the last call."""
        failures, self._failures = self._failures, 0
        return failures
