"""The quadratic models of a smooth program that `foldopt.solvers.nlp` solves for its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates.programs import SQPData

__all__ = ["WEIGHTS", "convexified", "elastic_step", "violation"]

WEIGHTS = 10.0, 1e3, 1e5  # weights of J'J, relative to the Hessian; the first that makes the model convex is used
LONGEST = 1e2  # longest step, relative to 1 + |x|, along a direction without curvature


def violation(h: Tensor, g: Tensor) -> Tensor:
    """Return the sum of the violations of h = 0 and g <= 0, (B,)."""
    return h.abs().sum(1) + g.clamp(min=0).sum(1)


def elastic_step(hessian: Tensor, data: SQPData, penalty: Tensor) -> QPSolution:
    """Minimize 1/2 d'Hd + gradient'd + penalty times the violation of the linearized constraints at d.

    A solution exists even if the linearized constraints contradict each other (Nocedal and Wright, 2006, section 18.5).

    Args:
        hessian: H, (B, n, n), positive definite.
        data: the quadratic model, for the gradient and the constraints.
        penalty: (B,), above 0.
    """
    n, p, m = data.gradient.shape[1], data.h.shape[1], data.g.shape[1]
    total = n + p + m
    # The variables are (d, s, t), with |Jh d + h| <= s, Jg d + g <= t and t >= 0; s and t cost the penalty.
    small = 1e-8 * torch.maximum(hessian.flatten(1).abs().amax(1), 1e-4 * penalty)
    H = torch.diag_embed(small[:, None].expand(-1, total)).clone()
    H[:, :n, :n] += hessian
    q = torch.cat([data.gradient, penalty[:, None].expand(-1, p + m)], 1)
    eye = torch.eye(p + m, dtype=q.dtype, device=q.device).expand(len(q), -1, -1)
    J = torch.cat([data.jacobian_h, data.jacobian_g, -data.jacobian_h, torch.zeros_like(data.jacobian_g)], 1)
    G = torch.cat([J, -eye.repeat(1, 2, 1)], 2)
    bound = torch.cat([-data.h, -data.g, data.h, torch.zeros_like(data.g)], 1)
    none = q.new_zeros(len(q), 0, total), q.new_zeros(len(q), 0)
    relaxed = solve_qp(H, q, *none, G, bound)
    upper, lam, lower = relaxed.lam[:, : 2 * p + m].split([p, m, p], 1)
    return relaxed._replace(x=relaxed.x[:, :n], nu=upper - lower, lam=lam, active=lam > 0)


def convexified(data: SQPData, active: Tensor, x: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Return a positive definite Hessian (B, n, n) and the gradient (B, n) that goes with it.

    A positive definite Hessian is left as it is. If it is positive definite on the null space of the active
    constraints only, a multiple of J'J is added, and the gradient is changed so that the step onto these constraints
    stays the same. In other samples the eigenvalues are replaced by their absolute values. Small ones, as of a linear
    objective without multipliers, are raised so that the step along their directions stays below `LONGEST`.

    Args:
        data: the quadratic model.
        active: which inequalities count as active, (B, m) bool.
        x: the iterates, (B, n).
        ridge: multiple of the identity that is added to the Hessian first, (B,).
    """
    n = x.shape[1]
    H = (data.hessian + data.hessian.mT) / 2 + ridge[:, None, None] * torch.eye(n, dtype=x.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(H)
    scale = values.abs().amax(1)
    rows = torch.cat([data.jacobian_h, data.jacobian_g], 1).flatten(1)
    slope = torch.where(data.gradient.any(1), largest(data.gradient), largest(rows))
    least = torch.maximum(1e-8 * scale, slope / (LONGEST * (1 + largest(x)))).clamp(min=1e-12)
    floor = torch.minimum(1e-8 * scale.clamp(min=1e-12), least)
    convex = values[:, 0] > 1e-8 * scale
    if convex.all():
        return H, data.gradient
    J = torch.cat([data.jacobian_h, data.jacobian_g * active[:, :, None]], 1)
    J = J / torch.linalg.vector_norm(J, dim=2, keepdim=True).clamp(min=1e-12)
    norms = torch.linalg.vector_norm(torch.cat([data.jacobian_h, data.jacobian_g], 1), dim=2).clamp(min=1e-12)
    target = torch.cat([data.h, data.g], 1) / norms
    hessian = torch.einsum("bij,bj,bkj->bik", vectors, torch.maximum(values.abs(), least[:, None]), vectors)
    hessian, gradient = torch.where(convex[:, None, None], H, hessian), data.gradient
    done = convex | (scale <= floor)
    for factor in WEIGHTS:
        weight = factor * scale[:, None]
        augmented = H + weight[:, :, None] * J.mT @ J
        take = ~done & (torch.linalg.eigvalsh(augmented)[:, 0] > floor)
        shift = matvec(J.mT, weight * target)
        hessian = torch.where(take[:, None, None], augmented, hessian)
        gradient = torch.where(take[:, None], gradient + shift, gradient)
        done = done | take
        if done.all():
            break
    return hessian, gradient
