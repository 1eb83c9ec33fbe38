"""The folded layer inside `foldopt.NLPLayer`, the solvers that it knows by name, and the errors of failed samples."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from foldopt._certificates import FoldInfo
from foldopt._layer import TOLERANCE, FixedPointLayer
from foldopt.errors import (
    FixedPointError,
    InfeasibleError,
    LimitError,
    NoMultipliersError,
    NotSmoothError,
    SolverError,
    UnboundedError,
)
from foldopt.solvers._nlp_causes import CAUSES
from foldopt.solvers.ipopt import solve_ipopt
from foldopt.solvers.nlp import solve_nlp
from foldopt.solvers.scipy_nlp import solve_scipy
from foldopt.step import Tensors
from foldopt.updates._conditions import cancelling
from foldopt.updates.programs import SmoothProgram, SQPState
from foldopt.updates.sparse_sqp import SparseSQP
from foldopt.updates.sqp import SQP

__all__ = ["NLPFold", "solved_by"]

OWN = "infeasible", "unbounded", "not smooth", "no multipliers"  # causes that only the built-in solver tells apart
DISAGREE = "step and solution disagree"
ERRORS: dict[str, type[SolverError]] = {
    "infeasible": InfeasibleError,
    "unbounded": UnboundedError,
    "not smooth": NotSmoothError,
    "no multipliers": NoMultipliersError,
    DISAGREE: FixedPointError,
}
WHAT = {
    "unbounded": "feasible points of ever lower objective lead away without end",
    "not smooth": "the gradient of a function jumps near the last iterate",
    "no multipliers": "the multipliers grow without bound, as the active constraints fail the qualification of "
    "Mangasarian and Fromovitz",
    "iteration limit": "raise max_iter=, or start closer to a solution",
    "time limit": "raise time_limit=, or start closer to a solution",
    "not finite": "a function or a derivative is NaN or inf",
    "no progress": "no step lowers the objective or the violation of the constraints",
    DISAGREE: "the solver's answer is no KKT point",
}


class NLPFold(FixedPointLayer):
    """The folded layer of an `NLPLayer`: it measures x, nu and lam separately and says why a sample failed."""

    update: SQP | SparseSQP
    call: _Call

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.call = _Call()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "call": _Call()})

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Return the certificates, and raise or warn about unsolved samples as `on_failure` says.

        Args:
            state: x (B, n), nu (B, p) and lam (B, m).
            stepped: the state after one update step.
        """
        params, causes = self.call.params, self.call.causes
        self.call.params, self.call.causes = (), None
        tol = self.tol or TOLERANCE[state[0].dtype]
        residual = torch.stack([_change(old, new.detach()) for old, new in zip(state, stepped, strict=True)]).amax(0)
        solved = residual <= tol
        if causes is None and solved.all():
            return FoldInfo(residual, solved)
        said = [cause if cause != "solved" else DISAGREE for cause in causes or ["solved"] * len(residual)]
        if causes is not None and "solved" in causes and not solved.all() and isinstance(self.update, SQP):
            large = cancelling(cast(SmoothProgram, self.update.program), cast(SQPState, state), params).tolist()
            said = [
                "no multipliers" if one and cause == DISAGREE else cause for one, cause in zip(large, said, strict=True)
            ]
        names = tuple("solved" if ok else cause for ok, cause in zip(solved.tolist(), said, strict=True))
        info = FoldInfo(residual, solved, names if causes is not None else None)
        if not solved.all():
            _explain(self.on_failure, cast(SmoothProgram, self.update.program), state, names, residual, params)
        return info


class _Call(threading.local):
    """What the solver hands to `certify` within one call: the parameters, and the outcome of each sample if known."""

    params: Tensors = ()
    causes: tuple[str, ...] | None = None


def solved_by(
    solver: str,
    layer: NLPFold,
    program: SmoothProgram,
    start: Tensor,
    params: Tensors,
    limits: Mapping[str, float | None],
) -> tuple[Tensors, tuple[str, ...]]:
    """Solve a program by a solver that is known by name.

    If SciPy made no progress in a sample, the built-in solver starts at SciPy's last iterate to find the cause.

    Args:
        solver: "sqp", "ipopt", "slsqp" or "trust-constr".
        layer: the folded layer, for its tolerance and its sparse derivatives.
        program: the program.
        start: where the solver starts, (B, n).
        params: parameters of the program.
        limits: `max_iter` and `time_limit`; None takes the default of the solver.

    Returns:
        The tensors (x,) or (x, nu, lam), and for each sample "solved" or the cause of its failure.
    """
    eps = torch.finfo(start.dtype).eps
    given = {name: value for name, value in limits.items() if value is not None}
    options: dict[str, Any] = {"tol": max(1e-4 * (layer.tol or TOLERANCE[start.dtype]), 50 * eps), **given}
    if solver == "sqp":
        found = solve_nlp(program, start, *params, **options)
        return found[:3], tuple(CAUSES[i] for i in found.cause.tolist())
    if solver == "ipopt":
        sparse = layer.update.derivatives if isinstance(layer.update, SparseSQP) else None
        answer = solve_ipopt(program, start, *params, sparse=sparse, **options)
        return answer[:3], answer.status
    x, status = solve_scipy(program, solver, start, *params, **options)
    if "no progress" in status:
        seen = solve_nlp(program, x, *params, **options)
        own = [CAUSES[i] if old == "no progress" else old for old, i in zip(status, seen.cause.tolist(), strict=True)]
        told = torch.tensor([new in OWN for new in own], device=x.device)
        x = torch.where(told[:, None], seen.x, x)
        status = tuple(new if new in OWN else old for new, old in zip(own, status, strict=True))
    return (x,), status


def _change(old: Tensor, new: Tensor) -> Tensor:
    return torch.linalg.vector_norm(new - old, dim=1) / (1 + torch.linalg.vector_norm(old, dim=1))


def _explain(
    policy: str, program: SmoothProgram, state: Tensors, names: tuple[str, ...], residual: Tensor, params: Tensors
) -> None:
    """Raise an error or warn about the samples that were not solved, listed by cause."""
    if policy in ("nan", "zero"):
        return
    failed = [i for i, name in enumerate(names) if name != "solved"]
    causes = sorted({names[i] for i in failed}, key=lambda cause: ([*ERRORS, *WHAT, cause].index(cause), cause))
    said = []
    for cause in causes:
        indices = [i for i, name in enumerate(names) if name == cause]
        worst = indices[int(residual[indices].nan_to_num(nan=torch.inf).argmax())]
        what = (
            _least_violation(program, state[0], worst, params)
            if cause == "infeasible"
            else WHAT.get(cause, "so says the solver")
        )
        said.append(
            f"{cause} at {len(indices)} of {len(names)} samples, worst at index {worst}, first {indices[:10]}: {what} "
            f"(||U(x*, c) - x*|| / (1 + ||x*||) is {float(residual[worst]):.1e})"
        )
    message = (
        f"NLPLayer found no solution: {'; '.join(said)}. Mend these programs, take another start= or solver=, or "
        "choose on_failure='nan'|'zero'."
    )
    if policy == "raise":
        raise ERRORS.get(causes[0], LimitError)(message, failed)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _least_violation(program: SmoothProgram, x: Tensor, sample: int, params: Tensors) -> str:
    """Describe, for a message, the violation of the constraints at the point of least violation that was found."""
    _, h, g = program.values(x, *params)
    violation = torch.cat([h.abs(), g.clamp(min=0)], 1)[sample]
    name = program.row_names(x, *params)[int(violation.argmax())]
    return (
        f"no point near the last iterate violates the constraints less, {name} most, by {float(violation.max()):.1e}, "
        f"all together by {float(violation.sum()):.1e}"
    )
