"""Polishes a solver's answer to rounding: Newton steps on the KKT conditions of a guessed active set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.qp._front import nearby
from foldopt.qp._kkt import Factored, Known, Rows, polishing_system
from foldopt.qp._operations import masked_rows
from foldopt.qp._program import Program, residual

EXACT = 1e-13  # relative KKT residual at which the polish ends
STEPS = 5  # Newton steps for each first guess of the active set
ROUNDS = 3  # corrections by quadratic programs


class Point:
    """The best point found so far in every sample: x (B, n), y (B, r), relative KKT residual (B,).

    known: the factored sparse system that led to each point, or None.
    """

    def __init__(self, program: Program, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.residual = x.clone(), y.clone(), residual(program, x, y)
        self.known: list[Known | None] = [None] * len(x)

    def offer(
        self, index: Tensor, program: Program, x: Tensor, y: Tensor, known: Sequence[Known | None] | None = None
    ) -> Tensor:
        """Replace the points of the samples `index` where the new ones are better; return the new residuals."""
        now = residual(program, x, y)
        better = now < self.residual[index]
        rows = index[better]
        self.x[rows], self.y[rows], self.residual[rows] = x[better], y[better], now[better]
        if known is not None:
            for j in better.nonzero()[:, 0].tolist():
                self.known[int(index[j])] = known[j]
        return now


def polish(program: Program, x: Tensor, y: Tensor, good: float = EXACT) -> Point:
    """Return the best points that Newton steps from (x, y) reach; they are never worse than (x, y).

    The program has to be equilibrated. The method is semismooth Newton: with w = Cx + y, the rows with w outside [l, u]
    are active, and the others have no multiplier. If this first guess of the active set does not lead to a relative
    KKT residual of `good`, guesses by slacks and by multipliers follow. Each correction is the smallest one, so that
    multipliers that are not unique keep their signs.
    """
    best = Point(program, x, y)
    for guess in _guesses(program, x, y):
        left = ((best.residual > good) & best.residual.isfinite()).nonzero()[:, 0]
        if not len(left):
            break
        _newton(best, left, program.at(left), x[left], y[left], guess(left), good)
    return best


Guess = Callable[[Tensor], tuple[Tensor, Tensor]]


def _guesses(program: Program, x: Tensor, y: Tensor) -> Iterator[Guess]:
    """Yield the guesses (rows active at u, rows active at l) in the order in which they are tried."""
    z = matvec(program.C, x)
    size = matvec(program.C.abs(), x.abs()) + 1e-3 * x.abs().amax(1, keepdim=True)

    def by_sign(i: Tensor) -> tuple[Tensor, Tensor]:
        w = z[i] + y[i]
        return w > program.upper[i], w < program.lower[i]

    def by_slack(share: float) -> Guess:
        def guess(i: Tensor) -> tuple[Tensor, Tensor]:
            upper = (program.upper[i] - z[i] < share * size[i]) & (y[i] >= -share)
            return upper, (z[i] - program.lower[i] < share * size[i]) & (y[i] <= share)

        return guess

    def by_multiplier(share: float) -> Guess:
        def guess(i: Tensor) -> tuple[Tensor, Tensor]:
            return (y[i] > share) & program.upper[i].isfinite(), (y[i] < -share) & program.lower[i].isfinite()

        return guess

    yield by_sign
    yield from (by_slack(1e-7), by_slack(1e-5), by_multiplier(1e-6), by_multiplier(1e-4))


def _newton(
    best: Point, index: Tensor, p: Program, x: Tensor, y: Tensor, guess: tuple[Tensor, Tensor], good: float
) -> None:
    upper, lower = guess
    n, before = x.shape[1], None
    last = x.new_full((len(x),), torch.inf)
    for step in range(STEPS):
        equality = p.equality
        upper, lower = upper & ~equality, lower & ~equality & ~upper
        active = upper | lower | equality
        if before is None or not torch.equal(active, before):
            rows = Rows.of(active)
            kkt = polishing_system(p.H, p.C, rows)
        before = active
        y = torch.where(active, y, 0)
        bound = torch.where(lower, p.lower, p.upper)
        stationarity = matvec(p.H, x) + p.q + matvec(p.C.mT, y)
        gap = rows.take(torch.where(active, matvec(p.C, x) - bound, 0))
        change = kkt.solve(-torch.cat([stationarity, gap], 1))
        x, y = x + change[:, :n], y + rows.put(change[:, n:], y.shape[1])
        known = [kkt.known(i) for i in range(len(x))] if isinstance(kkt, Factored) else None
        now = best.offer(index, p, x, y, known)
        going = (now > good) & x.isfinite().all(1)
        if step:
            going &= (now <= 10 * best.residual[index]) | (now <= 0.1 * last)
        if not going.any():
            return
        last = now
        if not going.all():
            index, p, x, y, last = index[going], p.at(going), x[going], y[going], last[going]
            before = None
        w = matvec(p.C, x) + y
        upper, lower = w > p.upper, w < p.lower


def refine(best: Point, program: Program, good: float = EXACT) -> None:
    """Improve the points `best` in place where `polish` did not reach `good`.

    Each round solves quadratic programs for a scaled correction. Rows that clearly have a multiplier become equalities,
    rows with a clear slack are dropped, and the others stay. The interior point solves for the small correction with
    its usual relative accuracy, which is a high accuracy relative to x.

    Source: Gleixner, Steffy and Wolter, Iterative refinement for linear programming (2016).
    """
    share = torch.full_like(best.residual, 1e-4)
    for _ in range(ROUNDS):
        left = ((best.residual > good) & best.residual.isfinite()).nonzero()[:, 0]
        if not len(left):
            return
        p, x, y, tau = program.at(left), best.x[left], best.y[left], share[left][:, None]
        z = matvec(p.C, x)
        above, below = p.upper - z, z - p.lower
        carries = p.equality | ((y.abs() > tau) & (torch.where(y > 0, above, below) < tau))
        open_ = ~carries & (torch.minimum(above, below) < tau)
        bound = torch.where(y > 0, p.upper, p.lower)
        kept = torch.where(carries, y, 0)
        gradient = matvec(p.H, x) + p.q + matvec(p.C.mT, kept)
        missing = torch.where(carries, bound - z, 0)
        crossed = torch.where(open_, (-torch.minimum(above, below)).clamp(min=0), 0)
        size = torch.cat([gradient, missing, crossed], 1).abs().amax(1, keepdim=True).clamp(min=1e-14)
        zero = torch.zeros_like(z)
        low = torch.where(carries, missing / size, torch.where(open_, -below / size, zero - torch.inf))
        high = torch.where(carries, missing / size, torch.where(open_, above / size, zero + torch.inf))
        low, high = torch.where(low < -1e6, -torch.inf, low), torch.where(high > 1e6, torch.inf, high)
        C = masked_rows(p.C, carries | open_)
        before = best.residual[left].clone()
        for group in patterns(low == high):
            dx, dy = nearby(Program(p.H, gradient / size, C, low, high).at(group), tol=1e-12)
            moved_x = x[group] + size[group] * dx
            moved_y = kept[group] + size[group] * dy
            after = polish(p.at(group), moved_x, moved_y, good)
            best.offer(left[group], p.at(group), after.x, after.y, after.known)
        share[left] = torch.where(best.residual[left] < before, share[left], 0.1 * share[left])


def patterns(mask: Tensor) -> list[Tensor]:
    """Group the samples by their row in a mask (B, r); return the indices of each group."""
    if not len(mask) or torch.equal(mask, mask[:1].expand_as(mask)):
        return [torch.arange(len(mask), device=mask.device)]
    _, group = torch.unique(mask, dim=0, return_inverse=True)
    return [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]
