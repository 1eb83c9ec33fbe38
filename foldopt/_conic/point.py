"""A solution of conic programs seen through the derivative of the projection there: what its verdicts stand on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foldopt._conic.form import Data, Form, Program, Units, products
from foldopt._conic.systems import Jacobian, System
from foldopt.cones import BlockDiagonal
from foldopt.qp._kkt import probe

UNSOLVED = 1e-3  # relative residual of what is no solution
TOUCHING = 1e-9  # distance to a kink, relative to the point, that counts as none
CARRYING = 1e-7  # multiplier of a row without slack, relative to the terms of the stationarity condition
ROUNDING = 1e-12  # relative residual that is no matter of accuracy
FLOOR = 1e-6  # of the size of terms that cancel, relative to the data
TAKES_PART = 1e-6  # entry of a null vector, relative to its largest, that counts as one


def conditions(form: Form, data: Data, units: Units, x: Tensor, y: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return [Px + q + A'y; s - Pi(s - y)], s = b - Ax, (B, n + m), in the units of an equilibrated program.

    data, x and y in the caller's units; differentiable to any order that the projection is. offset: (B, m), take the
    derivatives of Pi that far away, those on one side of a kink.
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
    """How well the optimality conditions of equilibrated programs hold at (x, y), all in their units.

    r: the conditions as in `conditions` (B, n + m). v: s - y, s: b - Ax, (B, m). residual: (B,), worst violation
    relative to the largest terms; infinite where something is not finite. reach: (B, m), what the slack of each row is
    relative to. force: (B, 1), what multipliers are relative to.
    """

    r: Tensor
    v: Tensor
    s: Tensor
    residual: Tensor
    reach: Tensor
    force: Tensor

    @classmethod
    def of(cls, program: Program, x: Tensor, y: Tensor) -> Measure:
        """Measure a point."""
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
    """Return the largest entry of the parts, (B, 1)."""
    size = torch.cat([p.abs() for p in parts], 1)
    return size.amax(1, keepdim=True) if size.shape[1] else size.new_zeros(len(size), 1)


class Point:
    """A state in equilibrated units: derivative of the projection, linear system, and where it is degenerate.

    v: s - y (B, m). kinks: (B, m) bool, rows of cones whose projection has a kink there. D: the derivative of the
    projection, `offset` of a kink, where the cone's rows do not hold x. jump: D minus that on the other side. sound:
    (B,) bool, samples that are finite and near a solution. size: (B,), that of x. degenerate: (B,) bool, those that may
    lack a derivative. null: (B, n + m), a null vector of the system in no special position, 0 where it is regular.
    """

    def __init__(
        self, program: Program, x: Tensor, y: Tensor, measure: Measure | None = None, near: System | None = None
    ) -> None:
        """x, y: in the program's units. measure: of that point, if it is known. near: the system of a point nearby."""
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
        """Return an estimate of the error of (x, y), (B,), relative to them: how far a Newton step would go.

        A small residual says little where the system is badly conditioned. 0 where the residual is rounding.
        """
        settled = measure.residual <= ROUNDING
        if settled.all():
            return torch.zeros_like(measure.residual)
        step = torch.linalg.vector_norm(self.system.solve(measure.r.nan_to_num(), False), dim=1)
        size = torch.linalg.vector_norm(measure.v.nan_to_num(), dim=1) + self.size
        return torch.where(settled, 0, step / torch.where(size > 0, size, 1.0))


def _kinks(form: Form, measure: Measure, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the rows at a kink, (B, m) bool, and the way from there to a point beside it, on its inner side."""
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
    """Return the derivatives of the projection, on the inner side of a kink, and how they jump there."""
    if offset is None:
        return form.cone.derivative(v), None
    inner, outer = form.cone.derivative(v + offset), form.cone.derivative(v - offset)
    pairs = zip(inner.groups, outer.groups, strict=True)
    return inner, BlockDiagonal(tuple((rows, a - b) for (rows, a), (_, b) in pairs), inner.size)
