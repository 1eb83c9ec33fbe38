"""Smoothed bilinear programs: max c'x + x'Qy + d'y - h(x) - h(y) over two capped simplices, h strongly convex.

Given y, the best x is x = block(c + Qy), a closed form in which only the multiplier of sum x = p is unknown; likewise
for y given x. Solutions are fixed points of both maps. They are found by maximizing over the blocks alternately, and
polished by Newton's method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from experiments.numerics.blocks import Chosen
from experiments.numerics.graphs import replayed
from foldopt.batched import lu_factor
from foldopt.projections import capped_simplex

SWEEPS = (3, 12)  # sweeps over the blocks: from all starts, then from the best ones
KEPT = 2  # number of these
MAX_NEWTON = 40
BETWEEN = 8  # sweeps that replace a Newton step which does not reduce the residual
MAX_FULL = 8  # largest total for which `Quadratic.rough` is faster than the exact projection
TOLERANCE = 1e-10  # of the residual; Newton's method stops at a tenth of it


class Smoothing(Protocol):
    """A strongly convex h, summed over coordinates."""

    def penalty(self, x: Tensor) -> Tensor:
        """Return h of each row of x (B, n), (B,)."""
        ...

    def block(self, s: Tensor, total: int, near: Tensor | None = None) -> Tensor:
        """Return argmax s'x - h(x) over 0 <= x <= 1, sum x = total, for each row of s (B, n); differentiable.

        near: A guess of the result, (B, n), which may save work.
        """
        ...

    def rough(self, s: Tensor, total: int) -> Tensor:
        """Return `block` to at least five digits, without derivatives; the sweeps before Newton's method use it."""
        ...

    def slopes(self, x: Tensor) -> Tensor:
        """Return w (B, n) such that the Jacobian of `block` at its value x is diag(w) - ww' / sum w."""
        ...


class Quadratic:
    """h(x) = weight/2 |x|^2; its `block` is the projection of s / weight on the capped simplex."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def penalty(self, x: Tensor) -> Tensor:
        """Return weight/2 |x|^2, (B,)."""
        return self.weight / 2 * x.square().sum(1)

    def block(self, s: Tensor, total: int, near: Tensor | None = None) -> Tensor:
        """Return the projection of s / weight on the capped simplex."""
        return capped_simplex(s / self.weight, total, near=near)

    @torch.no_grad()
    def rough(self, s: Tensor, total: int) -> Tensor:
        """Return the projection by one sort per row: the largest entries are set to 1 until all others are below 1."""
        x = s / self.weight
        return capped_simplex(x, total) if total > MAX_FULL else _by_sorting(x, total)

    def slopes(self, x: Tensor) -> Tensor:
        """Return 1 / weight where x is between its bounds, 0 at them."""
        return ((x > 0) & (x < 1)).to(x) / self.weight


@replayed
def _by_sorting(x: Tensor, total: int) -> Tensor:
    ordered = x.sort(dim=1, descending=True).values
    x, ordered = x - ordered[:, :1], ordered - ordered[:, :1]  # shifted by the largest entry, to lose fewer digits
    theta = ordered.new_empty(len(x), 1)
    for full in range(total):
        free = ordered[:, full:]
        mean = (free.cumsum(1) - (total - full)) / torch.arange(1, free.shape[1] + 1, device=x.device)
        last = (free > mean).sum(1, keepdim=True) - 1
        found = mean.gather(1, last.clamp(min=0))
        theta = torch.where(ordered[:, full - 1 : full] - theta > 1, found, theta) if full else found
    return (x - theta).clamp(0, 1)


class Entropy:
    """h(x) = weight (x log x + (1 - x) log(1 - x)); its `block` is the logistic function of (s - theta) / weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def penalty(self, x: Tensor) -> Tensor:
        """Return the weight times the negative entropy, (B,)."""
        return self.weight * (torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1)

    def block(self, s: Tensor, total: int, near: Tensor | None = None) -> Tensor:
        """Return the logistic function of (s - theta) / weight, where theta makes the sum equal total (below n).

        theta is computed without gradients and then corrected to first order, so that the first derivative is exact.
        """
        with torch.no_grad():
            theta = self._threshold(s, total)
            x = ((s - theta) / self.weight).sigmoid()
            rate = self.slopes(x).sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        if torch.is_grad_enabled():
            theta = theta + (((s - theta) / self.weight).sigmoid().sum(1, keepdim=True) - total) / rate
        return ((s - theta) / self.weight).sigmoid()

    @torch.no_grad()
    def rough(self, s: Tensor, total: int) -> Tensor:
        """Return `block`, with an error of at most 1e-5 in its sum."""
        return ((s - self._threshold(s, total, 1e-5)) / self.weight).sigmoid()

    def slopes(self, x: Tensor) -> Tensor:
        """Return x (1 - x) / weight."""
        return x * (1 - x) / self.weight

    def _threshold(self, s: Tensor, total: int, tol: float = 0.0) -> Tensor:
        """Return theta (B, 1) by Newton's method, with bisection where a step leaves the bracket of the root.

        tol: Error of the sum at which to stop; 0 goes on to rounding.
        """
        ends = s.topk(total + 1, dim=1).values
        n, eps = s.shape[1], torch.finfo(s.dtype).eps
        spread = self.weight * torch.tensor(float(n * max(total, n - total))).log()
        low, high = ends[:, -1:] - spread, ends[:, :1] + spread
        theta = ends[:, -2:].mean(1, keepdim=True)
        for _ in range(60):
            x = ((s - theta) / self.weight).sigmoid()
            excess = x.sum(1, keepdim=True) - total
            low, high = torch.where(excess > 0, theta, low), torch.where(excess < 0, theta, high)
            new = theta + excess / self.slopes(x).sum(1, keepdim=True)
            new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
            moved, theta = (new - theta).abs(), torch.where(excess == 0, theta, new)
            close = max(tol, 32 * eps * n)
            if ((moved <= 8 * eps * (theta.abs() + self.weight)) | (excess.abs() <= close)).all():
                break
        return theta


class GradientStep(nn.Module):
    """One projected gradient ascent step on the quadratically smoothed program, with its adjoint in closed form.

    It is called as ``step(z, c, d)`` with z = (x, y), (B, 2n). I - Phi = I - P (I - alpha H), where P is the Jacobian
    of the projection and H the Hessian of the negative objective. On the range of P this is alpha P H P, which
    `coupled` inverts.
    """

    def __init__(self, Q: Tensor, totals: tuple[int, int], smoothing: Quadratic, stepsize: float) -> None:
        super().__init__()
        self.Q, self.totals, self.smoothing, self.stepsize = Q, totals, smoothing, stepsize

    def forward(self, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return the state after one step."""
        gradient = torch.cat([c, d], 1) + crossed(self.Q, z) - self.smoothing.weight * z
        return project(z + self.stepsize * gradient, self.totals, near=z)

    def inverse(self, g: Tensor, transposed: bool, stepped: Tensor, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return v = Phi^T v + g, or v = Phi v + g if `transposed`, (B, 2n)."""
        weights = self.smoothing.slopes(stepped)
        if transposed:
            g, rest = self._moved(g), g
            return rest + coupled(self.Q, weights, g) / self.stepsize
        u = coupled(self.Q, weights, g)
        return torch.add(g, self._moved(u), alpha=1 / self.stepsize)

    def _moved(self, u: Tensor) -> Tensor:
        """Return (I - alpha H) u."""
        return torch.add((1 - self.stepsize * self.smoothing.weight) * u, crossed(self.Q, u), alpha=self.stepsize)


class BlockStep(nn.Module):
    """Maximize over both blocks at once: (x, y) -> (block(c + Qy), block(d + Q'x)), on z = (x, y) of shape (B, 2n).

    The fixed points are the stationary points of the smoothed program, for any h. With the quadratic h it is a
    projected gradient step with stepsize 1 / weight.
    """

    def __init__(self, Q: Tensor, totals: tuple[int, int], smoothing: Smoothing) -> None:
        super().__init__()
        self.Q, self.totals, self.smoothing = Q, totals, smoothing

    def forward(self, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return the state after one step."""
        parts = (torch.cat([c, d], 1) + crossed(self.Q, z)).chunk(2, dim=1)
        near = z.detach().chunk(2, dim=1)
        return torch.cat([self.smoothing.block(s, k, x) for s, k, x in zip(parts, self.totals, near, strict=True)], 1)

    def inverse(self, g: Tensor, transposed: bool, stepped: Tensor, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return v = Phi^T v + g, or v = Phi v + g if `transposed`, (B, 2n)."""
        weights = self.smoothing.slopes(stepped)
        if transposed:
            return g + coupled(self.Q, weights, crossed(self.Q, g))
        return g + crossed(self.Q, coupled(self.Q, weights, g))


def project(z: Tensor, totals: tuple[int, int], near: Tensor | None = None) -> Tensor:
    """Return the feasible point nearest to z = (x, y), (B, 2n); near: a guess of it, see `capped_simplex`."""
    blocks = 2 * len(z), z.shape[1] // 2
    guess = None if near is None else near.reshape(blocks)
    return capped_simplex(z.reshape(blocks), z.new_tensor(totals).repeat(len(z)), near=guess).reshape(z.shape)


def crossed(Q: Tensor, z: Tensor) -> Tensor:
    """Return (Qy, Q'x) for z = (x, y), (B, 2n)."""
    x, y = z.chunk(2, dim=1)
    Q = Q.to(z)
    return torch.cat([y @ Q.mT, x @ Q], 1)


def objective(Q: Tensor, z: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return c'x + x'Qy + d'y for z = (x, y), (B,)."""
    x, y = z.chunk(2, dim=1)
    return ((c + y @ Q.to(y).mT) * x).sum(1) + (d * y).sum(1)


def coupled(Q: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """Solve u = J (g + (Q u_y, Q'u_x)) for u, (B, 2n), where J is the Jacobian of both blocks with slopes w (B, 2n).

    u is the change of the solution when (c, d) changes by g, (B, 2n). u is zero where w is, so that the linear system
    of a sample is as large as the number of free coordinates of a block. Samples whose system is singular get NaN.
    """
    n = len(Q)
    x, y = (Chosen(part != 0) for part in w.chunk(2, 1))
    hx, hy = (on.take(part)[:, :, None] for on, part in ((x, g[:, :n]), (y, g[:, n:])))
    Jx, Jy = (_derivative(on.take(part)) for on, part in ((x, w[:, :n]), (y, w[:, n:])))
    place = (x.index * n)[:, :, None] + y.index[:, None, :]
    A = Q.to(g).reshape(-1).index_select(0, place.view(-1)).view(place.shape)
    JxAJy = Jx @ A @ Jy
    eye = torch.eye(A.shape[1], dtype=g.dtype, device=g.device)
    lu, pivots, info = lu_factor(torch.baddbmm(eye, JxAJy, A.mT, alpha=-1))
    ux = torch.linalg.lu_solve(lu, pivots, torch.baddbmm(Jx @ hx, JxAJy, hy))
    ux = torch.where((info == 0)[:, None, None], ux, torch.nan)
    uy = Jy @ torch.baddbmm(hy, A.mT, ux)
    return torch.cat([x.put(ux[:, :, 0]), y.put(uy[:, :, 0])], 1)


class SmoothedSolution(NamedTuple):
    """Solutions of a batch of smoothed programs, in float64.

    Attributes:
        x: (B, n).
        y: (B, n).
        value: Objective including the penalties, (B,).
        residual: How far one sweep over the blocks moves x, (B,).
        iterations: Number of Newton steps, (B,) int.
        ok: Whether the residual is below the tolerance, (B,) bool.
        start: Index of the start that led to the solution, (B,) int.
    """

    x: Tensor
    y: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor
    ok: Tensor
    start: Tensor


def maximize(
    Q: Tensor, c: Tensor, d: Tensor, totals: tuple[int, int], smoothing: Smoothing, starts: Tensor
) -> SmoothedSolution:
    """Maximize smoothed bilinear programs from several starts, and return the best local optimum of each.

    Args:
        Q: (n, n).
        c: (B, n).
        d: (B, n).
        totals: The sums of x and y.
        smoothing: The penalty h.
        starts: Points x to start from, (B, K, n).
    """
    B, K, n = starts.shape

    def climb(x: Tensor, c: Tensor, d: Tensor, sweeps: int) -> Tensor:
        return _climb(Q, x, c, d, totals, smoothing.rough, sweeps)

    def repeated(t: Tensor, times: int) -> Tensor:
        return t.repeat_interleave(times, dim=0)

    few, kept = min(KEPT, K), torch.arange(K, device=Q.device).expand(B, K)
    cs, ds = repeated(c, K), repeated(d, K)
    x = climb(starts.reshape(B * K, n), cs, ds, SWEEPS[0])
    if few < K:
        reached = _value(Q, x, smoothing.block(ds + x @ Q, totals[1]), cs, ds, smoothing).view(B, K)
        kept = reached.topk(few, dim=1).indices
        x = x.view(B, K, n).gather(1, kept[:, :, None].expand(B, few, n)).reshape(B * few, n)
        cs, ds = repeated(c, few), repeated(d, few)
    x, y, iterations = _newton(Q, climb(x, cs, ds, SWEEPS[1]), cs, ds, totals, smoothing)
    x, y, residual = _sweep(Q, x, y, cs, ds, totals, smoothing)
    value = _value(Q, x, y, cs, ds, smoothing)
    best = value.view(B, few).argmax(1)
    row = torch.arange(B, device=Q.device) * few + best
    residual = residual[row]
    found = (x[row], y[row], value[row], residual, iterations[row], residual <= TOLERANCE)
    return SmoothedSolution(*found, kept.gather(1, best[:, None])[:, 0])


def _climb(
    Q: Tensor,
    x: Tensor,
    c: Tensor,
    d: Tensor,
    totals: tuple[int, int],
    block: Callable[[Tensor, int], Tensor],
    sweeps: int,
) -> Tensor:
    for _ in range(sweeps):
        x = block(c + block(d + x @ Q, totals[1]) @ Q.mT, totals[0])
    return x


def _sweep(
    Q: Tensor, x: Tensor, near: Tensor, c: Tensor, d: Tensor, totals: tuple[int, int], smoothing: Smoothing
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximize over y given x, then over x given y, then over y again.

    Returns the new x and y, and how far x has moved, (B,). near: A guess of the first y.
    """
    y = smoothing.block(d + x @ Q, totals[1], near)
    new = smoothing.block(c + y @ Q.mT, totals[0], x)
    return new, smoothing.block(d + new @ Q, totals[1], y), (new - x).abs().amax(1)


def _newton(
    Q: Tensor, x: Tensor, c: Tensor, d: Tensor, totals: tuple[int, int], smoothing: Smoothing
) -> tuple[Tensor, Tensor, Tensor]:
    """Polish x to a fixed point of `_sweep` by Newton's method, with sweeps where a Newton step does not help.

    Returns x, the best y for it, and the number of steps, (B,).
    """
    iterations = torch.zeros(len(x), dtype=torch.long, device=x.device)
    y = smoothing.block(d + x @ Q, totals[1], smoothing.rough(d + x @ Q, totals[1]))
    moved = smoothing.block(c + y @ Q.mT, totals[0], x)
    for _ in range(MAX_NEWTON):
        size = (moved - x).abs().amax(1)
        todo = (size > TOLERANCE / 10).nonzero()[:, 0]
        if not len(todo):
            break
        now, C, D, Y, step = (t[todo] for t in (x, c, d, y, moved))
        r = step - now
        # Newton's method: x + (I - T)^-1 r = step + T (I - T)^-1 r, where T is the Jacobian of a sweep at x.
        weights = torch.cat([smoothing.slopes(step), smoothing.slopes(Y)], 1)
        more = coupled(Q, weights, torch.cat([torch.zeros_like(r), r @ Q], 1))[:, : x.shape[1]]
        trial = step + torch.where(more.isfinite().all(1, keepdim=True), more, 0)
        Y = smoothing.block(D + trial @ Q, totals[1], Y)
        ahead = smoothing.block(C + Y @ Q.mT, totals[0], step)
        worse = (ahead - trial).abs().amax(1) >= size[todo] / 2
        if worse.any():
            part = C[worse], D[worse]
            trial[worse] = _climb(Q, step[worse], *part, totals, smoothing.block, BETWEEN)
            Y[worse] = smoothing.block(part[1] + trial[worse] @ Q, totals[1])
            ahead[worse] = smoothing.block(part[0] + Y[worse] @ Q.mT, totals[0])
        for whole, new in ((x, trial), (y, Y), (moved, ahead)):
            whole[todo] = new
        iterations[todo] += 1
    return x, y, iterations


def _derivative(w: Tensor) -> Tensor:
    """Return diag(w) - ww' / sum w for each row of w, (B, k), as (B, k, k)."""
    total = w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    J = w[:, :, None] * (w / -total)[:, None, :]
    J.diagonal(dim1=1, dim2=2).add_(w)
    return J


def _value(Q: Tensor, x: Tensor, y: Tensor, c: Tensor, d: Tensor, smoothing: Smoothing) -> Tensor:
    z = torch.cat([x, y], 1)
    return objective(Q, z, c, d) - smoothing.penalty(z)
