"""A Newton step on the KKT conditions of a quadratic program: the update that `QPLayer` folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt.batched import matvec
from foldopt.errors import LimitError
from foldopt.qp._activity import Activity, activity, touched_somewhere
from foldopt.qp._kkt import Known, probe
from foldopt.qp._operations import compact, matmul, numbers, selected_rows, where_samples
from foldopt.qp._program import Program, Units, equilibrate, residual
from foldopt.qp._structure import Structure, program_of
from foldopt.qp._systems import Equilibrated, Mended, Restrained, Schur, System, products, restrained, solved
from foldopt.updates._kept import Kept
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, KINK, NOT_UNIQUE, Verdict

__all__ = [
    "MANY",
    "MOVED",
    "PART",
    "RANK",
    "UNIQUE",
    "UNSOLVED",
    "Judge",
    "KKTNewton",
    "NewtonState",
    "Point",
    "row_name",
]

NewtonState = tuple[Tensor, Tensor]
Judge = Callable[[Tensor, Sequence[bool], bool], tuple[Tensor, Verdict]]
UNSOLVED = 1e-3  # KKT residual of what is no solution
UNIQUE = 1e-8  # share of a cotangent along directions in which x is free that counts as none
MOVED = 1e-6  # movement of a weakly active row, relative to that of x, that counts as one
RANK = 1e-13  # eigenvalue of CC' relative to the largest at which rows depend on each other
MANY = 2_000  # rows that depend on each other, from which no independent ones are chosen: a matter of hours
PART = 1e-6  # of a unit vector in the null space: the row, or variable, takes part


class KKTNewton(nn.Module):
    """One semismooth Newton step on Hx + q + C'y = 0, l <= Cx <= u, on the rows that carry: ``(x, y) -> (x, y)``.

    At a solution Phi = 0, so that the folded derivative is one solve with the KKT matrix of the strongly active rows,
    and no number needs tuning. State: x (B, n); y (B, r), multipliers of the rows of A, of G, then of the bounds,
    positive at an upper and negative at a lower limit. Where the multipliers are not unique Phi is the projection on
    what they can move by, and a cotangent that x is unique along is orthogonal to that.

    Args:
        degenerate: how derivatives that do not exist are replaced (see `QPLayer`); it decides here whether rows that
            depend on each other are reduced to independent ones ("one_sided", "warn") or share ("least_norm").
        nan: let a cotangent of NaN reach all parameters of its sample.
        structure: of sparse Q, G and A, whose values (nnz,) or (B, nnz) are then parameters in their place.

    Parameters of the step: Q, p, G, h, A, b, lower, upper as for `QPLayer`; lower and upper (0,) for none.
    Fischer, A special Newton-type optimization method (1992); Nocedal and Wright, Numerical Optimization (2006), 16.
    """

    def __init__(self, degenerate: str = "raise", nan: bool = False, structure: Structure | None = None) -> None:
        super().__init__()
        self.degenerate, self.nan, self.structure = degenerate, nan, structure
        self._prepared: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def forward(self, state: NewtonState, *params: Tensor) -> NewtonState:
        """Return the state after one step."""
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
        if self.nan:  # reaches every number, of which a derivative only sees those of sound samples and strong rows
            x = x + 0 * sum(numbers(part).nan_to_num(0, 0, 0).sum(1, keepdim=True) for part in program)
        return x, torch.where(strong, y + dy, 0)

    def program(self, params: Sequence[Tensor], symmetric: Tensor | None = None) -> Program:
        """Return the program of some parameters; symmetric: the symmetric part of a dense Q, if it is known."""
        if self.structure is not None:
            return self.structure.program(*params)
        return program_of(*params, symmetric=symmetric)

    def inverse(self, g: Tensor, transposed: bool, stepped: NewtonState, state: NewtonState, *params: Tensor) -> Tensor:
        """Return v = Phi^T v + g, which is g."""
        return g

    def weights(self, state: NewtonState, *params: Tensor) -> Tensor:
        """Return the units of the state, (B, n + r), in which its size and that of an error are to be measured."""
        d, e, c = self.at(state, params).units
        return torch.cat([d, e / c], 1)

    def judge(self, state: NewtonState, *params: Tensor) -> Judge | None:
        """Return what judges cotangents and tangents at this state; None where every sample has every derivative."""
        at = self.at(state, params)
        if not at.degenerate.any():
            return None
        m, k = params[3].shape[-1], params[5].shape[-1]

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            g, verdict = at.judged(g, needed, k, m, forward)
            return g, replace(verdict, row_names=lambda row: row_name(row, k, m))

        return judged

    def prepare(self, state: NewtonState, params: Sequence[Tensor], at: Point, symmetric: Tensor | None = None) -> None:
        """Keep what a solver knows of its solution for the step there, until the next call.

        symmetric: the symmetric part of Q, if it is known.
        """
        self._prepared = Kept.of(_Known(at, symmetric), *state, *params)

    def at(self, state: NewtonState, params: Sequence[Tensor], program: Program | None = None) -> Point:
        """Return what the step needs to know of a state, kept for as long as it is asked for the same one."""
        kept = self._prepared
        if kept is not None and kept.suits(*state, *params):
            return kept.found.point
        with torch.no_grad():
            data = self.program(params) if program is None else program.detach()
            point = Point.of(data, state[0].detach(), state[1].detach(), self.degenerate)
        self.prepare(state, params, point)
        return point


class Point:
    """A state seen through its active rows, in equilibrated units.

    strong, weak, carrying, below: as of `Activity`. sound: (B,) bool, samples that are finite and near a solution.
    degenerate: (B,) bool, those that may lack a derivative. dependent: (B, r) bool, strong rows that depend on each
    other. seen: (B, r) bool, other rows that may come to hold x where it is not unique. base: the system of the
    strong rows; system: that of the strong rows, or of independent ones among them, which derivatives are solved
    with; restrained: that of all strong rows where some are seen.
    """

    def __init__(
        self,
        program: Program,
        units: Units,
        active: Activity,
        system: System,
        sound: Tensor,
        degenerate: Tensor,
        dependent: Tensor,
        base: Equilibrated | None = None,
        seen: Tensor | None = None,
        restrained: Restrained | None = None,
        others: tuple[Tensor, Point] | None = None,
    ) -> None:
        self.program, self.units, self.system, self.sound = program, units, system, sound
        self.strong, self.weak, self.carrying, self.below = active
        self.degenerate, self.dependent, self.base, self.seen = degenerate, dependent, base, seen
        self.restrained, self.others = restrained, others

    @classmethod
    def clear(cls, program: Program, system: Schur, others: tuple[Tensor, Point] | None = None) -> Point:
        """Return the point of solutions that are known to be regular, but for `others`: (samples, their point)."""
        strong, units = system.strong, Units(*(part.clone() for part in system.units))
        none = torch.zeros_like(strong)
        degenerate = torch.zeros(len(strong), dtype=torch.bool, device=strong.device)
        sound = ~degenerate
        if others is None:
            return cls(program, units, Activity(strong, none, strong, none), system, sound, degenerate, none)
        index, point = others
        strong = strong.index_put((index,), point.strong)
        for whole, part in zip(units, point.units, strict=True):
            whole[index] = part
        degenerate[index], sound[index] = point.degenerate, point.sound
        active = Activity(strong, none, strong, none)
        mended = Mended(system, index, point.system)
        return cls(program, units, active, mended, sound, degenerate, none, others=others)

    @classmethod
    def of(
        cls,
        program: Program,
        x: Tensor,
        y: Tensor,
        degenerate: str,
        units: Units | None = None,
        error: Tensor | None = None,
        known: Sequence[Known | None] | None = None,
    ) -> Point:
        """Examine a state. units: of the equilibrated program, error: its relative KKT residual (B,), known: sparse
        systems of its active rows, if they are there.

        In samples that are not finite, or far from a solution, the step is to stay where it is.
        """
        sound = torch.cat([x, y], 1).isfinite().all(1)
        sound &= torch.stack([numbers(part).isfinite().all(1) for part in (program.H, program.q, program.C)]).all(0)
        if error is None:
            program, x, y = _without(program, x, y, sound)
            units = equilibrate(program)
            error = residual(units.scaled(program), x / units.d, y * units.c / units.e)
        sound &= error <= UNSOLVED
        if units is None or not sound.all():
            program, x, y = _without(program, x, y, sound)
            units, error = equilibrate(program), torch.where(sound, error, 0)
        scaled = units.scaled(program)
        x_s, y_s = x / units.d, y * units.c / units.e
        active = activity(scaled, x_s, y_s, error)
        strong = active.strong
        base = independent = Equilibrated(scaled, units, strong, known)
        system: System = base
        least, singular = None, base.kkt.singular
        seen = dependent = torch.zeros_like(strong)
        if singular.any():
            n, r = x.shape[1], y.shape[1]
            basis = base.kkt.null_vectors()
            dependent = base.rows.put(torch.linalg.vector_norm(basis[:, n:], dim=2), r) > PART
            bounded = scaled.lower.isfinite() | scaled.upper.isfinite()
            sight = torch.linalg.vector_norm(matmul(scaled.C, basis[:, :n]), dim=2)
            seen = ~strong & bounded & (sight > PART * matvec(scaled.C.abs(), torch.ones_like(x)))
            seen = touched_somewhere(scaled, x_s, strong, seen)
            if degenerate in ("one_sided", "warn") and dependent.any():
                strong = _independent(scaled, y_s, strong, dependent)
                system = independent = Equilibrated(scaled, units, strong)
            if seen.any():
                least = restrained(base, scaled, active.weak | seen)
                system = least.on(independent)
        torn = scaled.equality & ~active.carrying
        lacking = singular | (active.weak | torn).any(1)
        active = active._replace(strong=strong)
        return cls(scaled, units, active, system, sound, lacking, dependent, base, seen, least)

    def judged(self, g: Tensor, needed: Sequence[bool], k: int, m: int, forward: bool) -> tuple[Tensor, Verdict]:
        """Return a cotangent (B, N), its part along which the solution is not unique taken away, and the verdict.

        needed: which of Q, p, G, h, A, b, lower and upper a derivative is asked for. k, m: rows of A and G. forward:
        whether g is a tangent, of which only the point tells whether it has a derivative in every direction.
        """
        d, e, c = self.units
        n, r = d.shape[1], e.shape[1]
        code = torch.full(g.shape[:1], DIFFERENTIABLE, device=g.device)
        rows = torch.zeros(len(g), r, dtype=torch.bool, device=g.device)
        variables = torch.zeros(len(g), n, dtype=torch.bool, device=g.device)
        asked = self.degenerate & (g != 0).any(1)
        if self.others is not None:
            index, point = self.others
            part, verdict = point.judged(g[index], needed, k, m, forward)
            code[index], rows[index], variables[index] = verdict.code, verdict.rows, verdict.variables
            return g.index_put((index,), part), Verdict(code, rows, variables)
        base, seen = self.base, self.seen
        if base is None or seen is None or not asked.any():
            return g, Verdict(code, rows, variables)
        weights = torch.cat([d, e / c], 1)
        u = g * torch.cat([d, torch.where(self.strong, e / c, 0)], 1)
        if forward:
            u = torch.cat([probe(n, g).expand(len(g), n), torch.zeros_like(u[:, n:])], 1)
        size = torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        null = base.kkt.null_part(torch.cat([u[:, :n], base.rows.take(u[:, n:])], 1))
        loose = torch.cat([null[:, :n], base.rows.put(null[:, n:], r)], 1)
        free = torch.linalg.vector_norm(null, dim=1) > UNIQUE * size[:, 0]
        u = torch.where(free[:, None], u - loose, u)
        rhs = torch.cat([u[:, :n], base.rows.take(u[:, n:])], 1)
        w = self.restrained.found(rhs) if self.restrained else base.kkt.solve(rhs)
        held, w = base.rows.put(w[:, n:], r), w[:, :n]
        touched, basis = self.weak | seen, base.kkt.null_vectors()[:, :n]
        lengths = matvec(self.program.C.abs(), torch.ones_like(w))
        reach = torch.maximum(w.abs().amax(1, keepdim=True), 1e-6 * size) * lengths
        hit = touched & (matvec(self.program.C, w).abs() > MOVED * reach)
        if not forward:
            hit |= self.weak & (g[:, n:] != 0)
        at = torch.arange(r, device=g.device)
        group = torch.where(at < k, 0, torch.where(at < k + m, 1, 2))
        of_A, of_G, of_lower, of_upper = any(needed[4:6]), any(needed[2:4]), needed[6], needed[7]
        either = self.program.equality & (of_lower or of_upper)
        of_bounds = either | torch.where(self.below, of_lower, of_upper)
        wanted = torch.where(group == 0, of_A, torch.where(group == 1, of_G, of_bounds))
        torn = self.program.equality & ~self.carrying & (group == 2) & ((held.abs() > MOVED * size) | forward)
        lies = (self.dependent | torn) & wanted
        spread = torch.linalg.vector_norm(basis, dim=2) > PART
        wandering = spread & any(needed[i] for i in (0, 2, 4))
        unsettled = free | wandering.any(1)
        for kind, mask in ((DEPENDENT, lies.any(1)), (KINK, hit.any(1)), (NOT_UNIQUE, unsettled)):
            code = torch.where(asked & mask, kind, code)
        rows = torch.where((code == KINK)[:, None], hit, lies & (code == DEPENDENT)[:, None])
        variables = (code == NOT_UNIQUE)[:, None] & (wandering | (null[:, :n].abs() > PART * size))
        if not forward:
            g = torch.where((asked & free)[:, None], g - loose / weights, g)
        return g, Verdict(code, rows, variables)


def row_name(row: int, k: int, m: int) -> str:
    """Return how users call a row of the program: A[i], G[i], or a bound of x[i]."""
    if row < k:
        return f"A[{row}]"
    return f"G[{row - k}]" if row < k + m else f"bounds of x[{row - k - m}]"


def _without(program: Program, x: Tensor, y: Tensor, sound: Tensor) -> tuple[Program, Tensor, Tensor]:
    """Put min 1/2 |x|^2 without rows, solved at 0, in the place of samples that are not sound."""
    if sound.all():
        return program, x, y
    H, q, C, lower, upper = program
    one = sound[:, None]
    clean = Program(
        where_samples(sound, H, 1.0),
        torch.where(one, q, 0),
        where_samples(sound, C),
        torch.where(one, lower, -torch.inf),
        torch.where(one, upper, torch.inf),
    )
    return clean, torch.where(one, x, 0), torch.where(one, y, 0)


def _independent(program: Program, y: Tensor, strong: Tensor, dependent: Tensor) -> Tensor:
    """Return strong rows without those that the others imply: a basis of them with multipliers of the right signs.

    While rows depend on each other, multipliers move along that dependence until one of an inequality is zero, and
    that row is dropped (Caratheodory): the others determine the derivative on one side.
    """
    strong = strong.clone()
    for i in dependent.any(1).nonzero()[:, 0].tolist():
        rows = (strong[i] & dependent[i]).nonzero()[:, 0]
        if len(rows) > MANY:
            raise LimitError(
                f"{len(rows)} active rows depend on each other at sample {i}; degenerate='one_sided' and 'warn' choose "
                f"independent ones among at most {MANY}. Choose degenerate='least_norm', or drop redundant rows.",
                [i],
            )
        sample = torch.tensor([i], device=strong.device)
        C = compact(selected_rows(program.C[sample], rows))
        part, equality = y[i, rows].clone(), program.equality[i, rows]
        while len(rows):
            values, vectors = torch.linalg.eigh(C @ C.T)
            if float(values[0]) > RANK * float(values[-1]):
                break
            along = vectors[:, 0]
            loose = (along.abs() > PART) & ~equality
            if loose.any():
                ratio = torch.where(loose, part / torch.where(loose, along, 1), torch.inf)
                drop = int(ratio.abs().argmin())
                part = part - ratio[drop] * along
            else:
                drop = int(along.abs().argmax())
            keep = torch.arange(len(rows), device=rows.device) != drop
            strong[i, rows[drop]] = False
            rows, part, equality, C = rows[keep], part[keep], equality[keep], C[keep]
    return strong


class _Known(NamedTuple):
    """What is known of a state: its point, and the symmetric part of Q."""

    point: Point
    symmetric: Tensor | None
