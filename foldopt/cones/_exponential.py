"""The exponential cone, the closure of {(x, y, z): y > 0, y exp(x / y) <= z}.

Where v = (x, y, z) is neither in the cone nor in its polar, nor projected on a flat face, the projection s is given by

    s = sigma (r, 1, exp(r)),   v - s = tau (1, 1 - r, -exp(-r)),   q = r^2 - r + 1,
    sigma = ((r - 1) x + y) / q,   tau = (x - r y) / q,

with r the only root of sigma exp(r) - tau exp(-r) = z at which sigma and tau are positive (Friberg, Projection onto the
exponential cone: a univariate root-finding problem, 2021). Of the two exponentials the one that is at most 1 is used,
so nothing overflows. The derivatives are those of the optimality conditions s + mu f'(s) = v, f(s) = 0, written in an
orthonormal frame in which no term cancels another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split, remembered, require_three

_Regions = tuple[Tensor, Tensor, Tensor]
FAR = 700.0  # exp(-FAR) is positive but negligible beside 1
REACH = 800.0  # width of the bracket: so far from its end exp exceeds every float64
MAX_STEPS = 200
TINY = 1e-300


@dataclass(frozen=True)
class Exponential(Cone):
    """The exponential cone, the closure of {(x, y, z): y > 0, y exp(x / y) <= z} in R^3.

    The order of x, y and z is that of CVXPY, SCS and Clarabel. The projection solves one equation in one unknown by
    Newton's method with bisection. It has no derivative on the boundary of the cone, on that of the polar cone, and
    where x <= 0, y <= 0 and one of x, y, z is 0.

    Source: Friberg, Projection onto the exponential cone: a univariate root-finding problem (2021).

    Examples:
        >>> foldopt.cones.Exponential().project(torch.tensor([1.0, 1.0, 0.0]))
        tensor([0.1466, 0.4346, 0.6090])
    """

    def centre(self, d: int) -> Tensor:
        """Return (-1, 1/2, 1); see `Cone.centre`."""
        return torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)

    def _require_size(self, v: Tensor) -> None:
        super()._require_size(v)
        require_three(self, v)

    def _split(self, v: Tensor) -> Split:
        regions, root = self._found(v)
        inside, polar, curved = (part[..., None] for part in regions)
        s = torch.stack([root.sigma * root.r, root.sigma, root.top], -1)
        p = torch.stack([root.tau, root.tau * (1 - root.r), -root.bottom], -1)
        flat = v.clamp(min=0)
        flat[..., 0] = v[..., 0].clamp(max=0)
        s, p = torch.where(curved, s, flat), torch.where(curved, p, v - flat)
        return torch.where(inside, v, torch.where(polar, 0.0, s)), torch.where(inside, 0.0, torch.where(polar, v, p))

    def _derivative(self, v: Tensor) -> Tensor:
        regions, root = self._found(v)
        inside, polar, curved = (part[..., None, None] for part in regions)
        frame = _frame(root)
        flat = v >= 0
        flat[..., 0] = v[..., 0] <= 0
        D = torch.where(curved, frame.U @ frame.D @ frame.U.mT, torch.diag_embed(flat.to(v)))
        eye = torch.eye(3, dtype=v.dtype, device=v.device)
        return torch.where(inside, eye, torch.where(polar, 0.0, D))

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        (_, _, curved), root = self._found(v)
        r, sigma, tau = root.r, root.sigma.clamp(min=TINY), root.tau
        n, U, D, normal, turn, weight = _frame(root)
        g, h = (_times(U.mT, w) for w in (g, h))
        turn_g, turn_h = ((turn * w).sum(-1) for w in (g, h))
        grow_g, grow_h = (_times(U, _times(D, w))[..., 1] / sigma for w in (g, h))  # relative growth of sigma
        push_g, push_h = (weight * (normal * w).sum(-1) for w in (g, h))  # growth of tau due to mu
        # tau and sigma come first in each product: near the edges the rates are as large as they are small
        both = tau * turn_g * turn_h
        along = both - tau * turn_h * grow_g - tau * turn_g * grow_h + push_g * turn_h + push_h * turn_g
        bend = torch.stack([n * along + both * r / n, -both / n, torch.zeros_like(r)], -1)
        second = -_times(D, bend) - (weight * sigma * turn_g * turn_h)[..., None] * normal
        return torch.where(curved[..., None], _times(U, second), 0.0)

    def _distance(self, v: Tensor) -> Tensor:
        x, y, z = v.unbind(-1)
        (inside, polar, _), _ = self._found(v)
        s, p = (torch.linalg.vector_norm(part, dim=-1) for part in self._split(v))
        edges = torch.minimum(torch.hypot(x, y.clamp(min=0)), torch.hypot(y, x.clamp(min=0)))
        sheet = torch.where((x <= 0) & (y <= 0), z.abs(), torch.inf)
        outside = torch.stack([s, p, edges, sheet]).amin(0)
        return torch.where(inside, _depth(x, y, z, 0.0), torch.where(polar, _depth(y, x, -z, 1.0), outside))

    @remembered
    def _found(self, v: Tensor) -> tuple[_Regions, _Root]:
        """Return the region of each point, and the root of its equation."""
        regions = _regions(v)
        return regions, _root(v, regions[2])


def _regions(v: Tensor) -> _Regions:
    """Return whether v is in the cone, in its polar cone, or projected on the curved boundary, (...) bool each."""
    x, y, z = v.unbind(-1)
    ratio, inverse = x / torch.where(y > 0, y, 1.0), y / torch.where(x > 0, x, 1.0)
    height, depth = z.clamp(min=0).log(), (-z).clamp(min=0).log()
    inside = ((y > 0) & (z >= 0) & (y.clamp(min=0).log() + ratio <= height)) | ((y == 0) & (x <= 0) & (z >= 0))
    polar = ((x > 0) & (z <= 0) & (x.clamp(min=0).log() + inverse - 1 <= depth)) | ((x == 0) & (y <= 0) & (z <= 0))
    polar = polar & ~inside
    flat = ((x <= 0) & (y <= 0)) | ((x > 0) & (1 - inverse > FAR)) | ((y > 0) & (ratio < -FAR))
    return inside, polar, ~(inside | polar | flat)


def _depth(a: Tensor, b: Tensor, c: Tensor, shift: float) -> Tensor:
    """Return the distance of points in {b exp(a / b - shift) <= c, b >= 0} to its boundary, to first order."""
    r = a / b.clamp(min=TINY)
    slope = torch.exp((r - shift).clamp(max=FAR))
    length = torch.hypot(slope * torch.hypot(1 - r, torch.ones_like(r)), torch.ones_like(r))
    depth = torch.where(b > 0, (c - b * slope) / length, c)
    return torch.minimum(depth, torch.where(a <= 0, b, torch.inf)).clamp(min=0)


class _Root(NamedTuple):
    """r, sigma and tau of the module's docstring, top = sigma exp(r) and bottom = tau exp(-r), (...) each."""

    r: Tensor
    sigma: Tensor
    tau: Tensor
    top: Tensor
    bottom: Tensor


def _root(v: Tensor, curved: Tensor) -> _Root:
    """Find r by Newton's method with bisection (rtsafe of Press et al., Numerical Recipes, 9.4).

    It is applied to log(sigma exp(r) + max(-z, 0)) - log(tau exp(-r) + max(z, 0)), which is nearly linear in r;
    without the logarithms Newton's method would need many small steps along an exponential.
    """
    x, y, z = torch.where(curved[..., None], v, v.new_tensor([1.0, 1.0, 0.0])).unbind(-1)
    low = torch.where(x > 0, 1 - y / torch.where(x > 0, x, 1.0), -torch.inf)
    high = torch.where(y > 0, x / torch.where(y > 0, y, 1.0), torch.inf)
    low, high = torch.maximum(low, high.clamp(max=0) - REACH), torch.minimum(high, low.clamp(min=0) + REACH)
    above, below = z.clamp(min=0).log(), (-z).clamp(min=0).log()
    margin = (0.5 * (high - low)).clamp(max=1)
    r = torch.zeros_like(x).clamp(min=low + margin, max=high - margin)
    start, end, settled = low, high, torch.zeros_like(r, dtype=torch.bool)
    step = last = high - low
    for _ in range(MAX_STEPS):
        q = r * r - r + 1
        sigma, tau = (((r - 1) * x + y) / q).clamp(min=TINY), ((x - r * y) / q).clamp(min=TINY)
        a, b = sigma.log() + r, tau.log() - r
        left, right = torch.logaddexp(a, below), torch.logaddexp(b, above)
        value = left - right
        bent = (2 * r - 1) / q
        slope = torch.exp(a - left) * (x / (q * sigma) - bent + 1) + torch.exp(b - right) * (y / (q * tau) + bent + 1)
        low, high = torch.where(value <= 0, r, low), torch.where(value >= 0, r, high)
        newton = -value / slope
        room = torch.where(newton < 0, start - r, end - r)  # near the ends the function behaves like log(room)
        newton = r - room * torch.expm1(-newton / room)
        good = (newton >= low) & (newton <= high) & (2 * value.abs() <= (last * slope).abs())
        new = torch.where(settled, r, torch.where(good, newton, 0.5 * (low + high)))
        step, last = (new - r).abs(), step
        r = new
        near_end = torch.minimum(r - start, end - r)
        settled = settled | (step <= torch.minimum(4e-16 * r.abs().clamp(min=1), 1e-3 * near_end))
        if settled.all():
            break
    q = r * r - r + 1
    sigma, tau = (((r - 1) * x + y) / q).clamp(min=0), ((x - r * y) / q).clamp(min=0)
    shrink = torch.exp(-r.abs())
    top = torch.where(r >= 0, (z + tau * shrink).clamp(min=0), sigma * shrink)
    bottom = torch.where(r >= 0, tau * shrink, (sigma * shrink - z).clamp(min=0))
    return _Root(r, torch.where(r >= 0, top * shrink, sigma), torch.where(r >= 0, tau, bottom * shrink), top, bottom)


class _Frame(NamedTuple):
    """The derivative of the projection as U D U', in an orthonormal frame.

    The columns of U are (1, -r, 0) / n, (r, 1, 0) / n and (0, 0, 1) with n = |(1, r)|. In this frame `turn` (..., 3) is
    the derivative of r, and `normal` (..., 3) that of the multiplier mu, after f' was divided by max(exp(r), 1).
    weight: (...), min(exp(r), 1).
    """

    n: Tensor
    U: Tensor
    D: Tensor
    normal: Tensor
    turn: Tensor
    weight: Tensor


def _frame(root: _Root) -> _Frame:
    r = root.r
    zero, one = torch.zeros_like(r), torch.ones_like(r)
    n = torch.hypot(r, one)
    weight = torch.exp(r.clamp(max=0))
    a, b, c = (r * r - r + 1) * weight / n, weight / n, -torch.exp((-r).clamp(max=0))  # f' in U
    size = root.sigma + root.tau * n * n
    soft = root.sigma / size  # I + mu f'' is diag(1 / soft, 1, 1) in U
    total = soft * a * a + b * b + c * c
    normal = torch.stack([soft * a, b, c], -1) / total[..., None]
    D = -total[..., None, None] * normal[..., :, None] * normal[..., None, :]
    diagonal = torch.stack([soft * (b * b + c * c), soft * a * a + c * c, soft * a * a + b * b], -1)
    D.diagonal(dim1=-2, dim2=-1).copy_(diagonal / total[..., None])
    turn = torch.stack([b * b + c * c, -a * b, -a * c], -1) * (n / (size * total))[..., None]
    U = torch.stack([one / n, r / n, zero, -r / n, one / n, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    return _Frame(n, U, D, normal, turn, weight)


def _times(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x[..., None])[..., 0]
