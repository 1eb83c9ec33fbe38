"""SciPy's solvers as black boxes for smooth programs; they solve one sample at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.errors import InputError, MissingDependencyError
from foldopt.updates.programs import SmoothProgram

__all__ = ["METHODS", "STATUS", "SciPySolution", "solve_scipy"]

METHODS = ("slsqp", "trust-constr")
STATUS = {  # by SciPy's exit code; codes that are missing here mean "no progress"
    "slsqp": {0: "solved", 9: "iteration limit"},
    "trust-constr": {0: "iteration limit", 1: "solved", 2: "solved"},
}


def _minimize(method: str) -> Callable[..., Any]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingDependencyError(
            f"solver={method!r} needs scipy: pip install scipy, or take solver='sqp', which is built in."
        ) from error
    return minimize


class SciPySolution(NamedTuple):
    """What SciPy found, sample by sample.

    Attributes:
        x: the solutions, (B, n); the last iterate where a sample is not solved.
        status: "solved" for each sample, or why it is not: "iteration limit", "time limit" or "no progress".

    Examples:
        >>> found = SciPySolution(torch.zeros(1, 2), ("iteration limit",))
        >>> found.status
        ('iteration limit',)
    """

    x: Tensor
    status: tuple[str, ...]


def solve_scipy(
    program: SmoothProgram,
    method: str,
    start: Tensor,
    *params: Tensor,
    tol: float = 1e-10,
    max_iter: int | None = None,
    time_limit: float | None = None,
) -> SciPySolution:
    """Minimize each sample of a program by scipy.optimize.minimize, with exact first derivatives.

    The status is SciPy's own claim and may be wrong. A layer checks the solution by the residual of its update step.

    Args:
        program: the functions and bounds of the program.
        method: "slsqp" (sequential least squares) or "trust-constr" (a trust-region interior point method).
        start: where the solver starts, (B, n).
        *params: parameters c of the functions.
        tol: tolerance of trust-constr for the gradient of the Lagrangian; slsqp stops at a change of the objective
            below tol ** 1.4. Default 1e-10.
        max_iter: largest number of iterations for each sample; default None: 500 for slsqp, 2000 for trust-constr.
        time_limit: seconds for each sample; default None: no limit.

    Returns:
        A `SciPySolution` in the dtype and on the device of `start`.

    Raises:
        InputError: `method` is unknown, or a function of the program returns a wrong shape.
        MissingDependencyError: scipy is not installed.

    Source: Kraft, A software package for sequential quadratic programming (1988), for slsqp; Byrd, Hribar and Nocedal,
    An interior point algorithm for large-scale nonlinear programming (1999), for trust-constr.

    Examples:
        Find the point of the unit ball that is nearest to (3, 4):

        >>> from foldopt import SmoothProgram
        >>> def distance(x, c):
        ...     return (x - c).square().sum(1)
        >>> program = SmoothProgram(distance, inequalities=lambda x, c: x.square().sum(1, keepdim=True) - 1)
        >>> c = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        >>> found = solve_scipy(program, "trust-constr", torch.zeros_like(c), c)
        >>> found.x, found.status
        (tensor([[0.6000, 0.8000]], dtype=torch.float64), ('solved',))
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; choose one of {METHODS}.")
    solve = _minimize(method)
    options = {
        "slsqp": {"ftol": tol**1.4, "maxiter": 500 if max_iter is None else max_iter},
        "trust-constr": {"gtol": tol, "xtol": tol**1.2, "maxiter": 2000 if max_iter is None else max_iter},
    }[method]
    x, status = start.detach().double().cpu().clone(), []
    _, h, g = program.values(start, *params)
    kinds = [kind for kind in ((1, "eq", 1.0), (2, "ineq", -1.0)) if (h, g)[kind[0] - 1].shape[1]]
    for i in range(len(x)):
        deadline = time.monotonic() + (float("inf") if time_limit is None else time_limit)

        # Evaluate the whole batch, because only the functions know which parameters all samples share.
        def evaluate(z: Any, part: int, i: int = i, deadline: float = deadline, derivative: bool = False) -> Any:
            if time.monotonic() > deadline:
                raise _OutOfTimeError(z)
            row = torch.as_tensor(z, dtype=x.dtype)

            def value(r: Tensor) -> Tensor:
                whole = torch.cat([x[:i], r[None], x[i + 1 :]]).to(start)
                return program.values(whole, *params)[part][i].to(r)

            return (torch.func.jacrev(value)(row) if derivative else value(row)).numpy()

        constraints = [
            {
                "type": kind,
                "fun": lambda z, part=part, sign=sign: sign * evaluate(z, part),
                "jac": lambda z, part=part, sign=sign: sign * evaluate(z, part, derivative=True),
            }
            for part, kind, sign in kinds
        ]
        try:
            found = solve(
                lambda z: float(evaluate(z, 0)),
                x[i].numpy().copy(),
                jac=lambda z: evaluate(z, 0, derivative=True),
                constraints=constraints,
                options=options,
                method=method,
            )
        except _OutOfTimeError as late:
            x[i], cause = torch.as_tensor(late.x), "time limit"
        else:
            x[i], cause = torch.as_tensor(found.x), STATUS[method].get(found.status, "no progress")
        status.append(cause)
    return SciPySolution(x.to(start), tuple(status))


class _OutOfTimeError(Exception):
    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = x
