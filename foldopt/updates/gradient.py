"""Projected and proximal gradient descent as update steps (paper eqs. 4 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foldopt.checks import require_positive
from foldopt.errors import InputError

__all__ = ["Objective", "ProjectedGradient", "ProximalGradient"]

Objective = Callable[..., Tensor]


class ProximalGradient(nn.Module):
    """One step of proximal gradient descent: x -> prox(x - alpha grad f(x, c), alpha, c) (eq. 6).

    Its fixed points are the stationary points of f + g, whatever alpha. Beck, First-Order Methods in Optimization
    (2017), ch. 10.

    Args:
        objective: f(x, *params) -> (B,), x of shape (B, ...), smooth; the samples do not interact.
        prox: prox(x, alpha, *params) -> x, the proximal operator of alpha g, as those of `foldopt.prox`.
        stepsize: alpha > 0. Folding by LFPI needs alpha < 2 / L, L the Lipschitz constant of grad f; the other linear
            solvers do not care.
    """

    def __init__(self, objective: Objective, prox: Callable[..., Tensor], stepsize: float) -> None:
        super().__init__()
        for name, value in (("objective", objective), ("prox", prox)):
            if not callable(value):
                raise InputError(f"{name}={value!r} is not callable.")
        require_positive("stepsize", stepsize)
        self.objective, self.prox, self.stepsize = objective, prox, stepsize

    def forward(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return the state after one step."""
        gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
        return self.prox(x - self.stepsize * gradient, self.stepsize, *params)


class ProjectedGradient(ProximalGradient):
    """One step of projected gradient descent: x -> P(x - alpha grad f(x, c), c) (eq. 4).

    Args:
        objective: as for `ProximalGradient`. projection: P(x, *params) -> x, such as those of `foldopt.projections`.
        stepsize: alpha > 0.
    """

    def __init__(self, objective: Objective, projection: Callable[..., Tensor], stepsize: float) -> None:
        if not callable(projection):
            raise InputError(f"projection={projection!r} is not callable.")
        super().__init__(objective, _Projection(projection), stepsize)


class _Projection(nn.Module):
    """A projection as the proximal operator of an indicator function, which no weight changes."""

    def __init__(self, projection: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: Tensor, _: float, *params: Tensor) -> Tensor:
        return self.projection(x, *params)
