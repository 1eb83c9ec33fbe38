"""A batched solver of dense quadratic programs, differentiated through the KKT system of the active set.

Source: Amos and Kolter, OptNet (2017).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.errors import InputError
from foldopt.solvers.interior_point import largest, solve_qcqp, unit

__all__ = ["TOLERANCE", "QPSolution", "solve_qp"]

QPParts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
TOLERANCE = 1e-9
PIVOTS = 10  # changes of the active set that are tried where the interior point leaves it undecided


class QPSolution(NamedTuple):
    """The solutions of a batch of quadratic programs min 1/2 x'Hx + q'x, Ax = b, Gx <= h.

    Attributes:
        x: (B, n), the minimizers.
        nu: (B, p), the multipliers of the equalities.
        lam: (B, m), the multipliers of the inequalities, at least 0.
        active: (B, m) bool, the inequalities that hold with equality and carry the derivative.
        ok: (B,) bool, whether a point with a small KKT residual was found. Where it is False x, nu and lam are NaN, and
            so is the gradient unless the incoming gradient is 0.
        singular: (B,) bool, whether the KKT matrix is singular (ties, or dependent active constraints). The multipliers
            and derivatives of these samples are those of least norm.

    Examples:
        >>> from foldopt.solvers.qp import solve_qp
        >>> H, q, A, b = torch.eye(2)[None], torch.tensor([[-3.0, -1.0]]), torch.zeros(1, 0, 2), torch.zeros(1, 0)
        >>> found = solve_qp(H, q, A, b, torch.ones(1, 1, 2), torch.tensor([[2.0]]))
        >>> found.x, found.lam, found.ok
        (tensor([[2., 0.]]), tensor([[1.]]), tensor([True]))
    """

    x: Tensor
    nu: Tensor
    lam: Tensor
    active: Tensor
    ok: Tensor
    singular: Tensor


def solve_qp(
    H: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, active: Tensor | None = None
) -> QPSolution:
    """Solve min 1/2 x'Hx + q'x subject to Ax = b, Gx <= h for every sample of a batch.

    The active set is guessed, or found by an interior point, and the KKT system on it then gives the solution to
    rounding. Gradients of any order reach H, q, A, b, G and h through the same system, with the active set held fixed;
    at an active constraint with the multiplier 0 this is one of the one-sided derivatives. `foldopt.QPLayer` solves
    more general programs and says which derivatives do not exist; this function is the small solver inside
    `foldopt.projections.polyhedron` and SQP.

    Args:
        H: (B, n, n), symmetric positive semidefinite.
        q: (B, n).
        A: (B, p, n); p may be 0.
        b: (B, p).
        G: (B, m, n); m may be 0.
        h: (B, m). All tensors have the same floating-point dtype.
        active: (B, m) bool, a guess of the active inequalities; None (default) guesses that none is active. A guess
            that is right costs one factorization. The other samples are solved by an interior point.

    Returns:
        Solutions, multipliers, active sets and flags.

    Raises:
        InputError: if a shape does not fit q.

    Source: Amos and Kolter, OptNet (2017).

    Examples:
        >>> from foldopt.solvers.qp import solve_qp
        >>> q = torch.tensor([[-3.0, -2.0]], requires_grad=True)
        >>> none = torch.zeros(1, 0, 2), torch.zeros(1, 0)
        >>> x = solve_qp(torch.eye(2)[None], q, *none, torch.ones(1, 1, 2), torch.tensor([[2.0]])).x
        >>> x.detach()
        tensor([[1.5000, 0.5000]])
        >>> torch.autograd.grad(x[0, 0], q)
        (tensor([[-0.5000,  0.5000]]),)
    """
    _check(H, q, A, b, G, h)
    if active is None:
        active = torch.zeros_like(h, dtype=torch.bool)
    u = unit(H, q, b, h)
    q, b, h = q / u, b / u, h / u
    s = _unit_of_cost(H, q, b, h)
    x, nu, lam, active, ok, singular, *_ = _KKT.apply(H / s[:, :, None], q / s, A, b, G, h, active)
    return QPSolution(u * x, u * (s * nu), u * (s * lam), active, ok, singular)


def _unit_of_cost(H: Tensor, q: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Return the unit of the objective in which each program is solved, (B, 1): 1, or a power of 2 if H is far from 1.

    The KKT matrix has H beside A and G, so that it would seem singular if H were much larger or smaller than these. If
    H is tiny beside q it has no influence on the solution, and the unit stays 1.
    """
    with torch.no_grad():
        curvature = H.flatten(1).abs().amax(1)
        slope = largest(q) / torch.stack([largest(b), largest(h), torch.ones_like(curvature)]).amax(0)
        size = torch.maximum(curvature, slope)
        far = ((size < 1e-3) | (size > 1e3)) & (size > 0) & size.isfinite()
        power = torch.exp2(size.log2().round())
        return torch.where(far & ((curvature == 0) | (curvature >= 1e-10 * size)), power, 1.0).to(q)[:, None]


def _check(H: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> None:
    if q.dim() != 2:
        raise InputError(f"q has shape {tuple(q.shape)}, expected (B, n).")
    B, n = q.shape
    p, m = b.shape[-1], h.shape[-1]
    expected = {"H": (H, (B, n, n)), "A": (A, (B, p, n)), "b": (b, (B, p)), "G": (G, (B, m, n)), "h": (h, (B, m))}
    for name, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected {shape} to go with q of shape {(B, n)}.")


def _kkt_matrix(H: Tensor, A: Tensor, G: Tensor, active: Tensor) -> Tensor:
    """Return [[H, A', (SG)'], [A, 0, 0], [SG, 0, I - S]], where S selects the active inequalities.

    The corner I - S makes the multipliers of the others 0.
    """
    p, m = A.shape[1], G.shape[1]
    SG = G * active[:, :, None]
    corner = torch.diag_embed(torch.cat([torch.zeros_like(A[:, :, 0]), (~active).to(H.dtype)], 1))
    rows = torch.cat([A, SG], 1)
    return torch.cat([torch.cat([H, rows.mT], 2), torch.cat([rows, corner], 2)], 1) if p + m else H


class _Factor(NamedTuple):
    """An LU factorization of the KKT matrices, and the pseudo-inverse in the samples where they are singular."""

    lu: Tensor
    pivots: Tensor
    singular: Tensor
    pinv: Tensor | None

    @classmethod
    def of(cls, K: Tensor) -> _Factor:
        lu, pivots, info = lu_factor(K)
        pivot_sizes = lu.diagonal(dim1=1, dim2=2).abs()
        finite = K.isfinite().all(-1).all(-1)
        small = pivot_sizes.amin(-1) <= 1e-13 * pivot_sizes.amax(-1)
        singular = finite & ((info > 0) | small)
        pinv = torch.linalg.pinv(K[singular], rtol=1e-11) if singular.any() else None
        return cls(lu, pivots, singular, pinv)

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve K z = rhs for rhs of shape (B, N); in the least-squares sense where K is singular."""
        z = torch.linalg.lu_solve(self.lu, self.pivots, rhs[:, :, None])[:, :, 0]
        if self.pinv is not None:
            z[self.singular] = matvec(self.pinv, rhs[self.singular])
        return z


def _candidate(
    H: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, _Factor]:
    """Return the point that an active set determines, and whether it satisfies the KKT conditions."""
    n, p = q.shape[1], b.shape[1]
    factor = _Factor.of(_kkt_matrix(H, A, G, active))
    rhs = torch.cat([-q, b, torch.where(active, h, 0)], 1)
    x, nu, lam = factor.solve(rhs).split([n, p, h.shape[1]], 1)
    lam = torch.where(active, lam, 0)
    slack = h - matvec(G, x)
    stationarity = matvec(H, x) + q + matvec(A.mT, nu) + matvec(G.mT, lam)
    dual_scale = largest(q) + largest(lam)
    primal_scale = 1 + largest(x)
    ok = (
        (largest(stationarity) <= TOLERANCE * dual_scale)
        & (largest(matvec(A, x) - b) <= TOLERANCE * primal_scale)
        & ((lam >= -TOLERANCE * dual_scale[:, None]) & (slack >= -TOLERANCE * primal_scale[:, None])).all(1)
    )
    return x, nu, lam, ok, factor


def _pivoted(data: QPParts, guess: Tensor) -> tuple[list[Tensor], Tensor]:
    """Correct a guess of the active set; return [x, nu, lam, whether solved, whether K is singular] and the set.

    An interior point leaves nearly degenerate constraints undecided. The point that a set determines tells which
    constraints to drop (their multiplier is not positive) and which to add (they are violated). If that does not
    settle, the guess is kept.
    """
    *best, factor = _candidate(*data, guess)
    best.append(factor.singular)
    active, todo = guess.clone(), (~best[3]).nonzero()[:, 0]
    trial, x, lam = guess[todo], best[0][todo], best[2][todo]
    for _ in range(PIVOTS):
        if not len(todo):
            break
        part = _rows(data, todo)
        slack = part[5] - matvec(part[4], x)
        trial = torch.where(trial, lam > 0, slack < 0)
        *point, factor = _candidate(*part, trial)
        solved = point[3]
        for whole, new in zip(best, [*point, factor.singular], strict=True):
            whole[todo[solved]] = new[solved]
        active[todo[solved]] = trial[solved]
        todo, trial, x, lam = (t[~solved] for t in (todo, trial, point[0], point[2]))
    return best, active


def _rows(data: QPParts, index: Tensor) -> QPParts:
    H, q, A, b, G, h = (part[index] for part in data)
    return H, q, A, b, G, h


class _KKT(torch.autograd.Function):
    """Forward: the guessed active set, else an interior point and a polish. Backward: a solve with the KKT matrix.

    If the guess was right in every sample, the backward pass uses the factorization of the forward pass.
    """

    @staticmethod
    def forward(H: Tensor, q: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, active: Tensor) -> tuple[Tensor, ...]:
        x, nu, lam, ok, factor = _candidate(H, q, A, b, G, h, active)
        singular = factor.singular
        hard = (~ok).nonzero()[:, 0]
        if len(hard):
            data = _rows((H, q, A, b, G, h), hard)
            point = solve_qcqp(*data)
            nu_ip, lam_ip = point.equality_dual.to(q), point.inequality_dual.to(q)
            found = lam_ip > data[5] - matvec(data[4], point.x.to(q))
            polished, found = _pivoted(data, found)
            exact, good = polished[3][:, None], (polished[3] | point.ok)[:, None]
            x, nu, lam, active, ok, singular = (t.clone() for t in (x, nu, lam, active, ok, singular))
            for whole, better, rough in zip((x, nu, lam), polished[:3], (point.x.to(q), nu_ip, lam_ip), strict=True):
                whole[hard] = torch.where(good, torch.where(exact, better, rough), torch.nan)
            active[hard], ok[hard], singular[hard] = found, good[:, 0], polished[4]
            factor = factor._replace(lu=factor.lu[:0], pivots=factor.pivots[:0])
        else:
            active = active.clone()
        return x, nu, lam, active, ok, singular, factor.lu, factor.pivots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        H, _, A, _, G, _, _ = inputs
        x, nu, lam, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(H, A, G, x, nu, lam, *others)

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gnu: Tensor, glam: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        H, A, G, x, nu, lam, active, ok, singular, lu, pivots = ctx.saved_tensors
        if not ok.all():
            x, nu, lam = (torch.where(ok[:, None], t, 0) for t in (x, nu, lam))
        n, p, m = H.shape[1], A.shape[1], G.shape[1]
        g = torch.cat([gx, gnu, torch.where(active, glam, 0)], 1)
        known = len(lu) > 0 and not singular.any()
        factor = _Factor(lu, pivots, singular, None) if known else _Factor.of(_kkt_matrix(H, A, G, active).detach())
        w = factor.solve(g.detach())
        if torch.is_grad_enabled():  # a second derivative may follow
            w = _LinearSolve.apply(_kkt_matrix(H, A, G, active), g, factor, w)
        if not ok.all():
            w = torch.where((ok | (g == 0).all(1))[:, None], w, torch.nan)
        wx, wnu, wlam = w.split([n, p, m], 1)
        wlam = torch.where(active, wlam, 0)
        return (
            -_outer(wx, x),
            -wx,
            -_outer(nu, wx) - _outer(wnu, x),
            wnu,
            -_outer(lam, wx) - _outer(wlam, x),
            wlam,
            None,
        )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


class _LinearSolve(torch.autograd.Function):
    """w = K^-1 g for a symmetric K that is already factored; the derivative solves with the same factorization."""

    @staticmethod
    def forward(K: Tensor, g: Tensor, factor: _Factor, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        K, _, ctx.factor, _ = inputs
        ctx.save_for_backward(K, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        K, w = ctx.saved_tensors
        v = ctx.factor.solve(cotangent.detach())
        if torch.is_grad_enabled():
            v = _LinearSolve.apply(K, cotangent, ctx.factor, v)
        return -_outer(v, w), v, None, None
