"""Programs for the SQP step: given by functions and automatic differentiation, or by your own quadratic model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from foldopt.errors import InputError
from foldopt.updates.external import hessian_times_step

__all__ = ["Bound", "SQPData", "SQPProgram", "SQPState", "SmoothProgram"]

Bound = Tensor | Callable[..., Tensor]
SQPState = tuple[Tensor, Tensor, Tensor]


class SQPData(NamedTuple):
    """The quadratic model of a batch of programs at (x, nu, lam), which the SQP step solves (paper eq. 31).

    Attributes:
        gradient: gradient of the objective f, (B, n).
        hessian: Hessian of the Lagrangian f + nu.h + lam.g, (B, n, n).
        h: values of the equality constraints h = 0, (B, p).
        jacobian_h: Jacobian of h, (B, p, n).
        g: values of the inequality constraints g <= 0, (B, m).
        jacobian_g: Jacobian of g, (B, m, n).

    Source: paper, eq. 31; Nocedal and Wright, Numerical Optimization (2006), section 18.1.

    Examples:
        Minimize x^2 / 2 subject to 1 - x <= 0, at x = 3 with the multiplier 2:

        >>> program = SmoothProgram(lambda x: x.square().sum(1) / 2, inequalities=lambda x: 1 - x)
        >>> x, none, lam = torch.tensor([[3.0]]), torch.zeros(1, 0), torch.tensor([[2.0]])
        >>> data = SQPData(*program.sqp_data(x, none, lam))
        >>> data.gradient, data.g, data.jacobian_g
        (tensor([[3.]]), tensor([[-2.]]), tensor([[[-1.]]]))
    """

    gradient: Tensor
    hessian: Tensor
    h: Tensor
    jacobian_h: Tensor
    g: Tensor
    jacobian_g: Tensor


class SQPProgram(Protocol):
    """The protocol of a program min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 (paper eq. 1) that `SQP` accepts.

    Any object with the method `sqp_data` will do. Write one if you know the derivatives of your program in closed
    form; otherwise use a `SmoothProgram`, which finds them by automatic differentiation.

    Source: paper, eqs. 1 and 31.

    Examples:
        Minimize |x - c|^2 / 2 subject to |x|^2 <= 1, with derivatives written by hand. The solution for c = (3, 4) is
        (0.6, 0.8) with the multiplier 2, which a step leaves as it is:

        >>> class NearestInBall:
        ...     def sqp_data(self, x, nu, lam, c):
        ...         hessian = (1 + 2 * lam)[:, :, None] * torch.eye(x.shape[1], dtype=x.dtype)
        ...         g, jacobian_g = x.square().sum(1, keepdim=True) - 1, 2 * x[:, None]
        ...         return x - c, hessian, nu, jacobian_g[:, :0], g, jacobian_g
        >>> x, c = (torch.tensor([point], dtype=torch.float64) for point in ([0.6, 0.8], [3.0, 4.0]))
        >>> lam = torch.tensor([[2.0]], dtype=torch.float64)
        >>> x, nu, lam = foldopt.SQP(NearestInBall())((x, x[:, :0], lam), c)
        >>> x, lam.round(decimals=6)
        (tensor([[0.6000, 0.8000]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
    """

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData | tuple[Tensor, ...]:
        """Return the quadratic model at (x, nu, lam).

        The code must be differentiable by PyTorch with respect to all of its arguments.

        Args:
            x: the point, (B, n).
            nu: multipliers of the equalities, (B, p).
            lam: multipliers of the inequalities, (B, m).
            *params: parameters c of the program.

        Returns:
            An `SQPData`, or a tuple of its six tensors in the same order.
        """
        ...


class SmoothProgram(nn.Module):
    """A smooth program given by functions; its quadratic model comes from automatic differentiation.

    The program is min f(x, c) subject to h(x, c) = 0, g(x, c) <= 0 and lower <= x <= upper, convex or not, for every
    sample of a batch. The functions must be twice differentiable and must treat the samples independently.

    Bounds are appended to the constraints. A variable with lower = upper in all samples is a row x[j] - lower[j] of h.
    The other finite lower bounds, and then the finite upper bounds, are rows of g. If a bound is finite in some samples
    only, its row has the constant value -1 in the others.

    Args:
        objective: f(x, *params) -> (B,), for x of shape (B, n).
        equalities: h(x, *params) -> (B, p), constraints h = 0; default None: no equalities.
        inequalities: g(x, *params) -> (B, m), constraints g <= 0; default None: no inequalities.
        lower: lower bounds of the variables, a tensor (n,) or (B, n), or a function of the parameters that returns one.
            An entry of -inf is no bound; default None: no lower bounds.
        upper: upper bounds of the variables, in the same form. An entry of inf is no bound; default None: no upper
            bounds.

    Raises:
        InputError: when the program is evaluated: a function or a bound has the wrong shape, or a function leaves
            PyTorch. The message names it.

    Source: paper, eq. 1.

    Examples:
        Minimize |x - c|^2 / 2 subject to x_1 + x_2 = 2 and x >= 0. The two bounds are inequalities:

        >>> def objective(x, c):
        ...     return (x - c).square().sum(1) / 2
        >>> def equality(x, c):
        ...     return x.sum(1, keepdim=True) - 2
        >>> program = foldopt.SmoothProgram(objective, equality, lower=torch.zeros(2))
        >>> f, h, g = program.values(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
        >>> f, h, g
        (tensor([2.5000]), tensor([[1.]]), tensor([[-1., -2.]]))
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
        """Evaluate the objective and all constraints.

        Args:
            x: the point, (B, n).
            *params: parameters c of the functions.

        Returns:
            f (B,), h (B, p) and g (B, m), the last two with the rows of the bounds.

        Raises:
            InputError: a function or a bound has the wrong shape.
        """
        f = checked("objective", self.objective(x, *params), x, 1)
        return f, self.constraints_of(x, "equalities", *params), self.constraints_of(x, "inequalities", *params)

    def constraints(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return the constraints h and g at x (B, n), concatenated to (B, p + m)."""
        return torch.cat([self.constraints_of(x, kind, *params) for kind in ("equalities", "inequalities")], 1)

    def lagrangian(self, x: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        """Return the Lagrangian f + nu.h + lam.g at x, (B,), where y (B, p + m) holds nu and then lam."""
        return self.objective(x, *params) + (y * self.constraints(x, *params)).sum(1)

    def constraints_of(self, x: Tensor, kind: str, *params: Tensor) -> Tensor:
        """Evaluate the constraints of one kind, with the rows of the bounds.

        Args:
            x: the point, (B, n).
            kind: "equalities" or "inequalities".
            *params: parameters c of the functions.

        Returns:
            h (B, p) or g (B, m).

        Raises:
            InputError: the function or a bound has the wrong shape.
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
        """Return the bounds of the variables.

        Args:
            x: the point, (B, n), for the shape, dtype and device of the bounds.
            *params: parameters c of the program.

        Returns:
            lower and upper, (B, n), with infinite entries where there is no bound.

        Raises:
            InputError: a bound has the wrong shape.
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
        """Return a name for each constraint, as messages use it: first the rows of h, then those of g."""
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
        """Return the quadratic model at (x, nu, lam) by automatic differentiation.

        Args:
            x: the point, (B, n).
            nu: multipliers of the equalities, (B, p).
            lam: multipliers of the inequalities, (B, m).
            *params: parameters c of the functions.

        Returns:
            The model of the Lagrangian f + nu.h + lam.g.

        Raises:
            InputError: a function or a bound has the wrong shape, or a function leaves PyTorch.
        """

        def h(z: Tensor) -> Tensor:
            return self.constraints_of(z, "equalities", *params)

        def g(z: Tensor) -> Tensor:
            return self.constraints_of(z, "inequalities", *params)

        y = torch.cat([nu, lam], 1)
        slope = torch.func.grad(lambda z: self.lagrangian(z, y, *params).sum())
        try:
            gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
            with hessian_times_step():
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
    """Check the shape of a function's value at x (B, n) and return the value.

    Args:
        name: name of the function, for the message.
        value: what the function returned.
        x: the point, (B, n).
        dim: 1 if the shape must be (B,), 2 if it must be (B, number of constraints).

    Returns:
        The value.

    Raises:
        InputError: the value has another shape.
    """
    if value.dim() != dim or len(value) != len(x):
        expected = (len(x),) if dim == 1 else f"({len(x)}, number of constraints)"
        raise InputError(
            f"{name} returned shape {tuple(value.shape)} for x of shape {tuple(x.shape)}, expected {expected}; "
            "reduce over the variables only."
        )
    return value


def _bounded(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which variables are fixed, which others have a lower and which an upper bound, as masks (n,)."""
    fixed = ((lower == upper) & lower.isfinite()).all(0)
    return fixed, lower.isfinite().any(0) & ~fixed, upper.isfinite().any(0) & ~fixed


def batched_jacobian(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Return the Jacobian (B, rows, n) at x (B, n) of a function (B, n) -> (B, rows) of independent samples."""
    if rows == 0:
        return x.new_zeros(len(x), 0, x.shape[1])
    pull = torch.func.vjp(function, x)[1]
    basis = torch.eye(rows, dtype=x.dtype, device=x.device)[:, None, :].expand(rows, len(x), rows)
    return torch.func.vmap(lambda v: pull(v)[0])(basis).transpose(0, 1)
