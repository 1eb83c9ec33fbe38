"""A Newton step on the KKT conditions of a quadratic program: the update that `QPLayer` folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt.qp._operations import numbers
from foldopt.qp._program import Program
from foldopt.qp._structure import Structure, program_of
from foldopt.qp._systems import products, solved
from foldopt.updates._kept import Kept
from foldopt.updates._kkt_point import Point, row_name
from foldopt.verdicts import Judge, Verdict

__all__ = ["Judge", "KKTNewton", "NewtonState", "Point", "row_name"]

NewtonState = tuple[Tensor, Tensor]


class KKTNewton(nn.Module):
    """One semismooth Newton step on the KKT conditions of a quadratic program: ``(x, y) -> (x, y)``.

    With the rows of A, of G and of the bounds in one matrix C the conditions are Hx + q + C'y = 0 and l <= Cx <= u. The
    step solves them on the rows that carry a multiplier. At a solution Phi = 0, so that the folded derivative is one
    solve with the KKT matrix of the strongly active rows, and there is nothing to tune. Where the multipliers are not
    unique, Phi is the projection on the directions in which they can move; a cotangent along which x is unique is
    orthogonal to these.

    The state is x (B, n) and y (B, r), multipliers of the rows of A, of G, then of the bounds, positive at an upper and
    negative at a lower limit. The step is called as ``step((x, y), Q, p, G, h, A, b, lower, upper)`` with the
    parameters of `foldopt.QPLayer`; lower and upper are (0,) if there are no bounds.

    Args:
        degenerate: how derivatives that do not exist are replaced, one of `foldopt.verdicts.POLICIES`; default "raise".
            With "one_sided" and "warn", rows that depend on each other are reduced to independent ones here; with
            "least_norm" they share their multipliers.
        nan: whether a cotangent of NaN reaches all parameters of its sample; default False.
        structure: places of the entries of sparse Q, G and A, whose values (nnz,) or (B, nnz) then take the places of
            the matrices among the parameters; default None: dense.

    Source: Fischer, A special Newton-type optimization method (1992); Nocedal and Wright, Numerical Optimization
        (2006),
    chapter 16.

    Examples:
        >>> step = foldopt.updates.newton.KKTNewton()
        >>> x, y = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)  # x = 1, multiplier 1
        >>> Q, p, G, h = (torch.tensor(part, dtype=torch.float64) for part in ([[1.0]], [[-2.0]], [[1.0]], [1.0]))
        >>> none = Q.new_zeros(0, 1), Q.new_zeros(0), Q.new_zeros(0), Q.new_zeros(0)
        >>> [part.item() for part in step((x, y), Q, p, G, h, *none)]
        [1.0, 1.0]
    """

    def __init__(self, degenerate: str = "raise", nan: bool = False, structure: Structure | None = None) -> None:
        super().__init__()
        self.degenerate, self.nan, self.structure = degenerate, nan, structure
        self._prepared: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def forward(self, state: NewtonState, *params: Tensor) -> NewtonState:
        """Return the state after one step.

        Args:
            state: the pair (x, y), (B, n) and (B, r).
            *params: Q, p, G, h, A, b, lower and upper.

        Returns:
            The pair (x, y).
        """
        x, y = state
        kept = self._prepared
        known = kept.found.symmetric if kept is not None and kept.suits(*state, *params) else None
        program = self.program(params, known)
        at = self.at(state, params, program)
        strong, sound = at.strong, at.sound[:, None]
        Hx, Cx, pulled = products(program.H, program.C, x, torch.where(strong, y, 0))
        bound = torch.where(y.detach() < 0, program.lower, program.upper)
        r1 = torch.where(sound, -(Hx + program.q + pulled), 0)
        r2 = torch.where(strong & sound, bound - Cx, 0)
        dx, dy = solved(at.system, program.H, program.C, r1, r2, (x.detach(), y.detach()))
        x = x + dx
        if self.nan:  # adds 0 times every parameter, so that NaN reaches all of them, also in rows that are not active
            x = x + 0 * sum(numbers(part).nan_to_num(0, 0, 0).sum(1, keepdim=True) for part in program)
        return x, torch.where(strong, y + dy, 0)

    def program(self, params: Sequence[Tensor], symmetric: Tensor | None = None) -> Program:
        """Return the program of some parameters; `symmetric` is the symmetric part of a dense Q, if it is known."""
        if self.structure is not None:
            return self.structure.program(*params)
        return program_of(*params, symmetric=symmetric)

    def inverse(self, g: Tensor, transposed: bool, stepped: NewtonState, state: NewtonState, *params: Tensor) -> Tensor:
        """Return v = Phi^T v + g, which is g, because Phi is zero or orthogonal to g."""
        return g

    def weights(self, state: NewtonState, *params: Tensor) -> Tensor:
        """Return the units in which the state and its errors are measured, (B, n + r)."""
        d, e, c = self.at(state, params).units
        return torch.cat([d, e / c], 1)

    def judge(self, state: NewtonState, *params: Tensor) -> Judge | None:
        """Return the function that judges cotangents and tangents at this state; None if every derivative exists."""
        at = self.at(state, params)
        if not at.degenerate.any():
            return None
        m, k = params[3].shape[-1], params[5].shape[-1]

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            g, verdict = at.judged(g, needed, k, m, forward)
            return g, replace(verdict, row_names=lambda row: row_name(row, k, m))

        return judged

    def prepare(self, state: NewtonState, params: Sequence[Tensor], at: Point, symmetric: Tensor | None = None) -> None:
        """Keep what a solver knows about its solution for the step there, until the next call.

        `symmetric` is the symmetric part of Q, if it is known.
        """
        self._prepared = Kept.of(_Known(at, symmetric), *state, *params)

    def at(self, state: NewtonState, params: Sequence[Tensor], program: Program | None = None) -> Point:
        """Return the analysis of a state, kept for as long as the same state is asked for."""
        kept = self._prepared
        if kept is not None and kept.suits(*state, *params):
            return kept.found.point
        with torch.no_grad():
            data = self.program(params) if program is None else program.detach()
            point = Point.of(data, state[0].detach(), state[1].detach(), self.degenerate)
        self.prepare(state, params, point)
        return point


class _Known(NamedTuple):
    """What is known about a state: its analysis, and the symmetric part of Q."""

    point: Point
    symmetric: Tensor | None
