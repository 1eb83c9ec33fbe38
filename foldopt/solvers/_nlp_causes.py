"""The causes for which a smooth program was not solved, and tests that tell some of them apart."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers._nlp_model import violation
from foldopt.solvers.interior_point import largest
from foldopt.updates.programs import SmoothProgram, SQPData, batched_jacobian

__all__ = ["CAUSES", "explained"]

(
    SOLVED,
    INFEASIBLE,
    UNBOUNDED,
    NOT_SMOOTH,
    NO_MULTIPLIERS,
    OUT_OF_ITERATIONS,
    OUT_OF_TIME,
    NOT_FINITE,
    STALLED,
    RUNNING,
) = range(10)
CAUSES = (
    "solved",
    "infeasible",
    "unbounded",
    "not smooth",
    "no multipliers",
    "iteration limit",
    "time limit",
    "not finite",
    "no progress",
)
NEARBY = 1e-2  # half the length, relative to 1 + |x|, of the line that is searched for a jump of a gradient
HALVINGS = 40  # number of times that the line is halved
JUMP = 1e-4  # smallest relative change of a gradient across the last part of the line that counts as a jump
VANISHING = 1e-5  # size of the constraints' gradients combined with the multipliers, relative to the sum of their sizes


def explained(
    program: SmoothProgram,
    x: Tensor,
    nu: Tensor,
    lam: Tensor,
    data: SQPData,
    cause: Tensor,
    params: tuple[Tensor, ...],
) -> Tensor:
    """Return the causes (B,), with a more precise one for samples that made no progress or ran out of iterations.

    A function is not smooth if its gradient jumps however short the distance is. A program has no multipliers if the
    multipliers of feasible iterates grow without bound: the sum of the constraints' gradients, weighted with the
    multipliers, then almost vanishes, so that the constraint qualification of Mangasarian and Fromovitz fails.

    Args:
        program: the program.
        x: the last iterates, (B, n).
        nu: multipliers of the equalities, (B, p).
        lam: multipliers of the inequalities, (B, m).
        data: the quadratic model there.
        cause: the causes so far, (B,) int.
        params: parameters of the program.
    """
    open_ = (cause == STALLED) | (cause == OUT_OF_ITERATIONS)
    if not open_.any():
        return cause
    feasible = violation(data.h, data.g) <= 1e-6 * (1 + largest(x))
    y, rows = torch.cat([nu, lam], 1), torch.cat([data.jacobian_h, data.jacobian_g], 1)
    weight = (y.abs() * rows.abs().sum(2).clamp(min=1)).sum(1)
    combined = largest(matvec(rows.mT, y))
    vanishing = open_ & feasible & (weight > 0) & (combined <= VANISHING * weight)
    cause = torch.where(vanishing, NO_MULTIPLIERS, cause)
    rough = open_ & ~vanishing & _jumps(program, x, params)
    return torch.where(rough, NOT_SMOOTH, cause)


def _jumps(program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """Return in which samples, (B,) bool, the gradient of a function jumps near x.

    A line through x is halved repeatedly. Each time the half across which the gradients change more is kept.
    """
    mixed = NEARBY * (1 + x.abs()) * torch.cos(torch.arange(1, x.shape[1] + 1).to(x))
    ends = [x - mixed, x + mixed]
    gradients = [_gradients(program, end, params) for end in ends]
    size = torch.maximum(*(g.abs().amax(2) for g in gradients)).clamp(min=1e-3)
    for _ in range(HALVINGS):
        middle = (ends[0] + ends[1]) / 2
        at = _gradients(program, middle, params)
        first = _change(gradients[0], at, size) >= _change(at, gradients[1], size)
        keep, part = first[:, None], first[:, None, None]
        ends = [torch.where(keep, ends[0], middle), torch.where(keep, middle, ends[1])]
        gradients = [torch.where(part, gradients[0], at), torch.where(part, at, gradients[1])]
    return _change(gradients[0], gradients[1], size) > JUMP


def _change(one: Tensor, other: Tensor, size: Tensor) -> Tensor:
    """Return the largest change (B,) of the functions' gradients, relative to `size` (B, number of functions)."""
    return ((one - other).abs().amax(2) / size).nan_to_num(0, 0, 0).amax(1)


def _gradients(program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """Return the gradients of f, h and g, (B, 1 + p + m, n)."""

    def functions(z: Tensor) -> Tensor:
        f, h, g = program.values(z, *params)
        return torch.cat([f[:, None], h, g], 1)

    return batched_jacobian(functions, x, functions(x).shape[1])
