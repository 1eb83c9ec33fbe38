"""cvxpylayers: the problem in cone form, solved and differentiated by diffcp (Agrawal et al., 2019)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.backends import Parameters, lacks
from foldopt.errors import InputError, MissingDependencyError
from foldopt.linear_solve import LinearSolver

SOLVE_METHODS = {"SCS": "SCS", "CLARABEL": "Clarabel"}


class CvxpyLayersBackend:
    """A CvxpyLayer of the problem.

    scaling: "paper" or "normalized", as the problem's `cvxpy` method takes it. solver: "SCS" or "CLARABEL".
    solver_args: further arguments of that solver.

    A batch in which the solver fails is solved again one by one; samples that fail alone return NaN, those whose
    gradient is NaN get zero, and both are counted.
    """

    trains_on: ClassVar[str] = "decision"

    def __init__(
        self, task: Any, linear_solver: LinearSolver, scaling: str, solver: str, solver_args: dict[str, Any]
    ) -> None:
        try:
            import diffcp
            from cvxpylayers.torch import CvxpyLayer
        except ImportError as error:
            raise MissingDependencyError(
                "cvxpylayers is not installed; install it with: pip install 'foldopt[cvxpylayers]'"
            ) from error
        if solver not in SOLVE_METHODS:
            raise InputError(f"backend.solver={solver!r} is unknown; choose one of {sorted(SOLVE_METHODS)}.")
        problem, parameters, variables = task.problem.cvxpy(scaling)
        self._arguments = {"solve_method": SOLVE_METHODS[solver], "n_jobs_forward": 1, **solver_args}
        self._layer = CvxpyLayer(problem, parameters, variables)
        self._dims, self._size = [p.ndim for p in parameters], variables[0].size
        self._failure, self._failures = diffcp.SolverError, 0

    @staticmethod
    def unsuitable(task: Any) -> str | None:
        """Return why the task's problem has no cvxpy form, None if it has."""
        return lacks(task, "cvxpy", "its problem has no convex form that cvxpy could take")

    def __call__(self, parameters: Parameters) -> Tensor:
        """Return the decisions for the task's parameters, (B, n), in float64; diffcp works on the CPU."""
        given = (parameters,) if isinstance(parameters, Tensor) else parameters
        values = [value.to("cpu", torch.float64).view_as(value) for value in given]
        batched = [value.dim() > dim for value, dim in zip(values, self._dims, strict=True)]
        for value, each in zip(values, batched, strict=True):
            if value.requires_grad and each:
                value.register_hook(self._sound)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(naccurate|CSC|CSR).*")
            try:
                decisions = self._solve(*values)
            except self._failure:
                size = max(len(v) for v, each in zip(values, batched, strict=True) if each)
                split = [v.split(1) if each else [v] * size for v, each in zip(values, batched, strict=True)]
                decisions = torch.cat([self._alone(*row) for row in zip(*split, strict=True)])
        return decisions.to(given[0].device)

    def _solve(self, *values: Tensor) -> Tensor:
        recording = torch.is_grad_enabled() and any(value.requires_grad for value in values)
        backward = {"n_jobs_backward": 1} if recording else {}
        return self._layer(*values, solver_args={**self._arguments, **backward})[0]

    def _alone(self, *row: Tensor) -> Tensor:
        try:
            return self._solve(*row)
        except self._failure:
            self._failures += 1
            return torch.full((1, self._size), torch.nan, dtype=torch.float64)

    def _sound(self, gradient: Tensor) -> Tensor:
        """Make gradients that hold NaN zero and count them."""
        sound = gradient.isfinite().all(1)
        self._failures += int((~sound).sum())
        return torch.where(sound[:, None], gradient, 0.0)

    def take_failures(self) -> int:
        """Return how many samples failed since the last call."""
        failures, self._failures = self._failures, 0
        return failures
