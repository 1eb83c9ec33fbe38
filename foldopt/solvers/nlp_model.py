"""The quadratic models of a smooth program that `foldopt.solvers.nlp` solves for its steps, and its units."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates.programs import SmoothProgram, SQPData, checked

__all__ = ["WEIGHTS", "ScaledProgram", "convexified", "elastic_step", "violation"]

WEIGHTS = 10.0, 1e3, 1e5  # of J'J, relative to the Hessian: the least that makes it convex
AWAY = 1e-2  # where gradients are looked at besides the start, relative to 1 + |x|
FAR = 1e2  # sizes of gradients within this factor of 1 are left as they are
TINY = 1e-12  # sizes of gradients below are taken for zero
LONGEST = 1e2  # step along a direction without curvature, relative to 1 + |x|


class ScaledProgram(SmoothProgram):
    """A program in units in which its functions have gradients of about 1 at the start.

    A variable that is large at the start is divided by a power of 2; then each function is multiplied by one, for each
    sample, where its gradient is far from 1 (Wächter and Biegler, 2006, section 3.8, who only reduce). weight (B,): a
    further factor of the objective, 0 where only the constraints are to be satisfied.
    """

    def __init__(self, program: SmoothProgram, start: Tensor, params: tuple[Tensor, ...]) -> None:
        super().__init__(self._cost, self._equalities, self._inequalities)
        self.program, self.weight = program, torch.ones_like(start[:, 0])
        self.unit = 1 / _factor(start.abs().clamp(min=1))
        self.factor_f, (self.factor_h, self.factor_g) = self.weight, (self.weight[:, None],) * 2
        direction = torch.cos(torch.arange(1, start.shape[1] + 1, device=start.device, dtype=start.dtype))
        z = start / self.unit
        sizes = []
        for at in (z, z + AWAY * (1 + z.abs()) * direction):
            _, h, g = self.values(at, *params)
            data = SQPData(*self.sqp_data(at, torch.zeros_like(h), torch.zeros_like(g), *params))
            rows = torch.cat([data.gradient[:, None], data.jacobian_h, data.jacobian_g], 1)
            sizes.append(rows.abs().amax(2).nan_to_num(0, 0, 0))
        factors = _factor(torch.maximum(*sizes))
        self.factor_f = factors[:, 0]
        self.factor_h, self.factor_g = factors[:, 1:].split([h.shape[1], g.shape[1]], 1)

    def _cost(self, z: Tensor, *params: Tensor) -> Tensor:
        return self.weight * self.factor_f * checked("objective", self.program.objective(self.unit * z, *params), z, 1)

    def _equalities(self, z: Tensor, *params: Tensor) -> Tensor:
        return self.factor_h * self.program.constraints_of(self.unit * z, "equalities", *params)

    def _inequalities(self, z: Tensor, *params: Tensor) -> Tensor:
        return self.factor_g * self.program.constraints_of(self.unit * z, "inequalities", *params)

    def unscaled(self, z: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a point and its multipliers in the units of the program itself."""
        cost = self.factor_f[:, None]
        return self.unit * z, nu * self.factor_h / cost, lam * self.factor_g / cost

    def scaled(self, x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a point and its multipliers in the units of this program: the inverse of `unscaled`."""
        cost = self.factor_f[:, None]
        return x / self.unit, nu * cost / self.factor_h, lam * cost / self.factor_g


def _factor(size: Tensor) -> Tensor:
    """Return the powers of 2 that bring sizes far from 1 to 1; 1 for others and for those that are next to zero."""
    far = ((size > FAR) | (size < 1 / FAR)) & (size > TINY) & size.isfinite()
    return torch.where(far, torch.exp2(-torch.where(far, size, 1).log2().round()), 1)


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
