"""The KKT conditions of a smooth program, and the units in which they are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.updates.programs import SmoothProgram, SQPData, SQPState, checked

__all__ = ["ScaledProgram", "cancelling", "factors", "kkt_residual", "singular"]

AWAY = 1e-2  # where gradients are looked at besides the start, relative to 1 + |x|
FAR = 1e2  # sizes of gradients within this factor of 1 are left as they are
TINY = 1e-12  # sizes of gradients below are taken for zero
LONG = 1e-6  # a step of more than this, relative to 1 + |x|, and than 1e4 times the KKT residual: a singular Hessian
CANCELLING = 1e-2  # force of multipliers, relative to their sum, that is small
SATISFIED = 1e-8  # KKT residual up to which the conditions hold


def kkt_residual(x: Tensor, nu: Tensor, lam: Tensor, data: SQPData, slope: Tensor | float = 0.0) -> Tensor:
    """Return the worst relative violation (B,) of the KKT conditions at (x, nu, lam); `data` is the model there.

    slope: (B,), a further size of the gradient to which the stationarity is relative.
    """
    pulled = [
        data.gradient,
        matvec(data.jacobian_h.mT, nu),
        matvec(data.jacobian_g.mT, lam),
    ]
    size = torch.stack([largest(t) for t in pulled]).amax(0).clamp(min=slope)
    stationarity = largest(pulled[0] + pulled[1] + pulled[2]) / (1 + size)
    infeasible = largest(torch.cat([data.h, data.g.clamp(min=0)], 1)) / (1 + largest(x))
    complementary = largest(lam * data.g) / (1 + largest(lam))
    return torch.stack([stationarity, infeasible, complementary, largest((-lam).clamp(min=0))]).amax(0)


class ScaledProgram(SmoothProgram):
    """A program in units in which its functions have gradients of about 1 at the start.

    A variable that is large at the start is divided by a power of 2; then each function is multiplied by one, for each
    sample, where its gradient is far from 1 (Wächter and Biegler, 2006, section 3.8, who only reduce). weight (B,): a
    further factor of the objective, 0 where only the constraints are to be satisfied.
    """

    def __init__(self, program: SmoothProgram, start: Tensor, params: tuple[Tensor, ...]) -> None:
        super().__init__(self._cost, self._equalities, self._inequalities)
        self.program, self.weight = program, torch.ones_like(start[:, 0])
        self.unit = 1 / factors(start.abs().clamp(min=1))
        self.factor_f, (self.factor_h, self.factor_g) = self.weight, (self.weight[:, None],) * 2
        direction = torch.cos(torch.arange(1, start.shape[1] + 1, device=start.device, dtype=start.dtype))
        z = start / self.unit
        sizes = []
        for at in (z, z + AWAY * (1 + z.abs()) * direction):
            _, h, g = self.values(at, *params)
            data = SQPData(*self.sqp_data(at, torch.zeros_like(h), torch.zeros_like(g), *params))
            rows = torch.cat([data.gradient[:, None], data.jacobian_h, data.jacobian_g], 1)
            sizes.append(rows.abs().amax(2).nan_to_num(0, 0, 0))
        every = factors(torch.maximum(*sizes))
        self.factor_f = every[:, 0]
        self.factor_h, self.factor_g = every[:, 1:].split([h.shape[1], g.shape[1]], 1)

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


def factors(size: Tensor) -> Tensor:
    """Return the powers of 2 that bring sizes far from 1 to 1; 1 for others and for those that are next to zero."""
    far = ((size > FAR) | (size < 1 / FAR)) & (size > TINY) & size.isfinite()
    return torch.where(far, torch.exp2(-torch.where(far, size, 1).log2().round()), 1)


def singular(program: SmoothProgram, state: SQPState, length: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """Return where the KKT conditions hold though a Newton step is long, (B,) bool.

    The Hessian of the Lagrangian is singular on the active constraints there, or nearly so. length: (B,), that of the
    step, relative to 1 + |x|; NaN counts as long. The KKT residual is in units in which gradients around x are about 1.
    """
    with torch.no_grad():
        scaled = ScaledProgram(program, state[0], params)
        z, nu, lam = scaled.scaled(*state)
        residual = kkt_residual(z, nu, lam, SQPData(*scaled.sqp_data(z, nu, lam, *params)))
        return ~(length <= LONG) & ~(length <= 1e4 * residual) & (residual <= SATISFIED)


def cancelling(program: SmoothProgram, state: SQPState, params: tuple[Tensor, ...]) -> Tensor:
    """Return where the multipliers are large beside the force that they make together, (B,) bool.

    So they are at a point near one that has none, in units in which the gradients around x are about 1.
    """
    with torch.no_grad():
        scaled = ScaledProgram(program, state[0], params)
        z, nu, lam = scaled.scaled(*state)
        data = SQPData(*scaled.sqp_data(z, nu, lam, *params))
        force = largest(matvec(data.jacobian_h.mT, nu) + matvec(data.jacobian_g.mT, lam))
        return force <= CANCELLING * torch.cat([nu, lam], 1).abs().sum(1)
