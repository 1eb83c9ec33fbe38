"""Sequential quadratic programming as an update step (paper eqs. 31-32)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from foldopt.errors import InputError
from foldopt.solvers.qp import QPSolution, solve_qp

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

    def _constraint(self, name: str, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        function = getattr(self, name)
        return x.new_zeros(len(x), 0) if function is None else function(x, *params)

    def sqp_data(self, x: Tensor, nu: Tensor, lam: Tensor, *params: Tensor) -> SQPData:
        """Return the quadratic model at (x, nu, lam); the Lagrangian is f + nu.h + lam.g."""

        def h(z: Tensor) -> Tensor:
            return self._constraint("equalities", z, params)

        def g(z: Tensor) -> Tensor:
            return self._constraint("inequalities", z, params)

        def lagrangian(z: Tensor) -> Tensor:
            return (self.objective(z, *params) + (nu * h(z)).sum(1) + (lam * g(z)).sum(1)).sum()

        gradient = torch.func.grad(lambda z: self.objective(z, *params).sum())(x)
        hessian = _batched_jacobian(torch.func.grad(lagrangian), x, x.shape[1])
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


class SQP(nn.Module):
    """One SQP step on a program: ``SQP(program)((x, nu, lam), *params) -> (x, nu, lam)``.

    Solves the quadratic model (31), with the factor 1/2 that the paper's (31a) lacks, for (d, mu) and returns
    x + alpha d, lam + alpha (mu - lam) (eq. 32c as it must read). The inner QP is differentiated through its KKT
    system on the active set. At a KKT point with linearly independent active constraints and alpha = 1, Phi = 0: SQP
    is Newton's method there, so folding it is one KKT solve. Nocedal and Wright, Numerical Optimization, ch. 18.

    Args:
        program: any object with ``sqp_data`` (`SQPProgram`), such as a `SmoothProgram`.
        stepsize: alpha in (0, 1].

    State: x (B, n), nu (B, p) for the equalities, lam (B, m) for the inequalities. The model's Hessian has to be
    positive semidefinite. ``last`` holds the inner QP's solution with its per-sample ``ok`` and ``singular``.
    """

    def __init__(self, program: SQPProgram, stepsize: float = 1.0) -> None:
        super().__init__()
        if not callable(getattr(program, "sqp_data", None)):
            raise InputError(
                f"program={program!r} has no method sqp_data; wrap its functions in foldopt.SmoothProgram."
            )
        if not 0 < stepsize <= 1:
            raise InputError(f"stepsize={stepsize}: SQP takes a step in (0, 1].")
        self.program, self.stepsize = program, stepsize
        self.last: QPSolution | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step."""
        x, nu, lam = state
        data = SQPData(*self.program.sqp_data(x, nu, lam, *params))
        guess = (lam > -data.g).detach()
        qp = solve_qp(data.hessian, data.gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g, guess)
        self.last = QPSolution(*(t.detach() for t in qp))
        a = self.stepsize
        return x + a * qp.x, nu + a * (qp.nu - nu), lam + a * (qp.lam - lam)

    def inverse(self, g: Tensor, transposed: bool, stepped: SQPState, state: SQPState, *params: Tensor) -> Tensor:
        """Return v = Phi^T v + g, (B, N), for Phi = (1 - alpha) I, which it is at a regular KKT point."""
        return g / self.stepsize
