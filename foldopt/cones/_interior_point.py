"""A batched interior point for quadratic cone programs with equalities, inequalities and second-order cones.

It solves minimize x'Px/2 + q'x subject to Ax + s = b, s in K, together with the multipliers z in the dual cone of K,
for which Px + q + A'z = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.checks import require_positive, require_whole
from foldopt.cones._elementwise import Zero
from foldopt.cones._embedding import Embedding, Program, largest
from foldopt.cones._product import ProductCone
from foldopt.cones._scaling import Blocks
from foldopt.errors import InputError

STATUS = ("solved", "infeasible", "unbounded", "limit reached", "not finite")
SOLVED, INFEASIBLE, UNBOUNDED, LIMIT, NOT_FINITE = range(len(STATUS))
PATIENCE = 12  # iterations without progress before a sample gives up
PROOF = 1e-8  # largest residual of a certificate of infeasibility or unboundedness whose objective is -1
ROUNDS = 8  # of equilibration


class ConeSolution(NamedTuple):
    """The result of `solve_cone_program` for a batch of programs min x'Px/2 + q'x, Ax + s = b, s in K.

    In an infeasible sample y is a certificate, A'y = 0 and b'y = -1, while x and s are NaN. In an unbounded sample x
    and s are a ray, Px = 0, Ax + s = 0 and q'x = -1, while y is NaN; such a sample may also be infeasible. All three
    are NaN in samples whose data are not finite.

    Attributes:
        x: (B, n) float64, the solutions.
        y: (B, m), the multipliers, in the dual cone: Px + q + A'y = 0.
        s: (B, m), the slacks b - Ax, in the cone.
        status: (B,) int. 0: solved, 1: infeasible, 2: unbounded, 3: limit reached, 4: not finite.
        residual: (B,), the largest of the relative residuals and the relative gap.
        iterations: (B,) int, the number of interior-point iterations.

    Examples:
        >>> found = foldopt.cones.solve_cone_program(  # minimize x subject to x >= 1 and x <= 0
        ...     None, torch.ones(1, 1), torch.tensor([[-1.0], [1.0]]), torch.tensor([-1.0, 0.0]), {"nonneg": 2}
        ... )
        >>> found.status
        tensor([1])
    """

    x: Tensor
    y: Tensor
    s: Tensor
    status: Tensor
    residual: Tensor
    iterations: Tensor


def solve_cone_program(
    P: Tensor | None,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    dims: Mapping[str, Any],
    *,
    tol: float = 1e-9,
    max_iter: int = 100,
) -> ConeSolution:
    """Minimize x'Px/2 + q'x subject to Ax + s = b, s in K, for every sample of a batch, in float64.

    The method is Mehrotra's predictor-corrector method with Nesterov and Todd's scaling, applied to the homogeneous
    embedding of the program. It ends with a solution, or with a certificate that there is none. Each sample takes its
    own steps and leaves the batch when it is done; all of them run on the device of q. Gradients are not recorded: for
    a differentiable layer take ``foldopt.CvxpyLayer(..., solver="foldopt")``, or fold a step.

    Args:
        P: (n, n) or (B, n, n), symmetric positive semidefinite; None for 0.
        q: (B, n). The only argument that must have the batch dimension.
        A: (m, n) or (B, m, n).
        b: (m,) or (B, m).
        dims: the factors of the cone K, a dict from kinds to sizes like that of `ProductCone`, with the kinds "zero",
            "nonneg" and "soc" only.
        tol: the largest residual and gap of a solution, relative to the data and the solution. Default 1e-9.
        max_iter: the largest number of iterations. Each factors a matrix with a row for each variable, each equality
            and each row of a second-order cone. Default 100.

    Returns:
        The solutions or certificates, and the status of every sample.

    Raises:
        InputError: if a shape does not fit, `dims` has other kinds of cones, or `tol` or `max_iter` is not positive.

    Source: Domahidi, Chu and Boyd, ECOS: an SOCP solver for embedded systems (2013); Goulart and Chen, Clarabel: an
    interior-point solver for conic programs with quadratic objectives (2024).

    Examples:
        The point of the unit disc with the largest x_1 + x_2; the slack (1, x) is in the second-order cone.

        >>> from foldopt.cones import solve_cone_program
        >>> A = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> found = solve_cone_program(None, -torch.ones(1, 2), A, torch.tensor([1.0, 0.0, 0.0]), {"soc": [3]})
        >>> found.x.float(), found.status
        (tensor([[0.7071, 0.7071]]), tensor([0]))
    """
    require_positive("tol", tol)
    require_whole("max_iter", max_iter, 1)
    order, blocks, zeros, lines = _sorted(dims, q.device)
    with torch.no_grad():
        P, q, A, b = _prepared(P, q, A, b, len(order))
        program = Program(P, q, A[:, order], b[:, order], blocks, zeros, lines)
        finite = torch.stack([part.flatten(1).isfinite().all(1) for part in (P, q, A, b)]).all(0)
        scaled, units = _equilibrated(program.at(finite.nonzero()[:, 0]))
        found = _iterated(scaled, tol, max_iter)
        found = found._replace(
            x=found.x * units.d * units.size, y=found.y * units.e / units.cost, s=found.s / units.e * units.size
        )
        found = _reported(found, program, finite)
        back = order.argsort()
        return found._replace(y=found.y[:, back], s=found.s[:, back])


class _Units(NamedTuple):
    """The units of an equilibrated program: x = d size x', s = size s' / e, y = e y' / cost for its x', s' and y'."""

    d: Tensor
    e: Tensor
    size: Tensor
    cost: Tensor


def _equilibrated(program: Program) -> tuple[Program, _Units]:
    """Scale rows and columns of [P A'; A 0] to about 1 (Ruiz, 2001), then b, and the objective by P, or q if P is 0."""
    P, q, A, b, blocks, zeros, lines = program
    d, e = torch.ones_like(q), torch.ones_like(b)
    for _ in range(ROUNDS):
        by_column = torch.maximum(P.abs().amax(1), A.abs().amax(1)) if A.shape[1] else P.abs().amax(1)
        by_row = A.abs().amax(2)
        cones = blocks.each(lambda v: v.amax(2, keepdim=True).expand_as(v), by_row[:, zeros:])
        by_row = torch.cat([by_row[:, :zeros], cones], 1)  # one unit for all rows of a second-order cone
        column, row = (torch.where(norm > 0, norm, 1.0).rsqrt() for norm in (by_column, by_row))
        P, A = column[:, :, None] * P * column[:, None, :], row[:, :, None] * A * column[:, None, :]
        d, e = d * column, e * row
    q, b = d * q, e * b
    curvature, slope = P.flatten(1).abs().amax(1, keepdim=True), q.abs().amax(1, keepdim=True)
    size = largest(b)[:, None]
    size = torch.where(size > 0, size, torch.where(curvature > 0, slope / curvature, slope))
    size = torch.where(size > 0, size, 1.0)
    steep = torch.where(curvature > 0, curvature * size, slope)
    cost = 1 / (size * torch.where(steep > 0, steep, 1.0))
    scaled = Program((cost * size**2)[:, :, None] * P, cost * size * q, A, b / size, blocks, zeros, lines)
    return scaled, _Units(d, e, size, cost * size)


def _iterated(program: Program, tol: float, max_iter: int) -> ConeSolution:
    """Solve equilibrated programs."""
    B, (n, m) = len(program.q), (program.q.shape[1], program.b.shape[1])
    best = ConeSolution(
        program.q.new_full((B, n), torch.nan),
        program.q.new_full((B, m), torch.nan),
        program.q.new_full((B, m), torch.nan),
        program.q.new_full((B,), LIMIT, dtype=torch.long),
        program.q.new_full((B,), torch.inf),
        program.q.new_zeros(B, dtype=torch.long),
    )
    left, idle = torch.arange(B, device=program.q.device), best.iterations.clone()
    least = program.q.new_full((3, B), torch.inf)  # the smallest values so far of what `Embedding.measure` returns
    run = Embedding(program)
    for iteration in range(max_iter + 1):
        now = run.measure()
        better = now[0] < best.residual[left]
        idle[left] = torch.where((now < 0.9 * least[:, left]).any(0), 0, idle[left] + 1)
        least[:, left] = torch.minimum(least[:, left], now)
        rows = left[better]
        tau = run.tau[better, None]
        best.x[rows], best.y[rows], best.s[rows] = run.x[better] / tau, run.z[better] / tau, run.s[better] / tau
        best.residual[rows] = now[0, better]
        best.iterations[left] = iteration
        best.status[left[best.residual[left] <= tol]] = SOLVED
        for outcome in (INFEASIBLE, UNBOUNDED):
            proven = (now[outcome] <= PROOF) & (best.status[left] == LIMIT)
            best.x[left[proven]], best.y[left[proven]], best.s[left[proven]] = (
                run.x[proven],
                run.z[proven],
                run.s[proven],
            )
            best.status[left[proven]] = outcome
        going = (best.status[left] == LIMIT) & (idle[left] < PATIENCE) & run.alive()
        if iteration == max_iter or not going.any():
            break
        if not going.all():
            left = left[going]
            run.keep(going)
        run.advance()
    return best


def _sorted(dims: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Blocks, int, int]:
    """Return the order of rows that `Program` needs, its cones, and the numbers of equalities and inequalities."""
    other = [key for key in dims if key not in ("zero", "nonneg", "soc")]
    if other:
        raise InputError(
            f'dims has {other}: this solver knows "zero", "nonneg" and "soc" only; use another solver for the others.'
        )
    equal: list[Tensor] = []
    single: list[Tensor] = []
    several: list[Tensor] = []
    for cone, rows in ProductCone(dims).groups:
        (equal if isinstance(cone, Zero) else single if rows.shape[1] == 1 else several).append(rows)
    zeros, lines = (sum(len(rows) for rows in part) for part in (equal, single))
    groups = [torch.arange(lines, device=device)[:, None]] if lines else []
    at = lines
    for rows in several:
        groups.append(torch.arange(at, at + rows.numel(), device=device).view(rows.shape))
        at += rows.numel()
    order = torch.cat([rows.flatten() for rows in (*equal, *single, *several)]).to(device)
    return order, Blocks(groups), zeros, lines


def _prepared(P: Tensor | None, q: Tensor, A: Tensor, b: Tensor, m: int) -> list[Tensor]:
    """Return P, q, A and b in float64, expanded over the batch; raise InputError if a shape does not fit."""
    if q.dim() != 2:
        raise InputError(f"q has shape {tuple(q.shape)}, expected (B, n).")
    B, n = q.shape
    P = q.new_zeros(n, n) if P is None else P
    expanded = []
    for name, value, shape in (("P", P, (n, n)), ("q", q, (n,)), ("A", A, (m, n)), ("b", b, (m,))):
        if tuple(value.shape) not in (shape, (B, *shape)):
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, expected {shape} or {(B, *shape)} to go with q and the cones."
            )
        expanded.append(value.detach().double().expand(B, *shape))
    return expanded


def _reported(found: ConeSolution, program: Program, finite: Tensor) -> ConeSolution:
    """Normalize the certificates, and insert the samples whose data were not finite."""
    q, b = program.q[finite], program.b[finite]
    ray, proof = (found.status == UNBOUNDED)[:, None], (found.status == INFEASIBLE)[:, None]
    slope, level = -(q * found.x).sum(1, keepdim=True), -(b * found.y).sum(1, keepdim=True)
    x, s = (torch.where(proof, torch.nan, torch.where(ray, part / slope, part)) for part in (found.x, found.s))
    y = torch.where(ray, torch.nan, torch.where(proof, found.y / level, found.y))
    filled = []
    blanks = torch.nan, torch.nan, torch.nan, NOT_FINITE, torch.inf, 0
    for part, blank in zip((x, y, s, *found[3:]), blanks, strict=True):
        out = part.new_full((len(finite), *part.shape[1:]), blank)
        out[finite] = part
        filled.append(out)
    return ConeSolution(*filled)
