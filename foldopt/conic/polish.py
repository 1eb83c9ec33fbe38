"""From a solver's answer to rounding: Newton steps on the optimality conditions, taken where they help."""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.conic.form import Data, Form, Units
from foldopt.conic.point import Measure, Point, conditions

STEPS = 8
EXACT = 1e-14  # relative residual that no step is expected to improve


def polish(form: Form, data: Data, units: Units, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Point]:
    """Return x and y after Newton steps, and what is known of that point; samples that are not finite stay as they are.

    A step is kept in the samples where it makes the residual smaller, and halved once where it does not.
    """
    point = Point(form, data, x, y, units)
    todo = point.residual.isfinite() & (point.residual > EXACT)
    scaled = units.scaled(form, data)
    for _ in range(STEPS):
        if not todo.any():
            break
        dx, dy = point.system.solve(conditions(form, data, units, x, y).nan_to_num(), False).split([form.n, form.m], 1)
        better = torch.zeros_like(todo)
        best = point.residual.clone()
        for length in (1.0, 0.5):
            near_x, near_y = x - length * units.d * dx, y - length * units.e / units.c * dy
            residual = Measure.of(form, scaled, near_x / units.d, near_y * units.c / units.e).residual
            good = todo & ~better & (residual < best)
            x, y = torch.where(good[:, None], near_x, x), torch.where(good[:, None], near_y, y)
            better |= good
        if not better.any():
            break
        before = point.residual
        point = Point(form, data, x, y, units)
        todo = better & (point.residual > EXACT) & (point.residual < 0.5 * before)
    return x, y, point
