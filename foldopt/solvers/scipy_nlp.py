"""SciPy's solvers as black boxes for smooth programs, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldopt.errors import MissingDependencyError
from foldopt.updates.programs import SmoothProgram

__all__ = ["METHODS", "solve_scipy"]

METHODS = ("slsqp", "trust-constr")


def _minimize(method: str) -> Callable[..., Any]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise MissingDependencyError(
            f"solver={method!r} needs scipy: pip install scipy, or take solver='sqp', which is built in."
        ) from error
    return minimize


def solve_scipy(program: SmoothProgram, method: str, start: Tensor, *params: Tensor) -> Tensor:
    """Minimize every sample of a program from `start` (B, n) with the method "slsqp" or "trust-constr".

    Returns x (B, n) as the method left it: the fixed-point residual of the layer tells the samples where it failed.
    Raises MissingDependencyError if the package is not installed.
    """
    solve = _minimize(method)
    options = {
        "slsqp": {"ftol": 1e-14, "maxiter": 500},
        "trust-constr": {"gtol": 1e-10, "xtol": 1e-12, "maxiter": 2000},
    }[method]
    x = start.detach().double().cpu().clone()
    for i in range(len(x)):
        # The functions see the whole batch, since only they know which of the parameters it shares.
        def evaluate(z: Any, part: int, i: int = i, derivative: bool = False) -> Any:
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
            for part, kind, sign in ((1, "eq", 1.0), (2, "ineq", -1.0))
            if evaluate(x[i], part).size
        ]
        found = solve(
            lambda z: float(evaluate(z, 0)),
            x[i].numpy().copy(),
            jac=lambda z: evaluate(z, 0, derivative=True),
            constraints=constraints,
            options=options,
            method=method,
        )
        x[i] = torch.as_tensor(found.x)
    return x.to(start)
