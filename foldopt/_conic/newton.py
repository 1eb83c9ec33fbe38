"""A Newton step on the optimality conditions of a conic program: the update that is folded, and its verdicts."""

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
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, KINK, NOT_UNIQUE, Verdict

ConeState = tuple[Tensor, Tensor]
Judge = Callable[[Tensor, Sequence[bool], bool], tuple[Tensor, Verdict]]
UNIQUE = 1e-8  # share of a cotangent along the null space that counts as none
MOVED = 1e-6  # what the derivative's jump at a kink does to the adjoint solution, relative to that
NULL = 1e-9  # singular value, relative to the largest, that counts as zero
ROUNDING = 1e-9  # entry of an adjoint solution, relative to its largest, that counts as none
TURN = 1e-4  # of a point, the way along a null vector on which the projection's derivative is looked at
SHARE = 1e-6  # part of a derivative, relative to its terms, that depends on a choice between solutions


class ConeNewton(nn.Module):
    """One Newton step on Px + q + A'y = 0, s = Pi(s - y), s = b - Ax: ``(x, y) -> (x, y)``, y in the dual cone.

    J, the Jacobian at the state, is held fixed: the step has the solution as its fixed point for all parameters near,
    Phi = 0 there, and derivatives of every order are those of the conditions themselves. State: x (B, n), y (B, m).
    Parameters of the step: any number of tensors (B, k) or (k,), which `theta` makes the program's entries of.

    Args:
        form: patterns and cone. theta: ``theta(*params) -> (B, entries)``, differentiable, linear with a constant part.
        pull: ``pull(g, needed) -> (v, size)``, what the needed params get of the cotangent g of the entries in one
            row (B, k), and the sum of the absolute values of its terms.
        read: (n,) bool, the variables that anybody looks at. nan: let a cotangent of NaN reach all params of its
            sample. row_names: how a row of A is called.

    Robinson, Strongly regular generalized equations (1980); Ali, Wong and Kolter, A semismooth Newton method for fast,
    generic convex programming (2017).
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
        """Return v = Phi^T v + g, which is g."""
        return g

    def weights(self, state: ConeState, *params: Tensor) -> Tensor:
        """Return the units of the state, (B, n + m), in which its size and that of an error are to be measured."""
        return self.at(state, params).scale

    def judge(self, state: ConeState, *params: Tensor) -> Judge | None:
        """Return what judges cotangents and tangents at this state; None where every sample has every derivative."""
        point = self.at(state, params)
        if not point.degenerate.any():
            return None

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            return self._judged(point, state, g, needed, forward)

        return judged

    def at(self, state: ConeState, params: Sequence[Tensor], theta: Tensor | None = None) -> Point:
        """Return what the step needs to know of a state, kept for as long as it is asked for the same one."""
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
        """Keep what is known of a state for the steps there, until the next call."""
        self._kept = Kept.of(point, *state, *params)

    def _judged(
        self, point: Point, state: ConeState, g: Tensor, needed: Sequence[bool], forward: bool
    ) -> tuple[Tensor, Verdict]:
        """Return a cotangent (B, n + m), its part along which the solution is not unique taken away, and the verdict.

        needed: which of the params a derivative is asked for. forward: whether g is a tangent; of one only the point
        tells whether it has a derivative in every direction.
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
        """Return the rows, (B, m) bool, at a kink that the adjoint w moves: it solves the system of one side only."""
        if point.jump is None:
            return torch.zeros_like(point.kinks)
        reach = torch.maximum(w.abs().amax(1), 1e-6 * size)[:, None]
        return point.kinks & ((point.jump @ w[:, self.form.n :]).abs() > MOVED * reach)

    def _null_correction(self, point: Point, w: Tensor, i: int) -> Tensor:
        """Return the null vector of J', (n + m,), that added to w moves the rows at a kink least, in one sample.

        A variable that is not unique, such as an unused bound on an absolute value, may touch rows where the solver
        left it; the derivative does not depend on that.
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
        """Return in which samples the derivative is not unique: (B,) bool each.

        First those where another adjoint solution, w plus a null vector in the multipliers, gives the needed params
        another gradient: rows depend on each other, and these params move them. Then those where another x, or an
        adjoint moved along x, does.
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
        """Return in which samples another choice of multipliers, or of x, turns a curved cone's derivative under w.

        Where multipliers are not unique the curvature of the boundary may count as much or as little as one likes.
        Rows at a kink are left to `_rows_at_moved_kink`.
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
        """Return the gradient of the program's entries for an adjoint w (B, n + m), in equilibrated units."""
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
        """Return whether a gradient of the program's entries is one of the needed params, (B,) bool."""
        found, terms = self.pull(torch.cat(gradient, 1), needed)
        return (found.abs() > SHARE * terms).any(1)
