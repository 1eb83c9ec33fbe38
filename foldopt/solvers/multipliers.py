"""Lagrange multipliers of a primal solution, for black boxes that return x only."""

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
    """Return the multipliers (nu, lam), lam >= 0, that make grad f + Jh'nu + Jg'lam smallest in the 2-norm.

    Args:
        gradient: of f at the solution, (B, n).
        jacobian_h: of the equalities, (B, p, n); p may be 0.
        g: values of the inequalities, (B, m), meant as g <= 0; m may be 0.
        jacobian_g: of the inequalities, (B, m, n).
        tol: an inequality is taken for active where g >= -tol times the size of its row (at least 1); lam is 0
            elsewhere.

    At a KKT point with linearly independent active constraints they are *the* multipliers, to the accuracy of the
    solution; else those of least norm on their support. Nocedal and Wright, Numerical Optimization (2006), 18.3.
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
    # Nonnegative least squares finds the support; least squares on it is not squared in its conditioning.
    found = solve_qp(normal, target, *none, sign, rows.new_zeros(B, m), ~active)
    support = torch.cat([used[:, :p], active & (found.x[:, p:] > 0)], 1)
    y = -matvec(torch.linalg.pinv((rows * support[:, :, None]).mT), gradient)
    return y[:, :p], torch.where(support[:, p:], y[:, p:], 0).clamp(min=0)
