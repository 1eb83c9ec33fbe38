"""The filter line search of `foldopt.solvers.nlp` (Wächter and Biegler, 2006, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.solvers._nlp_model import violation
from foldopt.solvers.interior_point import largest
from foldopt.updates.programs import SmoothProgram, SQPData

__all__ = ["HALVINGS", "Filter", "filter_search", "violation_search"]

HALVINGS = 30  # largest number of times that a step is halved
MARGIN = 1e-5  # margin by which a pair must improve on the pairs of the filter, relative to the violation
ARMIJO = 1e-4  # fraction of the predicted decrease that a step must achieve
ROUNDING = 1e-13  # relative rounding error of the objective


class Filter:
    """Pairs (violation, objective) of every sample; a new iterate must improve on each pair in one of the two.

    `limit`, (B,), is the largest violation accepted.
    """

    def __init__(self, limit: Tensor) -> None:
        self.limit = limit
        self.entries: list[tuple[Tensor, Tensor]] = []

    def accepts(self, theta: Tensor, f: Tensor) -> Tensor:
        """Return which samples' pairs (theta, f) are acceptable, (B,) bool; pairs with NaN are not."""
        good = (theta <= self.limit) & f.isfinite()
        for at, cost in self.entries:
            good &= (theta <= (1 - MARGIN) * at) | (f <= cost - MARGIN * at)
        return good

    def add(self, which: Tensor, theta: Tensor, f: Tensor) -> None:
        """Add the pairs of the samples in `which`, (B,) bool."""
        if which.any():
            self.entries.append((torch.where(which, theta, torch.inf), torch.where(which, f, torch.inf)))

    def reset(self, which: Tensor, limit: Tensor) -> None:
        """Remove the pairs of the samples in `which`, whose largest accepted violation becomes `limit`, (B,)."""
        self.limit = torch.where(which, limit, self.limit)
        self.entries = [
            (torch.where(which, torch.inf, theta), torch.where(which, torch.inf, f)) for theta, f in self.entries
        ]


def filter_search(
    program: SmoothProgram,
    x: Tensor,
    params: tuple[Tensor, ...],
    d: Tensor,
    data: SQPData,
    active: Tensor,
    filtered: Filter,
    searching: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search along d for a step that the filter accepts.

    The candidates are d, d with a second-order correction toward the active constraints, d/2, d/4 and so on. The first
    that the filter accepts and that makes enough progress is taken. If the predicted decrease of the objective is large
    beside the violation, the objective must decrease (Armijo's condition); otherwise the violation or the objective
    must.

    Args:
        program: the program.
        x: the iterates, (B, n).
        params: parameters of the program.
        d: the full steps, (B, n).
        data: the quadratic model at x.
        active: inequalities that are active in the model, (B, m) bool.
        filtered: the filter.
        searching: which samples take part, (B,) bool.

    Returns:
        The accepted step (B, n); its length alpha (B,), 0 if no step was accepted; whether it was taken by Armijo's
        condition, (B,) bool.
    """
    f, h, g = program.values(x, *params)
    theta, slope = violation(h, g), (data.gradient * d).sum(1)
    slack = ROUNDING * (1 + f.abs())
    step, alpha = torch.zeros_like(d), torch.zeros_like(f)
    lowering = torch.zeros_like(searching)
    left = searching.clone()

    def tried(trial: Tensor, a: Tensor) -> None:
        nonlocal step, alpha, left, lowering
        f_t, h_t, g_t = program.values(x + trial, *params)
        theta_t = violation(h_t, g_t)
        for_cost = (slope < 0) & (a * (-slope).clamp(min=0) ** 2.3 > theta**1.1)
        enough = torch.where(
            for_cost,
            f_t <= f + ARMIJO * a * slope + slack,
            (theta_t <= (1 - MARGIN) * theta) | (f_t <= f - MARGIN * theta),
        )
        tiny = (theta_t <= 1e-12 * (1 + largest(x))) & ((f_t - f).abs() <= slack)
        good = left & ((filtered.accepts(theta_t, f_t) & enough) | tiny)
        step = torch.where(good[:, None], trial, step)
        alpha = torch.where(good, a, alpha)
        lowering = torch.where(good, for_cost, lowering)
        left = left & ~good

    a = torch.ones_like(f)
    tried(d, a)
    if left.any():
        correction = _corrected(program, x, params, d, data, active)
        tried(d + correction, a)
    for _ in range(HALVINGS):
        if not left.any():
            break
        a = a / 2
        tried(a[:, None] * d, a)
    return step, alpha, lowering


def _corrected(
    program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...], d: Tensor, data: SQPData, active: Tensor
) -> Tensor:
    """Return the shortest step from x + d onto the active constraints, linearized at x.

    It is 0 if it is longer than d or not finite.
    """
    _, h, g = program.values(x + d, *params)
    rows = torch.cat([data.jacobian_h, data.jacobian_g * active[:, :, None]], 1)
    target = torch.cat([h, torch.where(active, g, 0)], 1)
    sound = (target.isfinite().all(1) & rows.flatten(1).isfinite().all(1))[:, None]
    if not rows.shape[1]:
        return torch.zeros_like(d)
    pinv = torch.linalg.pinv(torch.where(sound[:, :, None], rows, 0), rtol=1e-10)
    step = -matvec(pinv, torch.where(sound, target, 0))
    length, of_d = (torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (step, d))
    return torch.where(sound & (length <= of_d), step, 0)


def violation_search(
    program: SmoothProgram, x: Tensor, params: tuple[Tensor, ...], d: Tensor, gain: Tensor, searching: Tensor
) -> Tensor:
    """Return the first of 1, 1/2, 1/4, ... that lowers the violation by a fraction of the predicted `gain`, or 0."""
    _, h, g = program.values(x, *params)
    theta = violation(h, g)
    alpha, a, left = torch.zeros_like(theta), torch.ones_like(theta), searching.clone()
    for _ in range(HALVINGS):
        if not left.any():
            break
        _, h, g = program.values(x + a[:, None] * d, *params)
        good = left & (violation(h, g) <= theta - ARMIJO * a * gain)
        alpha = torch.where(good, a, alpha)
        left = left & ~good
        a = a / 2
    return alpha
