"""Which active rows of a solved program have a multiplier and which have none; every verdict starts from this."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.qp._front import nearby
from foldopt.qp._operations import Matrix, assembled, identity, numbers, rescaled, selected_rows, zeros
from foldopt.qp._program import Program, residual, sizes, weight
from foldopt.qp._sparse_kkt import SparseKKT
from foldopt.qp.matrix import Pattern, SparseMatrix

TOUCHING = 1e-9  # a row is active if its slack, relative to the terms of the row, is at most this
CARRYING = 1e-6  # a row has a multiplier if its share of some column's terms exceeds this
PROGRAMS = 200  # most linear programs for one sample, to find the rows that are active at some solution
NUMBERS = 500_000  # most matrix entries in these programs together
SMALL = 1e-7  # cost of the size of a multiplier, beside the gain 1 for having one
NOISE = 1e-12  # smallest relative error of x that is assumed


class Activity(NamedTuple):
    """The kinds of rows at a solution, (B, r) bool each.

    strong: equalities, and active rows with a multiplier. weak: active rows without one. carrying: rows whose
    multiplier is not negligible. below: rows whose multiplier belongs to the lower bound.
    """

    strong: Tensor
    weak: Tensor
    carrying: Tensor
    below: Tensor


def activity(program: Program, x: Tensor, y: Tensor, error: Tensor) -> Activity:
    """Return the strongly and the weakly active rows at solutions of equilibrated programs.

    A row is active if its slack is at most the rounding error of the row, or a hundred times the KKT residual `error`
    (B,) of the solution. A multiplier counts if it has a share in at least one column of the stationarity condition; an
    absolute threshold would report kinks in programs with large penalties.
    """
    if not program.C.shape[1]:
        none = torch.zeros_like(program.lower, dtype=torch.bool)
        return Activity(none, none, none, none)
    z = matvec(program.C, x)
    size = sizes(program, x, y)
    noise = torch.clamp(100 * error, NOISE, 1e-7)[:, None]
    above, below = program.upper - z, z - program.lower
    slack = torch.minimum(above, below)
    bound = torch.where(above < below, program.upper, program.lower)
    reach = size.rows + torch.where(bound.isfinite(), bound.abs(), 0)
    touched = slack <= torch.maximum(TOUCHING * reach, noise * size.x)
    carrying = weight(program.C, y, size.columns) > CARRYING
    side = torch.where(y > 0, above, below) <= slack + TOUCHING * reach
    equality = program.equality
    strong = equality | (touched & side & carrying)
    return Activity(strong, touched & ~strong, carrying, y < 0)


def complemented(program: Program, x: Tensor, y: Tensor, error: Tensor) -> Tensor:
    """Return multipliers y (B, r) with as many nonzeros as the solution x allows (strict complementarity).

    If active rows depend on each other, the multipliers are not unique, and a solver may return 0 for a row that has a
    multiplier in another choice. Only a row whose multiplier is 0 in every choice is weakly active. In each sample with
    weakly active rows, one linear program finds which of them can have a multiplier, and y is moved into the relative
    interior of the set of multipliers.
    """
    y = y.clone()
    strong, weak, *_ = activity(program, x, y, error)
    for i in weak.any(1).nonzero()[:, 0].tolist():
        one = torch.tensor([i], device=y.device)
        p, held, touched = program.at(one), strong[one], weak[one]
        if _independent(selected_rows(p.C, (held[0] | touched[0]).nonzero()[:, 0])):
            continue
        y[one] = _relative_interior(p, x[one], y[one], held, touched)
    return y


def touched_somewhere(program: Program, x: Tensor, strong: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of the mask `rows` (B, r) that are active at some solution of the program, if not at x.

    The solutions are the feasible points that have the same value as x in the strong rows and in Hx. For each row one
    linear program finds the least slack among them. If these programs would be too many or too large, all rows of the
    mask are returned.
    """
    out = rows.clone()
    z, curvature = matvec(program.C, x), matvec(program.H, x)
    for i in rows.any(1).nonzero()[:, 0].tolist():
        which = rows[i].nonzero()[:, 0]
        ends = [
            (int(r), side)
            for r in which
            for side, bound in ((1.0, program.upper), (-1.0, program.lower))
            if bound[i, r].isfinite()
        ]
        entries = numbers(program.H).shape[1] + numbers(program.C).shape[1]
        if len(ends) > PROGRAMS or len(ends) * entries > NUMBERS:
            continue
        p = program.at(torch.full((len(ends),), i, device=x.device))
        row = torch.tensor([r for r, _ in ends], device=x.device)
        sign = torch.tensor([side for _, side in ends], dtype=x.dtype, device=x.device)
        extent = x[i].abs().amax().clamp(min=1e-300)  # the linear programs are solved for x / extent
        held, here, flat = strong[i], z[i] / extent, (curvature[i] / extent).expand(len(ends), -1)
        pick = torch.zeros_like(p.lower).scatter(1, row[:, None], sign[:, None])
        linear = Program(
            zeros(p.H, *p.H.shape[1:]),
            -matvec(p.C.mT, pick),
            assembled([[p.H], [p.C]]),
            torch.cat([flat, torch.where(held, here, p.lower / extent)], 1),
            torch.cat([flat, torch.where(held, here, p.upper / extent)], 1),
        )
        found, multipliers = nearby(linear)
        bound = torch.where(sign > 0, program.upper[i, row], program.lower[i, row])
        slack = sign * bound / extent + (linear.q * found).sum(1)
        far = slack > 1e-6 * (bound.abs() / extent + 1)
        near = ~(far & (residual(linear, found, multipliers) < 1e-7))
        out[i] = False
        out[i, row[near]] = True
    return out


def _independent(rows: Matrix) -> bool:
    """Return whether the rows (1, k, n) are linearly independent, with a margin."""
    _, k, n = rows.shape
    if k > n:
        return False
    if isinstance(rows, SparseMatrix):
        eye = SparseMatrix(Pattern.identity(n, rows.device), rows.values.new_ones(1, n))
        return not SparseKKT(eye.to_scipy(0), rows.to_scipy(0)).singular
    part = rows[0]
    length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
    if not bool((length > 0).all()):
        return False
    part = part / length
    root, info = torch.linalg.cholesky_ex(part @ part.T)
    return int(info) == 0 and bool(root.diagonal().square().min() > 1e-8)


def _relative_interior(p: Program, x: Tensor, y: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    """Move the multipliers y of one sample so that as many weakly active rows as possible get one.

    The direction solves max sum t over a (free, strong rows) and b >= t, 0 <= t <= 1 (weak rows) subject to
    C_S'a + C_W'(sign b) = 0. Solvers of sparse programs return a vertex, where some b may be large without need and
    make the step small; a small cost of b prevents this. The interior point returns a point in the middle.
    """
    held, touched = strong[0].nonzero()[:, 0], weak[0].nonzero()[:, 0]
    z = matvec(p.C, x)
    sign = torch.where(p.upper - z <= z - p.lower, 1.0, -1.0).to(y)[:, touched]
    S = selected_rows(p.C, held)
    W = rescaled(selected_rows(p.C, touched), sign, torch.ones_like(x))
    s, w, n = len(held), len(touched), x.shape[1]
    total = s + 2 * w
    eye, none = identity(W, w), y.new_zeros(1, w)
    minus = rescaled(eye, none - 1, none + 1)
    C = assembled([[S.mT, W.mT, zeros(W, n, w)], [zeros(W, w, s), eye, minus], [None, None, eye], [None, eye, None]])
    low = torch.cat([y.new_zeros(1, n), none, none, none], 1)
    high = torch.cat([y.new_zeros(1, n), none + torch.inf, none + 1, none + 1e6], 1)
    linear = Program(
        zeros(W, total, total),
        torch.cat([y.new_zeros(1, s), none + (SMALL if isinstance(W, SparseMatrix) else 0), none - 1], 1),
        C,
        low,
        high,
    )
    found, multipliers = nearby(linear, tol=1e-9)
    a, b, t = found.split([s, w, w], 1)
    supported = t > 0.5
    if not (residual(linear, found, multipliers) < 1e-6).all() or not supported.any():
        return y
    b = torch.where(supported, b, 0)
    present, inequality = y[:, held], ~p.equality[:, held]
    shrinking = inequality & (present * a < 0)
    ratio = torch.where(shrinking, present.abs() / a.abs().clamp(min=1e-300), torch.inf)
    bigness = torch.cat([a, b], 1).abs().amax(1, keepdim=True)
    natural = sizes(p, x, y).columns.amax(1, keepdim=True) / bigness
    step = torch.minimum(0.5 * ratio.amin(1, keepdim=True), natural) if s else natural
    y = y.clone()
    y[:, held] += step * a
    y[:, touched] += step * sign * b
    return y
