"""The analysis of a solution of a quadratic program through its active rows, and the verdicts on its derivatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldopt.batched import matvec
from foldopt.errors import LimitError
from foldopt.qp._activity import Activity, activity, touched_somewhere
from foldopt.qp._kkt import Known, probe
from foldopt.qp._operations import compact, matmul, numbers, selected_rows, where_samples
from foldopt.qp._program import Program, Units, equilibrate, residual
from foldopt.qp._systems import Equilibrated, Mended, Restrained, Schur, System, restrained
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, KINK, NOT_UNIQUE, Verdict

__all__ = ["Point", "row_name"]

UNSOLVED = 1e-3  # relative KKT residual above which a state is not a solution
UNIQUE = 1e-8  # share of a cotangent, along directions in which x is free, that is treated as zero
MOVED = 1e-6  # movement of a weakly active row, relative to that of x, above which the row moves
RANK = 1e-13  # eigenvalue of CC', relative to the largest, below which rows depend on each other
MANY = 2_000  # the most dependent rows of which independent ones are chosen; more would take hours
PART = 1e-6  # entry of a unit null vector above which its row or variable takes part


class Point:
    """The analysis of a state through its active rows, in equilibrated units.

    Args:
        program: the program in these units.
        units: the units.
        active: the rows that are strongly active, weakly active, carrying a multiplier, and at their lower limit.
        system: the linear system of the strong rows, or of independent ones among them; derivatives are solved with it.
        sound: (B,) bool, samples that are finite and near a solution.
        degenerate: (B,) bool, samples that may lack a derivative.
        dependent: (B, r) bool, strong rows that depend on each other.
        base: the linear system of all strong rows; None, the default, if no sample is degenerate.
        seen: (B, r) bool, other rows that may hold x where it is not unique; default None.
        restrained: the linear system of all strong rows with the rows `seen`; default None.
        others: the pair (samples, their analysis) for samples that were analysed separately; default None.

    Examples:
        >>> step = foldopt.updates.newton.KKTNewton()
        >>> state = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        >>> Q, p, G, h = (torch.tensor(part, dtype=torch.float64) for part in ([[1.0]], [[-2.0]], [[1.0]], [1.0]))
        >>> point = step.at(state, (Q, p, G, h, Q.new_zeros(0, 1), Q.new_zeros(0), Q.new_zeros(0), Q.new_zeros(0)))
        >>> point.strong, point.degenerate
        (tensor([[True]]), tensor([False]))
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
        """Return the analysis of solutions known to be regular, except for `others`: (samples, analysis)."""
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
        """Analyse a state; in samples that are not finite or far from a solution the step does not move.

        Args:
            program: the program.
            x: (B, n).
            y: multipliers, (B, r).
            degenerate: one of `foldopt.verdicts.POLICIES`.
            units: units of the equilibrated program, if they are known.
            error: relative KKT residual, (B,), if it is known.
            known: sparse systems of the active rows, if they have been factored.

        Returns:
            The analysis.
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
        """Return a cotangent without its part along which the solution is not unique, and the verdict on it.

        Args:
            g: cotangent, (B, N).
            needed: which of Q, p, G, h, A, b, lower and upper a derivative is asked for.
            k: number of rows of A.
            m: number of rows of G.
            forward: whether g is a tangent; then a derivative in every direction is judged, by the point alone.

        Returns:
            The cotangent, (B, N), and the verdict.
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
        singular_part = base.kkt.null_part(torch.cat([u[:, :n], base.rows.take(u[:, n:])], 1))
        free_part = torch.cat([singular_part[:, :n], base.rows.put(singular_part[:, n:], r)], 1)
        free = torch.linalg.vector_norm(singular_part, dim=1) > UNIQUE * size[:, 0]
        u = torch.where(free[:, None], u - free_part, u)
        rhs = torch.cat([u[:, :n], base.rows.take(u[:, n:])], 1)
        w = self.restrained.found(rhs) if self.restrained else base.kkt.solve(rhs)
        multipliers, w = base.rows.put(w[:, n:], r), w[:, :n]
        candidates, basis = self.weak | seen, base.kkt.null_vectors()[:, :n]
        lengths = matvec(self.program.C.abs(), torch.ones_like(w))
        scale = torch.maximum(w.abs().amax(1, keepdim=True), 1e-6 * size) * lengths
        kinked = candidates & (matvec(self.program.C, w).abs() > MOVED * scale)
        if not forward:
            kinked |= self.weak & (g[:, n:] != 0)
        at = torch.arange(r, device=g.device)
        group = torch.where(at < k, 0, torch.where(at < k + m, 1, 2))
        of_A, of_G, of_lower, of_upper = any(needed[4:6]), any(needed[2:4]), needed[6], needed[7]
        either = self.program.equality & (of_lower or of_upper)
        of_bounds = either | torch.where(self.below, of_lower, of_upper)
        wanted = torch.where(group == 0, of_A, torch.where(group == 1, of_G, of_bounds))
        needs_multiplier = (multipliers.abs() > MOVED * size) | forward
        undetermined = self.program.equality & ~self.carrying & (group == 2) & needs_multiplier
        dependent = (self.dependent | undetermined) & wanted
        spread = torch.linalg.vector_norm(basis, dim=2) > PART
        not_unique = spread & any(needed[i] for i in (0, 2, 4))
        ambiguous = free | not_unique.any(1)
        for kind, mask in ((DEPENDENT, dependent.any(1)), (KINK, kinked.any(1)), (NOT_UNIQUE, ambiguous)):
            code = torch.where(asked & mask, kind, code)
        rows = torch.where((code == KINK)[:, None], kinked, dependent & (code == DEPENDENT)[:, None])
        variables = (code == NOT_UNIQUE)[:, None] & (not_unique | (singular_part[:, :n].abs() > PART * size))
        if not forward:
            g = torch.where((asked & free)[:, None], g - free_part / weights, g)
        return g, Verdict(code, rows, variables)


def row_name(row: int, k: int, m: int) -> str:
    """Return the name of a row of the program in error messages.

    Args:
        row: position among the rows of A, of G and of the bounds.
        k: number of rows of A.
        m: number of rows of G.

    Returns:
        "A[i]", "G[i]" or "bounds of x[i]".

    Examples:
        >>> foldopt.updates.newton.row_name(3, k=1, m=2)
        'bounds of x[0]'
    """
    if row < k:
        return f"A[{row}]"
    return f"G[{row - k}]" if row < k + m else f"bounds of x[{row - k - m}]"


def _without(program: Program, x: Tensor, y: Tensor, sound: Tensor) -> tuple[Program, Tensor, Tensor]:
    """Replace samples that are not sound by min 1/2 |x|^2 without rows, with its solution 0."""
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
    """Return the strong rows without those that the others imply: independent ones with multipliers of the right signs.

    While rows depend on each other, multipliers move along that dependence until that of an inequality is zero, and
    this row is dropped (Caratheodory). The remaining rows give the derivative on one side.
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
