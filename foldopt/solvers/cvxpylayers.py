"""cvxpylayers: a convex program in cone form, solved and differentiated by diffcp.

Source: Agrawal et al., Differentiable convex optimization layers (2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foldopt.errors import InputError, MissingDependencyError

__all__ = ["SOLVE_METHODS", "ConeLayer"]

SOLVE_METHODS = {"SCS": "SCS", "CLARABEL": "Clarabel"}


class ConeLayer:
    """A CvxpyLayer of cvxpylayers in which one bad sample does not spoil its batch.

    ``layer(*parameters)`` returns the solutions. A batch in which the solver fails is solved again one by one. Samples
    that fail alone come out as NaN, and gradients that hold NaN become zero; `failures` counts both.

    Args:
        problem: a cvxpy problem that is DPP.
        parameters: its parameters, in the order of the layer's arguments.
        variables: its variables; the layer returns the first.
        solver: "CLARABEL" (the default) or "SCS".
        solver_args: further arguments of that solver; default none.

    Raises:
        InputError: the solver is unknown.
        MissingDependencyError: cvxpylayers is not installed.

    Examples:
        >>> import cvxpy
        >>> x, c = cvxpy.Variable(2), cvxpy.Parameter(2)
        >>> problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - c)), [x <= 1])
        >>> layer = foldopt.solvers.cvxpylayers.ConeLayer(problem, [c], [x])
        >>> [round(value, 4) for value in layer(torch.tensor([[0.5, 2.0]], dtype=torch.float64))[0].tolist()]
        [0.5, 1.0]
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: str = "CLARABEL",
        solver_args: dict[str, Any] | None = None,
    ) -> None:
        try:
            import diffcp
            from cvxpylayers.torch import CvxpyLayer
        except ImportError as error:
            raise MissingDependencyError(
                "cvxpylayers is not installed; install it with: pip install 'foldopt[cvxpylayers]'"
            ) from error
        if solver not in SOLVE_METHODS:
            raise InputError(f"solver={solver!r} is unknown; choose one of {sorted(SOLVE_METHODS)}.")
        self._arguments = {"solve_method": SOLVE_METHODS[solver], "n_jobs_forward": 1, **(solver_args or {})}
        self._layer = CvxpyLayer(problem, list(parameters), list(variables))
        self._dims, self._size = [p.ndim for p in parameters], variables[0].size
        self._failure, self.failures = diffcp.SolverError, 0

    def __call__(self, *parameters: Tensor) -> Tensor:
        """Return the solutions, (B, n), in float64 on the device of the parameters; diffcp works on the CPU."""
        values = [value.to("cpu", torch.float64).view_as(value) for value in parameters]
        batched = [value.dim() > dim for value, dim in zip(values, self._dims, strict=True)]
        for value, each in zip(values, batched, strict=True):
            if value.requires_grad and each:
                value.register_hook(self._sound)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(naccurate|CSC|CSR).*")
            try:
                solutions = self._solve(*values)
            except self._failure:
                size = max(len(v) for v, each in zip(values, batched, strict=True) if each)
                split = [v.split(1) if each else [v] * size for v, each in zip(values, batched, strict=True)]
                solutions = torch.cat([self._alone(*row) for row in zip(*split, strict=True)])
        return solutions.to(parameters[0].device)

    def _solve(self, *values: Tensor) -> Tensor:
        """Return the solutions of a batch; diffcp's error if a sample fails."""
        recording = torch.is_grad_enabled() and any(value.requires_grad for value in values)
        backward = {"n_jobs_backward": 1} if recording else {}
        return self._layer(*values, solver_args={**self._arguments, **backward})[0]

    def _alone(self, *row: Tensor) -> Tensor:
        """Return the solution of one sample, NaN if the solver fails."""
        try:
            return self._solve(*row)
        except self._failure:
            self.failures += 1
            return torch.full((1, self._size), torch.nan, dtype=torch.float64)

    def _sound(self, gradient: Tensor) -> Tensor:
        """Make gradients that hold NaN zero, and count them."""
        sound = gradient.isfinite().all(1)
        self.failures += int((~sound).sum())
        return torch.where(sound[:, None], gradient, 0.0)
