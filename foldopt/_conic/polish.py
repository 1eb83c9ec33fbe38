"""Polishes a solver's answer to rounding by Newton steps on the optimality conditions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foldopt._conic.form import Program
from foldopt._conic.point import Measure
from foldopt._conic.systems import Jacobian, System

STEPS = 8
EXACT = 1e-13  # relative residual at which the polish ends
CLOSE = 1e-3  # a Jacobian is used again if its step reduced the residual by this factor


def polish(program: Program, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Measure, System | None]:
    """Return x and y after Newton steps, their measure, and the last linear system, in the program's units.

    A step is kept in the samples where it reduces the residual. Samples that are not finite are left unchanged.
    """
    form = program.form
    measure = Measure.of(program, x, y)
    todo = measure.residual.isfinite() & (measure.residual > EXACT)
    system: System | None = None
    last: System | None = None
    for _ in range(STEPS):
        if not todo.any():
            break
        if system is None:
            D = form.cone.derivative(measure.v.nan_to_num())
            system = last = System(Jacobian(form, program.data, program.matrices, D))
        r, before, better = measure.r.nan_to_num(), measure.residual, torch.zeros_like(todo)
        for step in (system.regular, system.solve, halved(system.solve)):
            dx, dy = step(r, False).split([form.n, form.m], 1)
            near = Measure.of(program, x - dx, y - dy)
            good = todo & ~better & (near.residual < before)
            x, y = torch.where(good[:, None], x - dx, x), torch.where(good[:, None], y - dy, y)
            parts = zip(near, measure, strict=True)
            measure = Measure(*(torch.where(good.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in parts))
            better |= good
            if not (todo & ~better).any():
                break
        todo = better & (measure.residual > EXACT) & (measure.residual < 0.5 * before)
        if (todo & (measure.residual > CLOSE * before)).any():
            system = None
    return x, y, measure, last


def halved(solve: Callable[[Tensor, bool], Tensor]) -> Callable[[Tensor, bool], Tensor]:
    """Return the function that computes half of a step."""
    return lambda r, transposed: 0.5 * solve(r, transposed)
