"""SciPy's solvers as black boxes for smooth programs, one sample at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.errors import MissingDependencyError
from foldopt.updates.programs import SmoothProgram

__all__ = ["METHODS", "STATUS", "SciPySolution", "solve_scipy"]

METHODS = ("slsqp", "trust-constr")
STATUS = {  # by SciPy's number; what is not here made no progress
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
    """What SciPy found: x (B, n), as the method left it, and the status of each sample, "solved" or why it is not."""

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
    """Minimize every sample of a program with a method of scipy.optimize, with exact first derivatives.

    Args:
        program: the functions.
        method: "slsqp" or "trust-constr".
        start: where to begin, (B, n).
        *params: the parameters of the functions.
        tol: of the gradient; the relative change of the objective that stops slsqp is tol ** 1.4.
        max_iter: cap of the iterations of each sample; None for 500 (slsqp) or 2000 (trust-constr).
        time_limit: seconds for each sample, or None.

    Returns:
        A `SciPySolution`. What SciPy calls solved may be none: the residual of a layer's step tells.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    solve = _minimize(method)
    options = {
        "slsqp": {"ftol": tol**1.4, "maxiter": max_iter or 500},
        "trust-constr": {"gtol": tol, "xtol": tol**1.2, "maxiter": max_iter or 2000},
    }[method]
    x, status = start.detach().double().cpu().clone(), []
    _, h, g = program.values(start, *params)
    kinds = [kind for kind in ((1, "eq", 1.0), (2, "ineq", -1.0)) if (h, g)[kind[0] - 1].shape[1]]
    for i in range(len(x)):
        deadline = time.monotonic() + (time_limit or float("inf"))

        # The functions see the whole batch, since only they know which of the parameters it shares.
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
