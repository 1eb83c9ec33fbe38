"""One Newton step on the optimality conditions of a conic program, which is folded, and its verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldopt._conic.form import Data, Form, Program
from foldopt._conic.point import Point, conditions
from foldopt._conic.systems import DENSE, solved
from foldopt.cones import BlockDiagonal
from foldopt.qp._kkt import probe
from foldopt.updates._kept import Kept
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, KINK, NOT_UNIQUE, Judge, Verdict

ConeState = tuple[Tensor, Tensor]
UNIQUE = 1e-8  # the solution is unique along a cotangent if its share in the null space is at most this
MOVED = 1e-6  # a jump of the projection's derivative matters if it changes the adjoint solution by this share
NULL = 1e-9  # singular values below this times the largest count as zero
ROUNDING = 1e-9  # entries of an adjoint solution below this times the largest count as zero
TURN = 1e-4  # relative step along a null vector in the difference quotient of the projection's derivative
SHARE = 1e-6  # a gradient is not unique if another choice of solution changes it by this share of its terms


class ConeNewton(nn.Module):
    """One Newton step on Px + q + A'y = 0, s = Pi(s - y), s = b - Ax, where Pi is the projection on K.

    The step maps the state (x, y), x (B, n) and multipliers y (B, m) in the dual cone, to a new one. The Jacobian J at
    the state is held fixed. The solution is then a fixed point of the step for all nearby parameters, Phi is 0 there,
    and derivatives of every order are those of the optimality conditions. The parameters of the step are any number of
    tensors (B, k) or (k,), from which `theta` computes the entries of the program.

    Args:
        form: the sparsity patterns and the cone.
        theta: ``theta(*params) -> (B, size)``, the entries of P, q, A and b; affine and differentiable.
        pull: ``pull(g, needed) -> (v, size)`` for a cotangent g of the entries. v (B, k) is the cotangent of the needed
            params, in one row, and size (B, k) the sum of the absolute values of its terms.
        read: (n,) bool, the variables that outputs are made of.
        nan: whether a cotangent of NaN makes the gradient of all params of its sample NaN.
        row_names: the name of a row of A in messages.

    Source: Robinson, Strongly regular generalized equations (1980); Ali, Wong and Kolter, A semismooth Newton method
    for fast, generic convex programming (2017).
    """

    def __init__(
        self,
        form: Form,
        theta: Callable[..., Tensor],
        pull: Callable[[Tensor, Sequence[bool]], tuple[Tensor, Tensor]],
        read: Tensor,
        nan: bool = False,
        row_names: Callable[[int], str] = str,
    ) -> None:
        super().__init__()
        self.form, self.theta, self.pull, self.read, self.nan = form, theta, pull, read, nan
        self.row_names = row_names
        self._kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def forward(self, state: ConeState, *params: Tensor) -> ConeState:
        """Return the state after one step."""
        theta = self.theta(*params)
        point = self.at(state, params, theta)
        x, y = state
        r = conditions(self.form, self.form.data(theta), point.units, x, y, point.offset)
        dx, dy = solved(point.system, torch.where(point.sound[:, None], r, 0)).split([self.form.n, self.form.m], 1)
        d, e, c = point.units
        x, y = x - d * dx, y - e / c * dy
        return (x + 0 * theta.nan_to_num(0, 0, 0).sum(1, keepdim=True) if self.nan else x), y

    def inverse(self, g: Tensor, transposed: bool, stepped: ConeState, state: ConeState, *params: Tensor) -> Tensor:
        """Return the solution of v = Phi^T v + g, which is g because Phi = 0."""
        return g

    def weights(self, state: ConeState, *params: Tensor) -> Tensor:
        """Return the units (B, n + m) in which the size of the state and of its error are measured."""
        return self.at(state, params).scale

    def judge(self, state: ConeState, *params: Tensor) -> Judge | None:
        """Return the function that judges cotangents and tangents at this state; None if every derivative exists."""
        point = self.at(state, params)
        if not point.degenerate.any():
            return None

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            return self._judged(point, state, g, needed, forward)

        return judged

    def at(self, state: ConeState, params: Sequence[Tensor], theta: Tensor | None = None) -> Point:
        """Return the point of a state: the data that the step needs there, computed once for the latest state."""
        tensors = (*state, *params)
        if self._kept is not None and self._kept.suits(*tensors):
            return self._kept.found
        with torch.no_grad():
            theta = self.theta(*params) if theta is None else theta.detach()
            program = Program(self.form, self.form.data(theta))
            point = Point(program, *program.inside(state[0].detach(), state[1].detach()))
        self.keep(state, params, point)
        return point

    def keep(self, state: ConeState, params: Sequence[Tensor], point: Point) -> None:
        """Store the point of a state, to be used until another state is asked for."""
        self._kept = Kept.of(point, *state, *params)

    def _judged(
        self, point: Point, state: ConeState, g: Tensor, needed: Sequence[bool], forward: bool
    ) -> tuple[Tensor, Verdict]:
        """Return a cotangent (B, n + m), without its part along which the solution is not unique, and the verdict.

        needed: the params with respect to which a derivative is asked for. forward: whether g is a tangent. For
        tangents a generic cotangent is judged, which tells whether the derivative exists in every direction.
        """
        form, n = self.form, self.form.n
        asked = point.degenerate & (g != 0).any(1)
        u = g * point.scale
        if forward:
            seen = torch.cat([self.read, torch.zeros(form.m, dtype=torch.bool)])
            u = (probe(n + form.m, g) * seen).expand_as(g)
        size = torch.linalg.vector_norm(u, dim=1).clamp(min=torch.finfo(g.dtype).tiny)
        loose = point.system.null_part(u)
        free = torch.linalg.vector_norm(loose, dim=1) > UNIQUE * size
        w = point.system.solve(torch.where(free[:, None], u - loose, u), True)
        hit = self._rows_at_moved_kink(point, w, size)
        todo = (asked & hit.any(1) & point.system.singular).nonzero()[:, 0]
        for i in todo.tolist() if n + form.m <= DENSE else []:
            w[i] += self._null_correction(point, w, i)
        hit = self._rows_at_moved_kink(point, w, size) if len(todo) else hit
        dependent, not_unique = self._depends_on_choice(point, state, w, needed)
        code = torch.full(g.shape[:1], DIFFERENTIABLE, device=g.device)
        for kind, mask in ((DEPENDENT, dependent), (KINK, hit.any(1)), (NOT_UNIQUE, free | not_unique)):
            code = torch.where(asked & mask, kind, code)
        loose_x, loose_y = (point.null != 0).split([n, form.m], 1)
        rows = torch.where((code == KINK)[:, None], hit, loose_y & (code == DEPENDENT)[:, None])
        if not forward:
            g = torch.where((asked & free)[:, None], g - loose / point.scale, g)
        return g, Verdict(code, rows, loose_x & (code == NOT_UNIQUE)[:, None], self.row_names)

    def _rows_at_moved_kink(self, point: Point, w: Tensor, size: Tensor) -> Tensor:
        """Return the rows at a kink, (B, m) bool, whose two sides give different adjoint solutions w."""
        if point.jump is None:
            return torch.zeros_like(point.kinks)
        reach = torch.maximum(w.abs().amax(1), 1e-6 * size)[:, None]
        return point.kinks & ((point.jump @ w[:, self.form.n :]).abs() > MOVED * reach)

    def _null_correction(self, point: Point, w: Tensor, i: int) -> Tensor:
        """Return the null vector of J' (n + m,) for sample i that, added to w, changes the rows at a kink least.

        A variable that is not unique, such as an epigraph variable without influence, may be at a kink just because
        the solver left it there. The derivative does not depend on that.
        """
        form, one = self.form, torch.tensor([i])
        P, _, A, _ = (part[0] for part in form.dense(point.program.data.at(one)))
        D, jump = (
            BlockDiagonal(tuple((r, v[one]) for r, v in M.groups), form.m) for M in (point.D, point.jump or point.D)
        )
        held = A - (D @ A.T[:, None])[:, 0].T
        _, values, V = torch.linalg.svd(torch.cat([P, held]))
        basis = V[int((values > NULL * values.amax()).sum()) :].T
        seen = (jump @ (A @ basis).T[:, None])[:, 0].T * point.kinks[i][:, None]
        moved = (jump @ w[one, form.n :])[0] * point.kinks[i]
        u = basis @ (torch.linalg.pinv(seen, atol=NULL) @ moved)
        return torch.cat([u, -A @ u])

    def _depends_on_choice(
        self, point: Point, state: ConeState, w: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Return the samples whose gradient is not unique, (B,) bool, for dependent rows and for several solutions.

        Rows depend on each other if adding a null vector to the multipliers' part of the adjoint w changes the gradient
        of the needed params. The solution is not unique if adding one to the part of x, or another x, changes it.
        """
        if not point.system.singular.any():
            return point.sound & False, point.sound & False
        n, m = self.form.n, self.form.m
        w = torch.where(w.abs() > ROUNDING * w.abs().amax(1, keepdim=True), w, 0)
        loose_x, loose_y = (
            nn.functional.pad(part, pad)
            for part, pad in zip(point.null.split([n, m], 1), ((0, m), (n, 0)), strict=True)
        )
        x, y = (point.scale * point.null).split([n, m], 1)
        dependent = self._moved(self._gradient(point, loose_y, *state), needed)
        not_unique = self._moved(self._gradient(point, loose_x, *state), needed)
        bent = self._gradient(point, w, x, y)._replace(q=torch.zeros_like(x), b=torch.zeros_like(y))
        return dependent | self._curvature_depends_on_choice(point, w), not_unique | self._moved(bent, needed)

    def _curvature_depends_on_choice(self, point: Point, w: Tensor) -> Tensor:
        """Return the samples, (B,) bool, where other multipliers or another x change the derivative of a curved cone.

        The curvature of the cone's boundary enters the derivative in proportion to the multipliers, which may not be
        unique. Rows at a kink are judged by `_rows_at_moved_kink`.
        """
        form, v = self.form, point.v
        if all(rows.shape[1] == 1 for rows, _ in point.D.groups):
            return point.sound & False
        null_x, null_y = point.null.split([form.n, form.m], 1)
        way = -point.program.matrices.times(null_x, null_y)[1] - null_y
        largest, size = (part.abs().amax(1, keepdim=True) for part in (way, v))
        way = torch.where(largest > 0, TURN * size * way / largest, 0)
        pairs = zip(form.cone.derivative(v + way).groups, form.cone.derivative(v - way).groups, strict=True)
        curved = tuple((rows, (a - b) / (2 * TURN)) for (rows, a), (_, b) in pairs if rows.shape[1] > 1)
        change = BlockDiagonal(curved, form.m) @ w[:, form.n :]
        return (~point.kinks & (change.abs() > MOVED * w.abs().amax(1, keepdim=True))).any(1)

    def _gradient(self, point: Point, w: Tensor, x: Tensor, y: Tensor) -> Data:
        """Return the gradient of the program's entries for an adjoint w (B, n + m) in equilibrated units."""
        form, (d, e, c) = self.form, point.units
        wx, wy = w.split([form.n, form.m], 1)
        wx, wy = c * d * wx, e * (wy - point.D @ wy)
        rows, columns = form.A_row, form.A_column
        return Data(
            wx[:, form.P_row] * x[:, form.P_column],
            wx,
            y[:, rows] * wx[:, columns] - wy[:, rows] * x[:, columns],
            wy,
        )

    def _moved(self, gradient: Data, needed: Sequence[bool]) -> Tensor:
        """Return whether a gradient of the program's entries gives the needed params a nonzero gradient, (B,) bool."""
        found, terms = self.pull(torch.cat(gradient, 1), needed)
        return (found.abs() > SHARE * terms).any(1)
