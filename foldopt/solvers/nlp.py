"""A batched sequential quadratic programming solver for smooth programs, convex or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.errors import InputError
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates.programs import SmoothProgram, SQPData

__all__ = ["HALVINGS", "MEMORY", "WEIGHTS", "NLPSolution", "kkt_residual", "solve_nlp"]

MEMORY = 5
HALVINGS = 30
WEIGHTS = 10.0, 1e3, 1e5  # of J'J, relative to the Hessian: the least that makes it convex


class NLPSolution(NamedTuple):
    """x (B, n), multipliers nu (B, p) and lam (B, m), and per sample (B,): ok, the KKT residual, iterations."""

    x: Tensor
    nu: Tensor
    lam: Tensor
    ok: Tensor
    residual: Tensor
    iterations: Tensor


def solve_nlp(
    program: SmoothProgram, start: Tensor, *params: Tensor, tol: float = 1e-10, max_iter: int = 200
) -> NLPSolution:
    """Find a KKT point of min f(x, c) s.t. h(x, c) = 0, g(x, c) <= 0 from `start` for every sample of a batch.

    Sequential quadratic programming with exact Hessians: a model that is not convex on the active constraints is made
    so, an inconsistent linearization is relaxed with an l1 penalty, and a nonmonotone line search on the l1 merit
    function leads to local minima (Nocedal and Wright, Numerical Optimization, 2006, ch. 18). Near a solution with
    independent active constraints and second-order sufficiency it takes Newton steps.

    Args:
        program: the functions. start: (B, n), float64 to reach the default tolerance. params: those of the functions.
        tol: the largest KKT residual that counts as solved: stationarity, infeasibility and complementarity, relative
            to 1 and the sizes of the gradient, x and the multipliers. Where these are far below 1, so must tol be.

    A sample that is not solved, such as one with NaN or inf, has ok False and its last iterate. Raises InputError if
    start is not (B, n).
    """
    if start.dim() != 2 or not start.is_floating_point():
        raise InputError(f"start has shape {tuple(start.shape)} and dtype {start.dtype}, expected floating (B, n).")
    x = start.detach().clone()
    _, h, g = program.values(x, *params)
    nu, lam = torch.zeros_like(h), torch.zeros_like(g)
    penalty = x.new_ones(len(x))
    iterations = torch.zeros(len(x), dtype=torch.long, device=x.device)
    history: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for _ in range(max_iter):
            data = SQPData(*program.sqp_data(x, nu, lam, *params))
            running = ~(kkt_residual(x, nu, lam, data) <= tol)
            if not running.any():
                break
            step = _model_step(data, lam, penalty)
            sizes = torch.cat([step.nu.abs(), step.lam, torch.ones_like(penalty)[:, None]], 1).amax(1)
            penalty = torch.where(penalty < 1.1 * sizes, 1.5 * sizes, penalty)
            f, h, g = program.values(x, *params)
            history = [*history[1 - MEMORY :], (f, _violation(h, g))]
            slope = (data.gradient * step.x).sum(1) - penalty * history[-1][1]
            alpha = _line_search(program, x, params, step.x, slope, penalty, history)
            alpha = torch.where(running & step.ok, alpha, 0)[:, None]
            iterations = iterations + running
            x, nu, lam = (
                torch.where(alpha > 0, old + alpha * change, old)
                for old, change in ((x, step.x), (nu, step.nu - nu), (lam, step.lam - lam))
            )
        data = SQPData(*program.sqp_data(x, nu, lam, *params))
        residual = kkt_residual(x, nu, lam, data)
    return NLPSolution(x, nu, lam, residual <= tol, residual, iterations)


def kkt_residual(x: Tensor, nu: Tensor, lam: Tensor, data: SQPData) -> Tensor:
    """Return the worst relative violation (B,) of the KKT conditions at (x, nu, lam); `data` is the model there."""
    pulled = [
        data.gradient,
        matvec(data.jacobian_h.mT, nu),
        matvec(data.jacobian_g.mT, lam),
    ]
    stationarity = largest(pulled[0] + pulled[1] + pulled[2]) / (1 + torch.stack([largest(t) for t in pulled]).amax(0))
    infeasible = largest(torch.cat([data.h, data.g.clamp(min=0)], 1)) / (1 + largest(x))
    complementary = largest(lam * data.g) / (1 + largest(lam))
    return torch.stack([stationarity, infeasible, complementary, largest((-lam).clamp(min=0))]).amax(0)


def _violation(h: Tensor, g: Tensor) -> Tensor:
    return h.abs().sum(1) + g.clamp(min=0).sum(1)


def _model_step(data: SQPData, lam: Tensor, penalty: Tensor) -> QPSolution:
    """Solve the quadratic model, made convex; where its constraints are inconsistent, their l1 relaxation.

    A sample that is not finite is not ok, and the others do not see it.
    """
    sound = torch.stack([part.flatten(1).isfinite().all(1) for part in data]).all(0)
    data = SQPData(*(torch.where(sound.view(-1, *[1] * (part.dim() - 1)), part, 0) for part in data))
    guess = lam > -data.g
    hessian, gradient = _convexified(data, guess)
    found = solve_qp(hessian, gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g, guess)
    if found.ok.all():
        return found._replace(ok=sound)
    n, p, m = data.gradient.shape[1], data.h.shape[1], data.g.shape[1]
    total = n + p + m
    # Variables (d, s, t): |Jh d + h| <= s and Jg d + g <= t, t >= 0, with the penalty on s and t.
    H = torch.diag_embed(torch.full_like(data.gradient[:, :1], 1e-8).expand(-1, total)).clone()
    H[:, :n, :n] += hessian
    q = torch.cat([gradient, penalty[:, None].expand(-1, p + m)], 1)
    eye = torch.eye(p + m, dtype=q.dtype, device=q.device).expand(len(q), -1, -1)
    J = torch.cat([data.jacobian_h, data.jacobian_g, -data.jacobian_h, torch.zeros_like(data.jacobian_g)], 1)
    G = torch.cat([J, -eye.repeat(1, 2, 1)], 2)
    bound = torch.cat([-data.h, -data.g, data.h, torch.zeros_like(data.g)], 1)
    none = q.new_zeros(len(q), 0, total), q.new_zeros(len(q), 0)
    relaxed = solve_qp(H, q, *none, G, bound)
    upper, lam_g, lower = relaxed.lam[:, : 2 * p + m].split([p, m, p], 1)
    pairs = zip(found[:3], (relaxed.x[:, :n], upper - lower, lam_g), strict=True)
    x, nu, lam = (torch.where(found.ok[:, None], a, b) for a, b in pairs)
    return found._replace(x=x, nu=nu, lam=lam, ok=(found.ok | relaxed.ok) & sound)


def _convexified(data: SQPData, active: Tensor) -> tuple[Tensor, Tensor]:
    """Return a positive definite Hessian and the gradient that goes with it.

    A Hessian that is positive definite stays. One that is so on the null space of the active constraints gets a
    multiple of J'J, and the gradient what leaves the step onto these constraints unchanged. Others get the absolute
    values of their eigenvalues.
    """
    H = (data.hessian + data.hessian.mT) / 2
    values, vectors = torch.linalg.eigh(H)
    scale = values.abs().amax(1).clamp(min=1e-8)
    floor = 1e-8 * scale
    convex = values[:, 0] > floor
    if convex.all():
        return H, data.gradient
    J = torch.cat([data.jacobian_h, data.jacobian_g * active[:, :, None]], 1)
    J = J / torch.linalg.vector_norm(J, dim=2, keepdim=True).clamp(min=1e-12)
    norms = torch.linalg.vector_norm(torch.cat([data.jacobian_h, data.jacobian_g], 1), dim=2).clamp(min=1e-12)
    target = torch.cat([data.h, data.g], 1) / norms
    hessian = torch.einsum("bij,bj,bkj->bik", vectors, torch.maximum(values.abs(), 1e-4 * scale[:, None]), vectors)
    hessian, gradient = torch.where(convex[:, None, None], H, hessian), data.gradient
    done = convex
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


def _line_search(
    program: SmoothProgram,
    x: Tensor,
    params: tuple[Tensor, ...],
    d: Tensor,
    slope: Tensor,
    penalty: Tensor,
    history: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Return per sample the first of 1, 1/2, 1/4, ... that lowers the l1 merit below the worst of the last ones."""
    reference = torch.stack([f + penalty * violation for f, violation in history]).amax(0)
    slack = 1e-12 * (1 + reference.abs())
    alpha = torch.ones_like(slope)
    accepted = torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(HALVINGS):
        f, h, g = program.values(x + alpha[:, None] * d, *params)
        merit = f + penalty * _violation(h, g)
        accepted = accepted | (merit <= reference + 1e-4 * alpha * slope.clamp(max=0) + slack)
        if accepted.all():
            break
        alpha = torch.where(accepted, alpha, alpha / 2)
    return alpha
