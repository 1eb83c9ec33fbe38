"""Programs that SQP can model: by functions and automatic differentiation, or by a model of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from foldopt.errors import InputError

__all__ = ["Bound", "SQPData", "SQPProgram", "SQPState", "SmoothProgram"]

Bound = Tensor | Callable[..., Tensor]
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
        lower: bounds lower <= x, a tensor (n,) or (B, n) or a function of the parameters that returns one; None or an
            entry of -inf is no bound.
        upper: bounds x <= upper, likewise, with +inf.

    The functions treat the samples of a batch independently and are twice differentiable. Bounds are rows behind the
    others: a variable with lower = upper in all samples is a row x[j] - lower[j] of h, the finite lower bounds and
    then the finite upper ones are rows of g. A bound that is finite in some samples only is the constant -1 in the
    others.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        equalities: Callable[..., Tensor] | None = None,
        inequalities: Callable[..., Tensor] | None = None,
        lower: Bound | None = None,
        upper: Bound | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.equalities, self.inequalities = objective, equalities, inequalities
        self.lower, self.upper = lower, upper

    def values(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return f (B,), h (B, p) and g (B, m) at x.

        Raises InputError if a function returns another shape.
        """
        f = checked("objective", self.objective(x, *params), x, 1)
        return f, self.constraints_of(x, "equalities", *params), self.constraints_of(x, "inequalities", *params)

    def constraints(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return h and g at x side by side, (B, p + m)."""
        return torch.cat([self.constraints_of(x, kind, *params) for kind in ("equalities", "inequalities")], 1)

    def lagrangian(self, x: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        """Return f + nu.h + lam.g at x, (B,), for y = (nu, lam), (B, p + m)."""
        return self.objective(x, *params) + (y * self.constraints(x, *params)).sum(1)

    def constraints_of(self, x: Tensor, kind: str, *params: Tensor) -> Tensor:
        """Return h (B, p) for kind "equalities", g (B, m) for "inequalities", the bounds' rows among them.

        Raises InputError if a function returns another shape.
        """
        function = getattr(self, kind)
        own = x.new_zeros(len(x), 0) if function is None else checked(kind, function(x, *params), x, 2)
        if self.lower is None and self.upper is None:
            return own
        lower, upper = self.bounds(x, *params)
        fixed, below, above = _bounded(lower, upper)
        if kind == "equalities":
            return torch.cat([own, (x - lower)[:, fixed]], 1)
        lower, upper = torch.where(lower.isfinite(), lower - x, -1), torch.where(upper.isfinite(), x - upper, -1)
        return torch.cat([own, lower[:, below], upper[:, above]], 1)

    def bounds(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower and upper, (B, n), with infinite entries where there is no bound.

        Raises InputError if a bound has another shape.
        """
        found = []
        for name, bound, none in (("lower", self.lower, -torch.inf), ("upper", self.upper, torch.inf)):
            value: Tensor = bound(*params) if callable(bound) else x.new_tensor(none) if bound is None else bound
            if value.dim() and (value.shape[-1] != x.shape[1] or value.dim() > 2):
                raise InputError(
                    f"{name} has shape {tuple(value.shape)} for x of shape {tuple(x.shape)}, expected (n,) or (B, n)."
                )
            found.append(value.to(x).expand_as(x))
        return found[0], found[1]

    def row_names(self, x: Tensor, *params: Tensor) -> list[str]:
        """Return what to call each constraint in a message, the rows of h and then those of g."""
        _, h, g = self.values(x, *params)
        fixed, below, above = (index.nonzero()[:, 0].tolist() for index in _bounded(*self.bounds(x, *params)))
        return [
            *(f"equalities[{i}]" for i in range(h.shape[1] - len(fixed))),
            *(f"lower[{j}] = upper[{j}]" for j in fixed),
            *(f"inequalities[{i}]" for i in range(g.shape[1] - len(below) - len(above))),
            *(f"lower[{j}]" for j in below),
            *(f"upper[{j}]" for j in above),
        ]

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam); the Lagrangian is f + nu.h + lam.g."""

        def h(z: Tensor) -> Tensor:
            return self.constraints_of(z, "equalities", *params)

        def g(z: Tensor) -> Tensor:
            return self.constraints_of(z, "inequalities", *params)

        y = torch.cat([nu, lam], 1)
        slope = torch.func.grad(lambda z: self.lagrangian(z, y, *params).sum())
        try:
            gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
            hessian = batched_jacobian(slope, x, x.shape[1])
            jacobian_h, jacobian_g = batched_jacobian(h, x, nu.shape[1]), batched_jacobian(g, x, lam.shape[1])
        except RuntimeError as error:
            if "doesn't have storage" not in str(error):
                raise
            raise InputError(
                "a function of the program leaves PyTorch, as by .numpy(), so that it has no derivatives: write it in "
                "PyTorch, or give its derivatives in a foldopt.ExternalFunction."
            ) from error
        return SQPData(gradient, hessian, h(x), jacobian_h, g(x), jacobian_g)


def checked(name: str, value: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return what the function `name` returned for x (B, n), of shape (B,) for dim 1 and (B, any) for dim 2.

    Raises InputError if it has another shape.
    """
    if value.dim() != dim or len(value) != len(x):
        expected = (len(x),) if dim == 1 else f"({len(x)}, number of constraints)"
        raise InputError(
            f"{name} returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}, expected {expected}; "
            "reduce over the variables only."
        )
    return value


def _bounded(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which variables are fixed, have a lower bound and have an upper one, (n,) bool each."""
    fixed = ((lower == upper) & lower.isfinite()).all(0)
    return fixed, lower.isfinite().any(0) & ~fixed, upper.isfinite().any(0) & ~fixed


def batched_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Return the Jacobian (B, rows, n) of a function (B, n) -> (B, rows) whose samples are independent."""
    if rows == 0:
        return x.new_zeros(len(x), 0, x.shape[1])
    pull = torch.func.vjp(function, x)[1]
    basis = torch.eye(rows, dtype=x.dtype, device=x.device)[:, None, :].expand(rows, len(x), rows)
    return torch.func.vmap(lambda v: pull(v)[0])(basis).transpose(0, 1)
