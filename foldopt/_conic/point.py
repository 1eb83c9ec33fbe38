"""Solutions of conic programs with the derivative of the projection there, from which verdicts are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt._conic.form import Data, Form, Program, Units, products
from foldopt._conic.systems import Jacobian, System
from foldopt.cones import BlockDiagonal
from foldopt.qp._kkt import probe

UNSOLVED = 1e-3  # a point with a larger relative residual is not judged
TOUCHING = 1e-9  # a point is at a kink if its relative distance from it is at most this
CARRYING = 1e-7  # an active row has a multiplier if its share of the stationarity condition's terms exceeds this
ROUNDING = 1e-12  # a relative residual of this size is attributed to rounding
FLOOR = 1e-6  # smallest size of the terms, relative to the data, by which residuals are divided
TAKES_PART = 1e-6  # entries of a null vector below this times the largest count as zero


def conditions(form: Form, data: Data, units: Units, x: Tensor, y: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return the optimality conditions [Px + q + A'y; s - Pi(s - y)] with s = b - Ax, (B, n + m).

    data, x and y are in the user's units, the result in the units of the equilibrated program. It can be differentiated
    as often as the projection Pi. offset: (B, m), evaluate the derivatives of Pi at this distance, on one side of a
    kink; None: at the point itself.
    """
    Px, Ax, pulled = products(form, data.P, data.A, x, y)
    s = units.e * (data.b - Ax)
    v = s - units.c / units.e * y
    projected = form.cone.project(v)
    if offset is not None:
        beside = form.cone.project(v + offset)
        projected = projected.detach() + (beside - beside.detach())
    return torch.cat([units.c * units.d * (Px + data.q + pulled), s - projected], 1)


class Measure(NamedTuple):
    """How well the optimality conditions of equilibrated programs hold at a point (x, y), in their units.

    r: (B, n + m), the conditions as in `conditions`. v: (B, m), s - y. s: (B, m), b - Ax. residual: (B,), the largest
    violation relative to the largest terms; infinite in samples that are not finite. reach: (B, m), the sizes by which
    the slacks of the rows are divided. force: (B, 1), the size by which multipliers are divided.
    """

    r: Tensor
    v: Tensor
    s: Tensor
    residual: Tensor
    reach: Tensor
    force: Tensor

    @classmethod
    def of(cls, program: Program, x: Tensor, y: Tensor) -> Measure:
        """Measure the point (x, y)."""
        data = program.data
        Px, Ax, pulled = program.matrices.times(x, y)
        s = data.b - Ax
        stationarity = Px + data.q + pulled
        violation = s - program.form.cone.split(s - y)[0]
        typical = _largest(data.q, data.b)
        least = FLOOR * torch.where(typical > 0, typical, 1.0)
        force = torch.maximum(_largest(Px, data.q, pulled), least)
        size = torch.maximum(_largest(Ax, data.b, s), least)
        residual = torch.maximum(_largest(stationarity) / force, _largest(violation) / size)[:, 0]
        residual = torch.where(residual.isfinite() & program.finite, residual, torch.inf)
        reach = torch.maximum(Ax.abs() + data.b.abs(), 1e-3 * size)
        return cls(torch.cat([stationarity, violation], 1), s - y, s, residual, reach, force)


def _largest(*parts: Tensor) -> Tensor:
    """Return the largest absolute entry of all parts, (B, 1)."""
    size = torch.cat([p.abs() for p in parts], 1)
    return size.amax(1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1)


class Point:
    """A state in equilibrated units, with the derivative of the projection and the linear system there.

    v: (B, m), s - y, moved by `offset` away from a kink. kinks: (B, m) bool, the rows of cones whose projection has a
    kink at s - y. D: the derivative of the projection; at a kink, on the side where the cone's rows do not restrict x.
    jump: D minus the derivative on the other side, None without kinks. sound: (B,) bool, the samples that are finite
    and near a solution. size: (B,), the norm of x. degenerate: (B,) bool, the samples that may lack a derivative. null:
    (B, n + m), a generic null vector of the system, 0 where it is regular.
    """

    def __init__(
        self, program: Program, x: Tensor, y: Tensor, measure: Measure | None = None, near: System | None = None
    ) -> None:
        """Make a point of x and y in the program's units; `near` is the system of a nearby point."""
        form = program.form
        if measure is None or not measure.residual.isfinite().all():
            finite = torch.cat([x, y], 1).isfinite().all(1) & program.finite
            x, y = (torch.where(finite[:, None], part, 0) for part in (x, y))
            measure = Measure.of(program, x, y)
            measure = measure._replace(residual=torch.where(finite, measure.residual, torch.inf))
        self.program, self.units, self.scale = program, program.units, program.scale
        self.sound = measure.residual <= UNSOLVED
        self.size = torch.linalg.vector_norm(x, dim=1)
        self.kinks, self.offset = _kinks(form, measure, y)
        self.v = measure.v if self.offset is None else measure.v + self.offset
        self.D, self.jump = _pieces(form, measure.v, self.offset)
        self.system = System(Jacobian(form, program.data, program.matrices, self.D), near)
        self.degenerate = self.sound & (self.system.singular | self.kinks.any(1))
        self.null = torch.zeros_like(self.scale)
        if self.system.singular.any():
            null = self.system.null_part(probe(form.n + form.m, x).expand_as(self.scale))
            largest = null.abs().amax(1, keepdim=True)
            self.null = torch.where(null.abs() > TAKES_PART * largest, null / largest, 0)

    def error(self, measure: Measure) -> Tensor:
        """Return an estimate of the relative error of (x, y), (B,): the length of a Newton step.

        In a badly conditioned system a small residual does not mean a small error. The estimate is 0 where the residual
        is rounding.
        """
        settled = measure.residual <= ROUNDING
        if settled.all():
            return torch.zeros_like(measure.residual)
        step = torch.linalg.vector_norm(self.system.solve(measure.r.nan_to_num(), False), dim=1)
        size = torch.linalg.vector_norm(measure.v.nan_to_num(), dim=1) + self.size
        return torch.where(settled, 0, step / torch.where(size > 0, size, 1.0))


def _kinks(form: Form, measure: Measure, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the rows at a kink, (B, m) bool, and the offset (B, m) to a point beside it, on its inner side."""
    v = measure.v
    noise = torch.clamp(100 * measure.residual, max=1e-5)[:, None]
    size = v.abs().amax(1, keepdim=True) if form.m else v.new_zeros(len(v), 1)
    near = torch.clamp(noise, min=TOUCHING) * size
    kinks = form.cone.kinks(v, near[:, 0])
    orthant = slice(form.zero, form.zero + form.nonneg)
    slack = measure.s.abs() <= torch.maximum(TOUCHING * measure.reach, noise * size)
    idle = y.abs() <= torch.clamp(noise, min=CARRYING) * measure.force
    kinks[:, orthant] = (slack & idle)[:, orthant]
    if not kinks.any():
        return kinks, None
    far = torch.where(torch.arange(form.m) < orthant.stop, v.abs(), 0)
    return kinks, torch.where(kinks, 2 * (near + far) * form.cone.centre(), 0)


def _pieces(form: Form, v: Tensor, offset: Tensor | None) -> tuple[BlockDiagonal, BlockDiagonal | None]:
    """Return the derivative of the projection, on the inner side of a kink, and its jump across the kink."""
    if offset is None:
        return form.cone.derivative(v), None
    inner, outer = form.cone.derivative(v + offset), form.cone.derivative(v - offset)
    pairs = zip(inner.groups, outer.groups, strict=True)
    return inner, BlockDiagonal(tuple((rows, a - b) for (rows, a), (_, b) in pairs), inner.size)
