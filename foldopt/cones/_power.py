"""The power cone {(x, y, z): x^alpha y^(1 - alpha) >= |z|, x, y >= 0}.

Where v = (x, y, z) is neither in the cone nor in its polar, the projection is (X, Y, sign(z) r) with 0 < r < |z|,

    X (X - x) = alpha mu,   Y (Y - y) = beta mu,   mu = r (|z| - r),   beta = 1 - alpha,   X^alpha Y^beta = r

(Hien, Differential properties of Euclidean projection onto power cone, 2015). The derivatives are those of the
optimality conditions with log r - alpha log X - beta log Y = 0, in ratios between 0 and 1 that neither overflow nor
cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split, remembered, require_three
from foldopt.errors import InputError

REACH = 700.0  # largest |log(r / (|z| - r))| in the search
MAX_STEPS = 200
FLOOR = 1e-100  # a smaller |z| is treated as this
RESOLVED = 1e-8  # second derivatives are computed at |z| of at least this times min(|x|, |y|)
TINY = 1e-300


@dataclass(frozen=True)
class Power(Cone):
    """The power cone {(x, y, z): x^alpha y^(1 - alpha) >= |z|, x >= 0, y >= 0} in R^3.

    The projection solves one equation in one unknown by Newton's method with bisection. It has no derivative on the
    boundary of the cone and on that of the polar cone; closer to these than 1e-100 |v| the second derivative may
    overflow. Where z = 0 and x and y have opposite signs, a second derivative need not exist unless alpha is 1/2; the
    one of a nearby point is used.

    Args:
        alpha: the exponent, strictly between 0 and 1.

    Raises:
        InputError: if alpha is not strictly between 0 and 1.

    Source: Hien, Differential properties of Euclidean projection onto power cone (2015).

    Examples:
        >>> foldopt.cones.Power(0.5).project(torch.tensor([0.0, 0.0, 1.0]))
        tensor([0.3333, 0.3333, 0.3333])
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha={self.alpha}: expected a number strictly between 0 and 1.")

    def centre(self, d: int) -> Tensor:
        """Return (1, 1, 0); see `Cone.centre`."""
        return torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)

    def _require_size(self, v: Tensor) -> None:
        super()._require_size(v)
        require_three(self, v)

    def _split(self, v: Tensor) -> Split:
        regions, root = self._found(v)
        inside, polar, _ = (part[..., None] for part in regions)
        sign = v[..., 2].sign()
        s = torch.stack([root.X, root.Y, sign * root.size * root.share], -1)
        p = torch.stack([-root.up_x, -root.up_y, sign * root.size * root.rest], -1)
        return torch.where(inside, v, torch.where(polar, 0.0, s)), torch.where(inside, 0.0, torch.where(polar, v, p))

    def _derivative(self, v: Tensor) -> Tensor:
        regions, root = self._found(v)
        inside, polar, _ = (part[..., None, None] for part in regions)
        D = self._on_surface(v, root)
        return torch.where(inside, torch.eye(3, dtype=v.dtype, device=v.device), torch.where(polar, 0.0, D))

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        _, _, curved = self._regions(v)
        sign = torch.where(v[..., 2] >= 0, 1.0, -1.0).to(v)
        least = RESOLVED * v[..., :2].abs().amin(-1)  # for smaller |z| rounding errors divided by |z| would dominate
        v = torch.cat([v[..., :2], (sign * v[..., 2].abs().maximum(least))[..., None]], -1)
        root = self._root(v, curved)
        D = self._on_surface(v, root)
        s = torch.stack([root.X, root.Y, root.size * root.share], -1).clamp(min=TINY)
        s[..., 2] *= sign
        lengths = v.new_tensor([self.alpha, 1 - self.alpha, -1.0])
        push = torch.stack([root.up_x, root.up_y, -sign * root.size * root.rest], -1)
        total, lean = root.total(self.alpha), root.share - root.rest
        normal = torch.stack([-root.X * root.k_x * lean, -root.Y * root.k_y * lean, s[..., 2] * root.rest], -1)
        log_mu = torch.stack(
            [-self.alpha * lean / root.R_x, (self.alpha - 1) * lean / root.R_y, sign / root.size], -1
        )  # the derivative of log mu, times total
        rate_g, rate_h = ((D @ w[..., None])[..., 0] / s for w in (g, h))
        mu_g, mu_h = ((log_mu * w).sum(-1, keepdim=True) / total[..., None] for w in (g, h))
        # push and normal come first in each product: near the edges the rates are as large as they are small
        bend = push * rate_h * mu_g + push * rate_g * mu_h - 2 * (push * rate_g * rate_h)
        drift = (normal[..., :, None] * (lengths * rate_g)[..., None, :] @ rate_h[..., None])[..., 0]
        second = -(D @ bend[..., None])[..., 0] - drift / total[..., None]
        return torch.where(curved[..., None], second, 0.0)

    def _distance(self, v: Tensor) -> Tensor:
        (inside, polar, _), _ = self._found(v)
        s, p = (torch.linalg.vector_norm(part, dim=-1) for part in self._split(v))
        lengths = v.new_tensor([self.alpha, 1 - self.alpha])
        xy, z = v[..., :2], v[..., 2]
        in_cone, in_polar = self._depth(xy, 1.0, z), self._depth(-xy, lengths, z)
        return torch.where(inside, in_cone, torch.where(polar, in_polar, torch.minimum(s, p)))

    def _depth(self, xy: Tensor, unit: Tensor | float, z: Tensor) -> Tensor:
        """Return the distance from inside to the surface (x / unit_x)^alpha (y / unit_y)^beta = |z|, to first order."""
        xy = xy.clamp(min=TINY)
        lengths = xy.new_tensor([self.alpha, 1 - self.alpha])
        height = torch.exp((lengths * (xy / unit).log()).sum(-1))
        slope = torch.linalg.vector_norm(lengths * height[..., None] / xy, dim=-1)
        edge = torch.hypot(xy.amin(-1), z)
        return torch.minimum((height - z.abs()) / torch.hypot(slope, torch.ones_like(slope)), edge).clamp(min=0)

    @remembered
    def _found(self, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], _Root]:
        """Return the region of each point, and the root of its equation."""
        regions = self._regions(v)
        return regions, self._root(v, regions[2])

    def _regions(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether v is in the cone, in its polar cone, or projected on the boundary, (...) bool each."""
        x, y, z = v.unbind(-1)
        a, b = self.alpha, 1 - self.alpha
        inside = (x >= 0) & (y >= 0) & (x.clamp(min=0) ** a * y.clamp(min=0) ** b >= z.abs())
        polar = (x <= 0) & (y <= 0) & (((-x / a).clamp(min=0)) ** a * ((-y / b).clamp(min=0)) ** b >= z.abs())
        polar = polar & ~inside
        return inside, polar, ~(inside | polar)

    def _root(self, v: Tensor, curved: Tensor) -> _Root:
        """Find u = log(r / (|z| - r)) by Newton's method with bisection; X^alpha Y^beta / r decreases in u."""
        v = torch.where(curved[..., None], v, v.new_tensor([1.0, 1.0, 2.0]))
        size = v[..., 2].abs().clamp(min=FLOOR)
        u = torch.zeros_like(size)
        low, high = u - REACH, u + REACH
        step = last = high - low
        settled = torch.zeros_like(u, dtype=torch.bool)
        for _ in range(MAX_STEPS):
            root = self._at(v, size, u)
            value = self.alpha * root.X.log() + (1 - self.alpha) * root.Y.log() - (size * root.share).log()
            low, high = torch.where(value >= 0, u, low), torch.where(value <= 0, u, high)
            slope = root.total(self.alpha).clamp(min=TINY)
            newton = u + value / slope
            good = (newton >= low) & (newton <= high) & (2 * value.abs() <= last * slope)
            new = torch.where(settled, u, torch.where(good, newton, 0.5 * (low + high)))
            step, last = (new - u).abs(), step
            u = new
            settled = settled | (step <= 4e-16 * u.abs().clamp(min=1))
            if settled.all():
                break
        return self._at(v, size, u)

    def _at(self, v: Tensor, size: Tensor, u: Tensor) -> _Root:
        share, rest = torch.sigmoid(u), torch.sigmoid(-u)
        root_mu = size * (share * rest).sqrt()
        X, up_x, R_x = _lifted(v[..., 0], self.alpha**0.5 * root_mu)
        Y, up_y, R_y = _lifted(v[..., 1], (1 - self.alpha) ** 0.5 * root_mu)
        return _Root(size, share, rest, X, up_x, R_x, Y, up_y, R_y)

    def _on_surface(self, v: Tensor, root: _Root) -> Tensor:
        """Return the derivative at points of the curved part, (..., 3, 3)."""
        a, b = self.alpha, 1 - self.alpha
        share, rest, k_x, k_y, c_x, c_y = root.share, root.rest, root.k_x, root.k_y, root.c_x, root.c_y
        sign = torch.where(v[..., 2] >= 0, 1.0, -1.0).to(v)
        xx = c_x * (share * b * k_y + rest * (c_y + a * k_y))
        yy = c_y * (share * a * k_x + rest * (c_x + b * k_x))
        zz = share * (a * k_x + b * k_y)
        xy = (rest - share) * (a * b * c_x * k_x * c_y * k_y).sqrt()
        xz = sign * (a * c_x * k_x * share * rest).sqrt()
        yz = sign * (b * c_y * k_y * share * rest).sqrt()
        D = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1) / root.total(a)[..., None]
        return D.unflatten(-1, (3, 3))


class _Root(NamedTuple):
    """The quantities of the equation at one value of the unknown u, (...) each.

    size = |z|, share = r / |z|, rest = 1 - share; up_x = X - x, R_x = 2 X - x, up_y = Y - y, R_y = 2 Y - y.
    """

    size: Tensor
    share: Tensor
    rest: Tensor
    X: Tensor
    up_x: Tensor
    R_x: Tensor
    Y: Tensor
    up_y: Tensor
    R_y: Tensor

    @property
    def c_x(self) -> Tensor:
        """Return X / (2 X - x)."""
        return self.X / self.R_x

    @property
    def k_x(self) -> Tensor:
        """Return (X - x) / (2 X - x)."""
        return self.up_x / self.R_x

    @property
    def c_y(self) -> Tensor:
        """Return Y / (2 Y - y)."""
        return self.Y / self.R_y

    @property
    def k_y(self) -> Tensor:
        """Return (Y - y) / (2 Y - y)."""
        return self.up_y / self.R_y

    def total(self, alpha: float) -> Tensor:
        """Return minus the derivative of log(X^alpha Y^beta / r) with respect to u, (...), which is positive."""
        beta = 1 - alpha
        return self.share * (alpha * self.k_x + beta * self.k_y) + self.rest * (alpha * self.c_x + beta * self.c_y)


def _lifted(x: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return X, X - x and 2 X - x for the positive root of X (X - x) = width^2."""
    R = torch.hypot(x, 2 * width)
    larger = (0.5 * (R + x.abs())).clamp(min=TINY)
    smaller = width * (width / larger)
    return torch.where(x >= 0, larger, smaller).clamp(min=TINY), torch.where(x >= 0, smaller, larger), R.clamp(min=TINY)
