"""The quadratic models of a smooth program that `foldopt.solvers.nlp` solves for its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates.programs import SQPData

__all__ = ["WEIGHTS", "convexified", "elastic_step", "violation"]

WEIGHTS = 10.0, 1e3, 1e5  # of J'J, relative to the Hessian: the least that makes it convex
LONGEST = 1e2  # step along a direction without curvature, relative to 1 + |x|


def violation(h: Tensor, g: Tensor) -> Tensor:
    """Return the sum of the violations of h = 0 and g <= 0, (B,)."""
    return h.abs().sum(1) + g.clamp(min=0).sum(1)


def elastic_step(hessian: Tensor, data: SQPData, penalty: Tensor) -> QPSolution:
    """Solve min 1/2 d'Hd + gradient'd + penalty times the violation of the linearized constraints at d.

    hessian: positive definite. penalty: (B,) > 0. This has a solution whether the constraints are consistent or not
    (Nocedal and Wright, 2006, 18.5).
    """
    n, p, m = data.gradient.shape[1], data.h.shape[1], data.g.shape[1]
    total = n + p + m
    # Variables (d, s, t): |Jh d + h| <= s and Jg d + g <= t, t >= 0, with the penalty on s and t.
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
    """Return a positive definite Hessian and the gradient that goes with it.

    A Hessian that is positive definite stays. One that is so on the null space of the active constraints gets a
    multiple of J'J, and the gradient what leaves the step onto these constraints unchanged. Others get the absolute
    values of their eigenvalues, and where these are small, as for a linear objective without multipliers, as much as
    keeps the step along their directions below `LONGEST`.
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
