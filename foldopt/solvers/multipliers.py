"""Lagrange multipliers of a primal solution, for black-box solvers that return x only."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import solve_qp

__all__ = ["recover_multipliers"]


def recover_multipliers(
    gradient: Tensor, jacobian_h: Tensor, g: Tensor, jacobian_g: Tensor, tol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return the multipliers (nu, lam), lam >= 0, that minimize the 2-norm of grad f + Jh'nu + Jg'lam.

    At a KKT point whose active constraints are linearly independent, these are the unique multipliers, to the accuracy
    of the solution. If the constraints with a multiplier depend on each other, the multipliers of least norm on these
    constraints are returned.

    Args:
        gradient: gradient of the objective f at the solution, (B, n).
        jacobian_h: Jacobian of the equalities h = 0, (B, p, n); p may be 0.
        g: values of the inequalities g <= 0, (B, m); m may be 0.
        jacobian_g: Jacobian of g, (B, m, n).
        tol: slack up to which an inequality counts as active, relative to the 2-norm of its gradient (at least 1);
            default 1e-6. The multipliers of the others are 0.

    Returns:
        nu (B, p) and lam (B, m).

    Source: Nocedal and Wright, Numerical Optimization (2006), section 18.3.

    Examples:
        The point (1, 0) minimizes -2 x_1 subject to x_1 <= 1 and x_2 <= 1. Only the first constraint is active:

        >>> none, gradient = torch.zeros(1, 0, 2), torch.tensor([[-2.0, 0.0]])
        >>> nu, lam = recover_multipliers(gradient, none, torch.tensor([[0.0, -1.0]]), torch.eye(2)[None])
        >>> lam.round(decimals=4)
        tensor([[2., 0.]])
    """
    B, p, m = len(gradient), jacobian_h.shape[1], jacobian_g.shape[1]
    if p + m == 0:
        return gradient.new_zeros(B, 0), gradient.new_zeros(B, 0)
    active = g >= -tol * torch.linalg.vector_norm(jacobian_g, dim=2).clamp(min=1)
    used = torch.cat([torch.ones_like(jacobian_h[:, :, 0], dtype=torch.bool), active], 1)
    rows = torch.cat([jacobian_h, jacobian_g], 1) * used[:, :, None]
    scale = largest(rows.flatten(1)).clamp(min=torch.finfo(rows.dtype).tiny)[:, None]
    normal = rows @ rows.mT / scale[:, :, None] ** 2 + torch.diag_embed((~used).to(rows.dtype))
    target = matvec(rows, gradient) / scale**2
    sign = torch.cat([rows.new_zeros(m, p), -torch.eye(m, dtype=rows.dtype, device=rows.device)], 1).expand(B, m, p + m)
    none = rows.new_zeros(B, 0, p + m), rows.new_zeros(B, 0)
    # Nonnegative least squares on the normal equations finds which multipliers are positive. Their values then come
    # from a least-squares solve that does not square the condition number.
    found = solve_qp(normal, target, *none, sign, rows.new_zeros(B, m), ~active)
    support = torch.cat([used[:, :p], active & (found.x[:, p:] > 0)], 1)
    y = -matvec(torch.linalg.pinv((rows * support[:, :, None]).mT), gradient)
    return y[:, :p], torch.where(support[:, p:], y[:, p:], 0).clamp(min=0)
