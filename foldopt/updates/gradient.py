"""Projected and proximal gradient descent as update steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foldopt.checks import require_positive
from foldopt.errors import InputError

__all__ = ["Objective", "ProjectedGradient", "ProximalGradient"]

Objective = Callable[..., Tensor]


class ProximalGradient(nn.Module):
    """One step of proximal gradient descent for min f(x, c) + g(x, c): x -> prox(x - alpha grad f(x, c), alpha, c).

    Its fixed points are the stationary points of f + g, whatever alpha. The step is called as ``step(x, *params)``.

    Args:
        objective: ``objective(x, *params) -> (B,)``, smooth, for x (B, ...). The samples must not interact.
        prox: ``prox(x, alpha, *params) -> x``, the proximal operator of alpha g, as those of `foldopt.prox`.
        stepsize: alpha, above 0. LFPI converges only if alpha < 2 / L, where L is the Lipschitz constant of grad f; the
            other linear solvers work with any.

    Raises:
        InputError: objective or prox cannot be called, or stepsize is not above 0.

    Source: paper, eq. 6; Beck, First-Order Methods in Optimization (2017), chapter 10.

    Examples:
        >>> def objective(x, c):
        ...     return 0.5 * (x - c).square().sum(1)
        >>> step = foldopt.ProximalGradient(objective, lambda x, a, c: foldopt.prox.soft_threshold(x, a), stepsize=1.0)
        >>> step(torch.zeros(1, 2), torch.tensor([[3.0, 0.5]]))
        tensor([[2., 0.]])
    """

    def __init__(self, objective: Objective, prox: Callable[..., Tensor], stepsize: float) -> None:
        super().__init__()
        for name, value, call in (("objective", objective, "x, *params"), ("prox", prox, "x, alpha, *params")):
            if not callable(value):
                raise InputError(f"{name}={value!r} is not callable; expected {name}({call}).")
        require_positive("stepsize", stepsize)
        self.objective, self.prox, self.stepsize = objective, prox, stepsize

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return the state after one step.

        Args:
            x: state, (B, ...).
            *params: parameters of the objective and the proximal operator.

        Returns:
            The state, (B, ...).
        """
        gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
        return self.prox(x - self.stepsize * gradient, self.stepsize, *params)


class ProjectedGradient(ProximalGradient):
    """One step of projected gradient descent for min f(x, c) over a convex set: x -> P(x - alpha grad f(x, c), c).

    The step is called as ``step(x, *params)``.

    Args:
        objective: ``objective(x, *params) -> (B,)``, smooth, for x (B, ...). The samples must not interact.
        projection: ``projection(x, *params) -> x``, the projection on the set, as those of `foldopt.projections`.
        stepsize: alpha, above 0. LFPI converges only if alpha < 2 / L, where L is the Lipschitz constant of grad f; the
            other linear solvers work with any.

    Raises:
        InputError: objective or projection cannot be called, or stepsize is not above 0.

    Source: paper, eq. 4; Beck, First-Order Methods in Optimization (2017), chapter 10.

    Examples:
        >>> def objective(x, c):
        ...     return 0.5 * (x - c).square().sum(1)
        >>> step = foldopt.ProjectedGradient(objective, lambda x, c: foldopt.projections.simplex(x), stepsize=1.0)
        >>> step(torch.zeros(1, 2), torch.tensor([[0.8, 0.6]]))
        tensor([[0.6000, 0.4000]])
    """

    def __init__(self, objective: Objective, projection: Callable[..., Tensor], stepsize: float) -> None:
        if not callable(projection):
            raise InputError(f"projection={projection!r} is not callable; expected projection(x, *params).")
        super().__init__(objective, _Projection(projection), stepsize)


class _Projection(nn.Module):
    """A projection as a proximal operator: that of an indicator function, which no weight changes."""

    def __init__(self, projection: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: Tensor, _: float, *params: Tensor) -> Tensor:
        """Return the projection; the weight is not used."""
        return self.projection(x, *params)
