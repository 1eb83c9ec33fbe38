"""Smoothed bilinear programs: max c'x + x'Qy + d'y - h(x) - h(y) over two capped simplices, h strongly convex.

Given y, the best x is a closed form up to one number, the multiplier of its sum: x = block(c + Qy); likewise y. A
solution is a fixed point of the two, found by maximizing over the blocks in turn and polished by Newton's method.
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

SWEEPS = (3, 12)  # over the blocks: from all starts, then from those kept
KEPT = 2
MAX_NEWTON = 40
BETWEEN = 8  # sweeps in the place of a Newton step that does not help
MAX_FULL = 8  # up to this total `Quadratic.rough` is the faster projection
TOLERANCE = 1e-10  # of the residual; Newton goes on to a tenth of it


class Smoothing(Protocol):
    """A strongly convex h, summed over coordinates."""

    def penalty(self, x: Tensor) -> Tensor:
        """Return h of every row of x (B, n), (B,)."""
        ...

    def block(self, s: Tensor, total: int, near: Tensor | None = None) -> Tensor:
        """Return argmax s'x - h(x) over 0 <= x <= 1, sum x = total, for every row of s (B, n); differentiable.

        near: (B, n), a guess of it, which may save work.
        """
        ...

    def rough(self, s: Tensor, total: int) -> Tensor:
        """Return `block` to at least five digits and without derivatives, fast: what the sweeps before Newton need."""
        ...

    def slopes(self, x: Tensor) -> Tensor:
        """Return w (B, n) for which the derivative of `block` at its value x is diag(w) - ww' / sum w."""
        ...


class Quadratic:
    """h(x) = weight/2 |x|^2, whose `block` is the projection of s / weight."""

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
        """Return the projection by one sort per row: the largest entries are full until the rest is below 1."""
        x = s / self.weight
        return capped_simplex(x, total) if total > MAX_FULL else _by_sorting(x, total)

    def slopes(self, x: Tensor) -> Tensor:
        """Return 1 / weight where x is between its bounds, 0 at them."""
        return ((x > 0) & (x < 1)).to(x) / self.weight


@replayed
def _by_sorting(x: Tensor, total: int) -> Tensor:
    ordered = x.sort(dim=1, descending=True).values
    x, ordered = x - ordered[:, :1], ordered - ordered[:, :1]  # as small as they can be
    theta = ordered.new_empty(len(x), 1)
    for full in range(total):
        free = ordered[:, full:]
        mean = (free.cumsum(1) - (total - full)) / torch.arange(1, free.shape[1] + 1, device=x.device)
        last = (free > mean).sum(1, keepdim=True) - 1
        found = mean.gather(1, last.clamp(min=0))
        theta = torch.where(ordered[:, full - 1 : full] - theta > 1, found, theta) if full else found
    return (x - theta).clamp(0, 1)


class Entropy:
    """h(x) = weight (x log x + (1 - x) log(1 - x)), whose `block` is the logistic function of (s - theta) / weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def penalty(self, x: Tensor) -> Tensor:
        """Return the negative entropy times the weight, (B,)."""
        return self.weight * (torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1)

    def block(self, s: Tensor, total: int, near: Tensor | None = None) -> Tensor:
        """Return the logistic function at (s - theta) / weight, theta such that the sum is total (below n).

        Its first derivative is exact; theta is found without gradients and corrected to first order.
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
        """Return `block` with a sum that is right to 1e-5."""
        return ((s - self._threshold(s, total, 1e-5)) / self.weight).sigmoid()

    def slopes(self, x: Tensor) -> Tensor:
        """Return x (1 - x) / weight."""
        return x * (1 - x) / self.weight

    def _threshold(self, s: Tensor, total: int, tol: float = 0.0) -> Tensor:
        """Return theta (B, 1) by Newton's method, bisecting where that leaves the bracket of the root.

        tol: error of the sum at which to stop before the root is found to rounding.
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
    """One step of projected gradient ascent on a smoothed program, its adjoint in closed form.

    ``GradientStep(Q, totals, smoothing, stepsize)(z, c, d)`` on z = (x, y), (B, 2n), with the quadratic smoothing. I -
    Phi = I - P (I - alpha H) with P the derivative of the projection and H the Hessian of minus the objective; on the
    range of P it is alpha P H P, and `coupled` inverts that.
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
    """Both blocks maximized at once: (x, y) -> (block(c + Qy), block(d + Q'x)), on z = (x, y) of shape (B, 2n).

    Its fixed points are the stationary points of the smoothed program, whatever h; with the quadratic one it is a step
    of projected gradient with stepsize 1 / weight.
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
    """Return the nearest feasible point to z = (x, y), (B, 2n); near: a guess of it, see `capped_simplex`."""
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
    """Return u = J (g + (Q u_y, Q'u_x)), (B, 2n), J the derivative of both blocks, of slopes w (B, 2n).

    u moves the solution as g moves (c, d). One system is solved per sample, of the size of what is free to move in a
    block: u is zero where w is. NaN in the samples where it is singular.
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
    """What `maximize` found, float64.

    x, y: (B, n). value: (B,), penalties included. residual: (B,), how far one sweep over the blocks moves x.
    iterations: (B,) int, Newton steps. ok: (B,) bool, residual small. start: (B,) int, the start it was reached from.
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
    """Maximize a smoothed bilinear program from several starts, batched; the best local optimum is returned.

    Q: (n, n). c, d: (B, n). totals: what x and y sum to. starts: (B, K, n), points x to start from.
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
    """Return the best x for the best y for x, the best y for that one, and how far x moved, (B,).

    near: a guess of the first y.
    """
    y = smoothing.block(d + x @ Q, totals[1], near)
    new = smoothing.block(c + y @ Q.mT, totals[0], x)
    return new, smoothing.block(d + new @ Q, totals[1], y), (new - x).abs().amax(1)


def _newton(
    Q: Tensor, x: Tensor, c: Tensor, d: Tensor, totals: tuple[int, int], smoothing: Smoothing
) -> tuple[Tensor, Tensor, Tensor]:
    """Polish x to a fixed point of `_sweep` by Newton's method; sweeps take over where that brings it no closer.

    Returns x, the best y for it, and how many steps that took, (B,).
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
        # r + J Q J (Q'r + ...): what the sweep leaves of an error, summed up
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
    """Return diag(w) - ww' / sum w for every row of w, (B, k), as (B, k, k)."""
    total = w.sum(1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    J = w[:, :, None] * (w / -total)[:, None, :]
    J.diagonal(dim1=1, dim2=2).add_(w)
    return J


def _value(Q: Tensor, x: Tensor, y: Tensor, c: Tensor, d: Tensor, smoothing: Smoothing) -> Tensor:
    z = torch.cat([x, y], 1)
    return objective(Q, z, c, d) - smoothing.penalty(z)
