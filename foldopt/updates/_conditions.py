"""The KKT conditions of a smooth program, and the units in which they are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers.interior_point import largest
from foldopt.updates.programs import SmoothProgram, SQPData, SQPState, checked

__all__ = ["ScaledProgram", "cancelling", "factors", "kkt_residual", "singular"]

AWAY = 1e-2  # distance, relative to 1 + |x|, of the second point at which the sizes of gradients are measured
FAR = 1e2  # functions whose gradient is within this factor of 1 are not scaled
TINY = 1e-12  # gradients below this size count as zero
LONG = 1e-6  # a Newton step longer than this, relative to 1 + |x|, and than 1e4 KKT residuals means a singular Hessian
CANCELLING = 1e-2  # combined gradient of the constraints, relative to the sum of the multipliers, that counts as small
SATISFIED = 1e-8  # largest KKT residual at which the KKT conditions count as satisfied


def kkt_residual(
    x: Tensor, nu: Tensor, lam: Tensor, data: SQPData, slope: Tensor | float = 0.0, weight: Tensor | float = 1.0
) -> Tensor:
    """Return the largest relative violation (B,) of the KKT conditions.

    Args:
        x: the point, (B, n).
        nu: multipliers of the equalities, (B, p).
        lam: multipliers of the inequalities, (B, m).
        data: the quadratic model there.
        slope: least size of the gradient, (B,), relative to which stationarity is measured; default 0.
        weight: factor of the gradient with respect to each variable, (B, n); default 1.
    """
    pulled = [
        weight * data.gradient,
        weight * matvec(data.jacobian_h.mT, nu),
        weight * matvec(data.jacobian_g.mT, lam),
    ]
    size = torch.stack([largest(t) for t in pulled]).amax(0).clamp(min=slope)
    stationarity = largest(pulled[0] + pulled[1] + pulled[2]) / (1 + size)
    infeasible = largest(torch.cat([data.h, data.g.clamp(min=0)], 1)) / (1 + largest(x))
    complementary = largest(lam * data.g) / (1 + largest(lam))
    return torch.stack([stationarity, infeasible, complementary, largest((-lam).clamp(min=0))]).amax(0)


class ScaledProgram(SmoothProgram):
    """A program in units in which the gradients of its functions are about 1 at the start.

    Variables that are large at the start are divided by a power of 2. Then each function whose gradient is far from 1
    is multiplied by a power of 2, in each sample separately. Wächter and Biegler (2006, section 3.8) do the same, but
    only reduce gradients. The objective has a further factor `weight`, (B,): 1, or 0 if only the constraints count.

    Args:
        program: the program.
        start: the point at which the program is scaled, (B, n).
        params: parameters of the program.
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

    @property
    def even(self) -> Tensor:
        """The factors (B, n) that turn gradients into those in one unit for all variables, the largest."""
        return self.unit.amax(1, keepdim=True) / self.unit

    def unscaled(self, z: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convert a point z and its multipliers to the units of the original program."""
        cost = self.factor_f[:, None]
        return self.unit * z, nu * self.factor_h / cost, lam * self.factor_g / cost

    def scaled(self, x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convert a point x and its multipliers to the units of this program, the inverse of `unscaled`."""
        cost = self.factor_f[:, None]
        return x / self.unit, nu * cost / self.factor_h, lam * cost / self.factor_g


def factors(size: Tensor) -> Tensor:
    """Return powers of 2 that bring sizes to about 1; sizes that are close to 1, or almost zero, get the factor 1."""
    far = ((size > FAR) | (size < 1 / FAR)) & (size > TINY) & size.isfinite()
    return torch.where(far, torch.exp2(-torch.where(far, size, 1).log2().round()), 1)


def singular(program: SmoothProgram, state: SQPState, length: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """Return in which samples, (B,) bool, the KKT conditions hold although the Newton step is long.

    The Hessian of the Lagrangian is then singular, or nearly so, along the active constraints. The KKT residual is
    measured in units in which the gradients near x are about 1.

    Args:
        program: the program.
        state: x (B, n), nu (B, p) and lam (B, m).
        length: length of the Newton step relative to 1 + |x|, (B,); NaN counts as long.
        params: parameters of the program.
    """
    with torch.no_grad():
        scaled = ScaledProgram(program, state[0], params)
        z, nu, lam = scaled.scaled(*state)
        residual = kkt_residual(z, nu, lam, SQPData(*scaled.sqp_data(z, nu, lam, *params)))
        return ~(length <= LONG) & ~(length <= 1e4 * residual) & (residual <= SATISFIED)


def cancelling(program: SmoothProgram, state: SQPState, params: tuple[Tensor, ...]) -> Tensor:
    """Return in which samples, (B,) bool, large multipliers cancel in the sum Jh'nu + Jg'lam.

    This happens near a point that has no multipliers. The sum is taken in units in which the gradients near x are
    about 1.
    """
    with torch.no_grad():
        scaled = ScaledProgram(program, state[0], params)
        z, nu, lam = scaled.scaled(*state)
        data = SQPData(*scaled.sqp_data(z, nu, lam, *params))
        force = largest(matvec(data.jacobian_h.mT, nu) + matvec(data.jacobian_g.mT, lam))
        return force <= CANCELLING * torch.cat([nu, lam], 1).abs().sum(1)
