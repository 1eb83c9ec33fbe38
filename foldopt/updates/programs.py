"""Programs that SQP can model: by functions and automatic differentiation, or by a model of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from foldopt.errors import InputError

__all__ = ["SQPData", "SQPProgram", "SQPState", "SmoothProgram"]

SQPState = tuple[Tensor, Tensor, Tensor]


class SQPData(NamedTuple):
    """The quadratic model of a program at (x, nu, lam): what eq. (31) needs, batched.

    gradient of f (B, n); hessian of the Lagrangian (B, n, n); h (B, p) and its Jacobian (B, p, n); g (B, m) and its
    Jacobian (B, m, n).
    """

    gradient: Tensor
    hessian: Tensor
    h: Tensor
    jacobian_h: Tensor
    g: Tensor
    jacobian_g: Tensor


class SQPProgram(Protocol):
    """A parametric program min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 (paper eq. 1) that SQP can model."""

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData | tuple[Tensor, ...]:
        """Return the quadratic model at (x, nu, lam), as differentiable code."""
        ...


class SmoothProgram(nn.Module):
    """A program given by functions; its quadratic model comes from automatic differentiation.

    Args:
        objective: f(x, *params) -> (B,), x of shape (B, n).
        equalities: h(x, *params) -> (B, p), or None.
        inequalities: g(x, *params) -> (B, m), meant as g <= 0, or None.

    The functions treat the samples of a batch independently and are twice differentiable.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        equalities: Callable[..., Tensor] | None = None,
        inequalities: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.equalities, self.inequalities = objective, equalities, inequalities

    def values(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f (B,), h (B, p) and g (B, m) at x.

        Raises InputError if a function returns another shape.
        """
        f, h, g = (
            self.objective(x, *params),
            self._constraint("equalities", x, params),
            self._constraint("inequalities", x, params),
        )
        for name, value, dim in (("objective", f, 1), ("equalities", h, 2), ("inequalities", g, 2)):
            if value.dim() != dim or len(value) != len(x):
                expected = (len(x),) if dim == 1 else f"({len(x)}, number of constraints)"
                raise InputError(
                    f"{name} returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}, expected {expected}; "
                    "reduce over the variables only."
                )
        return f, h, g

    def constraints(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return h and g at x side by side, (B, p + m)."""
        return torch.cat([self._constraint("equalities", x, params), self._constraint("inequalities", x, params)], 1)

    def lagrangian(self, x: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        """Return f + nu.h + lam.g at x, (B,), for y = (nu, lam), (B, p + m)."""
        return self.objective(x, *params) + (y * self.constraints(x, *params)).sum(1)

    def _constraint(self, name: str, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        function = getattr(self, name)
        return x.new_zeros(len(x), 0) if function is None else function(x, *params)

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam); the Lagrangian is f + nu.h + lam.g."""

        def h(z: Tensor) -> Tensor:
            return self._constraint("equalities", z, params)

        def g(z: Tensor) -> Tensor:
            return self._constraint("inequalities", z, params)

        y = torch.cat([nu, lam], 1)
        gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
        slope = torch.func.grad(lambda z: self.lagrangian(z, y, *params).sum())
        hessian = _batched_jacobian(slope, x, x.shape[1])
        return SQPData(
            gradient, hessian, h(x), _batched_jacobian(h, x, nu.shape[1]), g(x), _batched_jacobian(g, x, lam.shape[1])
        )


def _batched_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Jacobian (B, rows, n) of a function (B, n) -> (B, rows) whose samples are independent."""
    if rows == 0:
        return x.new_zeros(len(x), 0, x.shape[1])
    pull = torch.func.vjp(function, x)[1]
    basis = torch.eye(rows, dtype=x.dtype, device=x.device)[:, None, :].expand(rows, len(x), rows)
    return torch.func.vmap(lambda v: pull(v)[0])(basis).transpose(0, 1)
