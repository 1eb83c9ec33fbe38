"""The engine of quadratic programs: solves a batch to rounding, or finds out why a program has no solution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.qp._activity import complemented
from foldopt.qp._front import Front, nearby
from foldopt.qp._kkt import Known
from foldopt.qp._operations import (
    Matrix,
    assembled,
    column,
    identity,
    largest_in_columns,
    largest_in_rows,
    numbers,
    rescaled,
    where_samples,
    zeros,
)
from foldopt.qp._polish import EXACT, patterns, polish, refine
from foldopt.qp._program import INFINITE, Program, Units, equilibrate, residual
from foldopt.qp._sparse_kkt import positive_definite
from foldopt.qp.matrix import SparseMatrix

SOLVED = 1e-9  # largest relative KKT residual of a solution
CURVATURE = 1e-9  # negative curvature, relative to the equilibrated H, that is attributed to rounding
VIOLATION = 1e-8  # a program is infeasible if its least violation exceeds this, relative to the bounds
DESCENT = 1e-7  # a program is unbounded if its objective falls along a ray by more than this
FAR = 1e10  # solutions with an x of this size, where 1 is expected, are checked for infeasibility all the same
STATUS = ("solved", "infeasible", "unbounded", "nonconvex", "limit reached", "not finite")
GOOD, INFEASIBLE, UNBOUNDED, NONCONVEX, LIMIT, NOT_FINITE = range(len(STATUS))


class Solution(NamedTuple):
    """The result of the engine for every sample.

    x: (B, n). y: (B, r), the multipliers of l <= Cx <= u, positive at u and negative at l. Both are NaN in samples that
    were not solved. status: (B,) int, an index into `STATUS`. residual: (B,), the largest relative violation of the KKT
    conditions, see `foldopt.qp._program.residual`. units: the units of the equilibrated program. violation: (B,), in
    infeasible samples the least t for which l - t <= Cx <= u + t has a solution, in the units of the equilibrated rows.
    certificate: (B, r), in infeasible samples multipliers that prove it (C'y = 0, and y'Cx > 0 whenever
    l <= Cx <= u). ray: (B, n), in unbounded samples a direction along which the objective falls forever, else 0. known:
    the factored sparse systems of the active rows with which the polish ended, if any.
    """

    x: Tensor
    y: Tensor
    status: Tensor
    residual: Tensor
    units: Units
    violation: Tensor
    certificate: Tensor
    ray: Tensor
    known: list[Known | None]


def solve(program: Program, curvature: float = CURVATURE, front: Front | None = None) -> Solution:
    """Solve a batch of programs: equilibrate, find a first point, polish; find the cause if there is no solution.

    If multipliers are not unique, the result is strictly complementary: every row that can have a multiplier has one.

    Args:
        program: the programs in the user's units, float64; bounds may be infinite.
        curvature: the negative curvature of H that is attributed to rounding, relative to the largest entries in each
            of its rows.
        front: the solver that finds the first point; None: `nearby`.

    Returns:
        Solutions, statuses, and certificates where there is no solution.
    """
    finite = _finite(program)
    program = _cleaned(program, finite)
    units = equilibrate(program)
    scaled = units.scaled(program)
    convex = is_convex(scaled.H, curvature)
    todo = (finite & convex).nonzero()[:, 0]
    x, y = torch.full_like(program.q, torch.nan), torch.full_like(program.lower, torch.nan)
    worst = torch.full_like(program.q[:, 0], torch.inf)
    known: list[Known | None] = [None] * len(x)
    _minimize(scaled, units, todo, x, y, worst, known, front)
    left = todo[worst[todo] > SOLVED]
    if len(left):  # try again with another guess of the size of x
        other = equilibrate(program.at(left), large=True)
        p, x_again, y_again = other.scaled(program.at(left)), x[left].clone(), y[left].clone()
        again = torch.full_like(worst[left], torch.inf)
        everywhere = torch.arange(len(left), device=left.device)
        _minimize(p, other, everywhere, x_again, y_again, again, [None] * len(left), front and front.at(left))
        first = units.at(left)
        seen = x_again * other.d / first.d, y_again * (other.e / first.e) * (first.c / other.c)
        again = torch.maximum(again, residual(scaled.at(left), *seen))
        better = again < worst[left]
        rows = left[better]
        x[rows], y[rows], worst[rows] = x_again[better], y_again[better], again[better]
        for whole, part in zip(units, other, strict=True):
            whole[rows] = part[better]
        for i in rows.tolist():
            known[i] = None
        scaled = units.scaled(program)
    good = worst <= SOLVED
    status = torch.where(good, GOOD, LIMIT)
    status[finite & ~convex] = NONCONVEX
    status[~finite] = NOT_FINITE
    if good.any():
        solved = good.nonzero()[:, 0]
        y[solved] = complemented(scaled.at(solved), x[solved], y[solved], worst[solved])
    certificate, ray, violation = torch.zeros_like(y), torch.zeros_like(x), torch.zeros_like(worst)
    bad = ((status == LIMIT) | (good & (x.abs().amax(1) > FAR))).nonzero()[:, 0]
    if len(bad):
        cause, certificate[bad], violation[bad], ray[bad] = _cause(scaled.at(bad))
        status[bad] = torch.where(good[bad] & (cause == LIMIT), GOOD, cause)
        good = status == GOOD
    x, y = (torch.where(good[:, None], part, torch.nan) for part in (x, y))
    back = units.e / units.c
    return Solution(units.d * x, back * y, status, worst, units, violation, units.e * certificate, units.d * ray, known)


def _minimize(
    scaled: Program,
    units: Units,
    todo: Tensor,
    x: Tensor,
    y: Tensor,
    worst: Tensor,
    known: list[Known | None],
    front: Front | None,
) -> None:
    """Write the points, residuals and systems that `minimized` finds for the samples `todo` into x, y, worst, known."""
    for group in patterns(scaled.equality[todo]):
        index = todo[group]
        program = scaled.at(index)
        found = minimized(program, None if front is None else front(program, units.at(index), index))
        x[index], y[index], worst[index] = found.x, found.y, found.residual
        for i, system in zip(index.tolist(), found.known, strict=True):
            known[i] = system


class Found(NamedTuple):
    """Points x and y of equilibrated programs, their relative residuals, and the sparse systems that led to them."""

    x: Tensor
    y: Tensor
    residual: Tensor
    known: list[Known | None]


def minimized(program: Program, first: tuple[Tensor, Tensor] | None = None) -> Found:
    """Return the best points found for equilibrated convex programs that have the same equality rows.

    first: the points (x, y) to polish, NaN if a sample has none; None: those of `nearby`.
    """
    if not program.C.shape[1] and not numbers(program.H).any():
        stuck = (program.q != 0).any(1)
        size = torch.zeros_like(program.q[:, 0]).masked_fill(stuck, torch.inf)
        return Found(torch.zeros_like(program.q), torch.zeros_like(program.lower), size, [None] * len(size))
    best = polish(program, *(nearby(program) if first is None else first))
    if (best.residual > 10 * EXACT).any() and (best.residual < 1e-2).any():
        refine(best, program)
    return Found(best.x, best.y, best.residual, best.known)


def is_convex(H: Matrix, tolerance: float = CURVATURE) -> Tensor:
    """Return which H (B, n, n) are positive semidefinite, (B,) bool, up to `tolerance` times the size of H."""
    if not len(H):
        return torch.zeros(0, dtype=torch.bool, device=H.device)
    size = largest_in_columns(H.abs())
    root = torch.where(size > 0, size, 1).rsqrt()  # equilibrates H
    shifted = rescaled(H, root, root)
    if isinstance(shifted, SparseMatrix):
        count = 1 if shifted.values.stride(0) == 0 else len(shifted)
        found = [positive_definite(shifted.to_scipy(i), tolerance) for i in range(count)]
        return torch.tensor(found, device=H.device).expand(len(H))
    shifted.diagonal(dim1=1, dim2=2).add_(tolerance)
    return torch.linalg.cholesky_ex(shifted)[1] == 0


def _finite(program: Program) -> Tensor:
    parts = [numbers(part).isfinite().all(1) for part in (program.H, program.q, program.C)]
    bounds = ~(program.lower.isnan() | program.upper.isnan()).any(1)
    return torch.stack([*parts, bounds]).all(0)


def _cleaned(program: Program, finite: Tensor) -> Program:
    """Set samples that are not finite to zero; make huge bounds infinite, and drop the bounds of rows of zeros."""
    H, q, C, low, high = program
    if not finite.all():
        H, C = (where_samples(finite, part) for part in (H, C))
        q, low, high = (torch.where(finite[:, None], part, 0) for part in (q, low, high))
    if not C.shape[1]:
        return Program(H, q, C, low, high)
    size = largest_in_rows(C.abs())
    far = INFINITE * torch.where(size > 0, size, 1)
    low, high = torch.where(low <= -far, -torch.inf, low), torch.where(high >= far, torch.inf, high)
    idle = (size == 0) & (low <= 0) & (high >= 0) & (low != high)
    return Program(H, q, C, torch.where(idle, -torch.inf, low), torch.where(idle, torch.inf, high))


def _cause(p: Program) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find out why equilibrated programs were not solved; return status, certificate, least violation and ray."""
    status = torch.full((len(p.q),), LIMIT, device=p.q.device)
    ray = torch.zeros_like(p.q)
    contradictory = (p.lower > p.upper) | (p.lower == torch.inf) | (p.upper == -torch.inf)
    low, high = (
        torch.where(contradictory, bound, part) for part, bound in ((p.lower, -torch.inf), (p.upper, torch.inf))
    )
    least, certificate = _least_violation(p._replace(lower=low, upper=high))
    reach = torch.cat([torch.where(part.isfinite(), part.abs(), 0) for part in (low, high)], 1)
    reach = reach.amax(1) if reach.shape[1] else torch.zeros_like(least)
    reach = torch.where(reach > 0, reach, torch.inf)  # if every bound is 0, x = 0 is feasible
    infeasible = contradictory.any(1) | (least > VIOLATION * reach)
    status[infeasible] = INFEASIBLE
    gap = torch.where(
        contradictory & ~(p.lower.isinf() & p.upper.isinf()), (p.lower - p.upper).nan_to_num(posinf=torch.inf), 0
    )
    least = torch.where(infeasible, torch.maximum(least, gap.amax(1) / 2) if gap.shape[1] else least, 0)
    certificate = torch.where(infeasible[:, None], certificate, 0)
    left = (~infeasible).nonzero()[:, 0]
    if len(left):
        rays = _rays(p.at(left))
        for group in patterns(rays.equality):
            found = minimized(rays.at(group))
            slope = (rays.q[group] * found.x).sum(1)
            falls = (found.residual <= 1e-7) & (slope < -DESCENT * rays.q[group].abs().amax(1))
            rows = left[group][falls]
            status[rows], ray[rows] = UNBOUNDED, found.x[falls]
    return status, certificate, least, ray


def _least_violation(p: Program) -> tuple[Tensor, Tensor]:
    """Return the least t with l - t <= Cx <= u + t, (B,), and multipliers (B, r) that prove that it is the least.

    t is 0 in samples whose linear program was not solved.
    """
    _, r, n = p.C.shape
    if not r:
        return torch.zeros_like(p.q[:, 0]), torch.zeros_like(p.lower)
    none, zero, one = torch.full_like(p.lower, torch.inf), torch.zeros_like(p.q), torch.ones_like(p.q[:, :1])
    t, minus_t = column(p.C, torch.ones_like(p.lower)), column(p.C, -torch.ones_like(p.lower))
    phase_one = Program(
        zeros(p.H, n + 1, n + 1),
        torch.cat([zero, one], 1),
        assembled([[p.C, minus_t], [p.C, t], [zeros(p.C, 1, n), column(p.C, one)]]),
        torch.cat([-none, p.lower, 0 * one], 1),
        torch.cat([p.upper, none, one + torch.inf], 1),
    )
    found = minimized(phase_one)
    settled = (found.residual <= 1e-7) & (found.x[:, n] > 0)
    return torch.where(settled, found.x[:, n], 0), found.y[:, :r] + found.y[:, r : 2 * r]


def _rays(p: Program) -> Program:
    """Return the linear programs that look for a ray: min q'd, Hd = 0, d in the recession cone, -1 <= d <= 1."""
    n = p.q.shape[1]
    zero, one = torch.zeros_like(p.q), torch.ones_like(p.q)
    low = torch.where(p.lower.isfinite(), 0, p.lower)
    high = torch.where(p.upper.isfinite(), 0, p.upper)
    return Program(
        zeros(p.H, n, n),
        p.q,
        assembled([[p.H], [p.C], [identity(p.H, n)]]),
        torch.cat([zero, low, -one], 1),
        torch.cat([zero, high, one], 1),
    )
