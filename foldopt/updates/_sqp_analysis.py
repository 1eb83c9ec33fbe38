"""The analysis of KKT points for the SQP steps: which samples may lack a derivative, and which parameters matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import lu_factor, matvec
from foldopt.qp._activity import activity, complemented
from foldopt.qp._kkt import probe
from foldopt.qp._program import Program, equilibrate, residual, sizes
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, _kkt_matrix
from foldopt.updates.newton import Point
from foldopt.updates.programs import SQPData

__all__ = ["Known", "analysed", "clearly_regular", "moving"]

NEAR = 1e-3  # a longer step, relative to 1 + |x|, means that the state is not close to a solution
CLEAR = 1e-3  # relative size from which a slack or a multiplier is clearly not zero
SIMILAR = 1e3  # largest ratio of the sizes of rows, or of columns, that needs no equilibration
GROWN = 1e6  # largest growth of a right-hand side in a KKT matrix that is clearly regular


def moving(
    model: Callable[..., SQPData | tuple[Tensor, ...]], params: Sequence[Tensor], needed: Sequence[bool]
) -> list[bool]:
    """Return which of Q, p, G, h, A, b, lower and upper of a quadratic model depend on the needed parameters.

    Args:
        model: function of the parameters that returns the six parts of an `SQPData`. Products with the matrices may
            take the places of the matrices.
        params: the parameters.
        needed: whether the derivative of each parameter is needed, and then that of each weight of modules.

    Returns:
        One bool for each of the eight; p counts as dependent, lower and upper do not.
    """
    explicit, weights = needed[: len(params)], any(needed[len(params) :])
    with torch.enable_grad():
        leaves = [
            c.detach().requires_grad_(need and c.is_floating_point()) for c, need in zip(params, explicit, strict=True)
        ]
        data = SQPData(*model(*leaves))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]

        def reached(part: Tensor) -> list[Tensor]:
            if not wanted or not part.requires_grad or not part.numel():
                return []
            some = probe(part.numel(), part).view_as(part)
            found = torch.autograd.grad(part, wanted, some, retain_graph=True, allow_unused=True)
            return [one for one in found if one is not None]

        of_h, of_g = (bool(reached(part)) for part in (data.h, data.g))
        parts = data.hessian, data.jacobian_h, data.jacobian_g
        hessian, jacobian_h, jacobian_g = (any(bool(one.any()) for one in reached(part)) for part in parts)
        if weights:  # weights of modules are not among params, so that only requires_grad tells
            of_h, of_g = of_h or data.h.requires_grad, of_g or data.g.requires_grad
            hessian, jacobian_h, jacobian_g = (
                known or part.requires_grad
                for known, part in zip((hessian, jacobian_h, jacobian_g), parts, strict=True)
            )
    return [hessian, True, jacobian_g, of_g, jacobian_h, of_h, False, False]


class Known(NamedTuple):
    """The analysis of the samples that may lack a derivative.

    Attributes:
        samples: indices (b,) of the samples whose active constraints may be the reason.
        point: the analysis of these samples; None if there are none.
        y: multipliers of these samples at the point, (b, p + m).
        lost: variables along which the Hessian of the Lagrangian is singular, (B, n) bool.
    """

    samples: Tensor
    point: Point | None
    y: Tensor
    lost: Tensor

    @property
    def at(self) -> Point:
        """The analysis of the samples; a ValueError if there are none."""
        if self.point is None:
            raise ValueError("no sample was examined")
        return self.point


def clearly_regular(x: Tensor, data: SQPData, qp: QPSolution) -> Tensor:
    """Return which samples, (B,) bool, are clearly regular, by a test that needs no equilibration.

    A sample passes if its rows and columns have similar sizes, each inequality has a clear slack or a clear multiplier,
    and solving with the KKT matrix of the active constraints enlarges a right-hand side only moderately. Samples that
    are not solved count as regular.
    """
    gradient, H, _, Jh, g, Jg = data
    C = torch.cat([Jh, Jg], 1)
    entries = torch.cat([H, C], 1).abs()
    columns, of_rows = entries.amax(1), entries[:, x.shape[1] :].amax(2)
    similar = columns.amin(1) * SIMILAR > columns.amax(1)
    if C.shape[1]:
        similar &= of_rows.amin(1) * SIMILAR > of_rows.amax(1)
    rows, curvature = of_rows[:, Jh.shape[1] :], H.abs().amax((1, 2))
    force = torch.stack([largest(gradient), largest(matvec(H, x)), largest(qp.lam * rows)]).amax(0)
    size = largest(x) + force / curvature
    slack = -g > CLEAR * rows * size[:, None]
    carrying = qp.lam * rows > CLEAR * force[:, None]
    plainly = torch.where(qp.active, carrying & (g.abs() <= CLEAR * CLEAR * rows * size[:, None]), slack & ~carrying)
    K = _kkt_matrix(H, Jh, Jg, qp.active)
    lu, pivots, info = lu_factor(K)
    r = probe(K.shape[1], K).expand(len(K), -1)
    grown = largest(torch.linalg.lu_solve(lu, pivots, r[:, :, None])[:, :, 0]) * K.abs().amax((1, 2))
    regular = (info == 0) & ~qp.singular & (grown < GROWN)
    near = qp.ok & (largest(qp.x) <= NEAR * (1 + largest(x)))
    return ~near | (similar & regular & plainly.all(1))


def analysed(index: Tensor, x: Tensor, data: SQPData, qp: QPSolution, degenerate: str) -> Known | None:
    """Analyse the quadratic models of the samples `index` at the solutions of these models.

    The error of such a solution is about the square of the error of the state. Returns None if every sample has every
    derivative.
    """
    eps = torch.finfo(x.dtype).eps
    x, step, nu, lam = (part[index].double() for part in (x, qp.x, qp.nu, qp.lam))
    gradient, H, h, Jh, g, Jg = (part[index].double() for part in data)
    H, C = (H + H.mT) / 2, torch.cat([Jh, Jg], 1)
    upper = matvec(C, x) - torch.cat([h, g], 1)
    lower = torch.cat([upper[:, : h.shape[1]], torch.full_like(g, -torch.inf)], 1)
    program = Program(H, gradient - matvec(H, x), C, lower, upper)
    at, y = x + step, torch.cat([nu, lam.clamp(min=0)], 1)
    units = equilibrate(program)
    scaled, to_y = units.scaled(program), units.e / units.c
    at_s, y_s = at / units.d, y / to_y
    length = largest(step / units.d) / sizes(scaled, at_s, y_s).x[:, 0]
    error = residual(scaled, at_s, y_s) + length.square() + (eps if eps > 1e-12 else 0)
    if activity(scaled, at_s, y_s, error).weak.any():
        y = complemented(scaled, at_s, y_s, error) * to_y
    point = Point.of(program, at, y, degenerate, units, error)
    nothing = torch.zeros_like(data.gradient, dtype=torch.bool)
    return Known(index, point, y, nothing) if point.degenerate.any() else None
