"""Sequential quadratic programming as an update step (paper eqs. 31-32)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foldopt._compat import plain
from foldopt.batched import lu_factor, matvec
from foldopt.errors import InputError, SingularHessianError
from foldopt.qp._activity import activity, complemented
from foldopt.qp._kkt import Spectral, probe
from foldopt.qp._operations import dense
from foldopt.qp._program import Program, equilibrate, residual, sizes
from foldopt.qp._systems import System, solved
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, _kkt_matrix, solve_qp
from foldopt.updates._conditions import LONG, singular
from foldopt.updates._kept import Kept
from foldopt.updates.newton import Judge, Point
from foldopt.updates.programs import SmoothProgram, SQPData, SQPProgram, SQPState
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, SINGULAR, Verdict, require_policy

__all__ = ["SQP"]

NEAR = 1e-3  # a step of more than this, relative to x, does not start at a solution
CLEAR = 1e-3  # a slack or a multiplier of that relative size is one
SIMILAR = 1e3  # ratio of rows or of columns whose units need no look
GROWN = 1e6  # growth of a right-hand side in a matrix that is plainly regular
CURVED = 1e-8  # change of curvature along w, relative to that of the model, that counts as one


class SQP(nn.Module):
    """One SQP step on a program: ``SQP(program)((x, nu, lam), *params) -> (x, nu, lam)``.

    Solves the quadratic model (31), with the factor 1/2 that the paper's (31a) lacks, for (d, mu) and returns
    x + alpha d, lam + alpha (mu - lam) (eq. 32c as it must read). The inner QP is differentiated through its KKT
    system on the active set. At a KKT point with linearly independent active constraints and alpha = 1, Phi = 0: SQP
    is Newton's method there, so folding it is one KKT solve. Nocedal and Wright, Numerical Optimization, ch. 18.

    At a KKT point where x may lack a derivative (constraints without slack and without a multiplier, active ones that
    depend on each other, x not unique) the step is that of Newton on the strongly active constraints, and `judge` tells
    which cotangents have a derivative. Where the Hessian of the Lagrangian is singular along the active constraints a
    Newton step is long however small the KKT residual: such a state is a fixed point too, without a derivative.

    Args:
        program: any object with ``sqp_data`` (`SQPProgram`), such as a `SmoothProgram`.
        stepsize: alpha in (0, 1].
        degenerate: as for `foldopt.fold`; it decides here whether active constraints that depend on each other are
            reduced to independent ones ("one_sided", "warn") or share ("least_norm", as the others).
        nan: let a cotangent of NaN reach what enters inactive constraints only.

    State: x (B, n), nu (B, p) for the equalities, lam (B, m) for the inequalities. The model's Hessian has to be
    positive semidefinite on the active constraints. ``last`` holds the inner QP's solution with its per-sample ``ok``
    and ``singular``.
    """

    def __init__(
        self, program: SQPProgram, stepsize: float = 1.0, degenerate: str = "raise", nan: bool = False
    ) -> None:
        super().__init__()
        if not callable(getattr(program, "sqp_data", None)):
            raise InputError(
                f"program={program!r} has no method sqp_data; wrap its functions in foldopt.SmoothProgram."
            )
        if not 0 < stepsize <= 1:
            raise InputError(f"stepsize={stepsize}: SQP takes a step in (0, 1].")
        require_policy(degenerate)
        self.program, self.stepsize, self.degenerate, self.nan = program, stepsize, degenerate, nan
        self.last: QPSolution | None = None
        self._kept = WeakIdKeyDictionary()  # by the x of a state: what is known of it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_kept": WeakIdKeyDictionary()}

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step."""
        x, nu, lam = state
        data = SQPData(*self.program.sqp_data(x, nu, lam, *params))
        qp = _model_solution(data, lam)
        self.last = QPSolution(*(t.detach() for t in qp))
        a = self.stepsize
        moved = x + a * qp.x, nu + a * (qp.nu - nu), lam + a * (qp.lam - lam)
        choice = torch.is_grad_enabled() or not all(map(_same, state, moved))  # of multipliers, or of a derivative
        known = self.at(state, params, data, self.last) if choice and plain(*moved) else None
        if known is not None and known.point is not None:
            pieces = self._on_strong_rows(known, state, params, data)
            x, nu, lam = (new.index_put((known.samples,), piece) for piece, new in zip(pieces, moved, strict=True))
            moved = x, nu, lam
        if known is not None and known.lost.any():
            lost = known.lost.any(1, keepdim=True)
            x, nu, lam = (torch.where(lost, old.detach(), new) for old, new in zip(state, moved, strict=True))
            moved = x, nu, lam
        if self.nan:
            moved = moved[0] + 0 * sum(part.flatten(1).sum(1, keepdim=True) for part in data), *moved[1:]
        return moved

    def inverse(self, g: Tensor, transposed: bool, stepped: SQPState, state: SQPState, *params: Tensor) -> Tensor:
        """Return v = Phi^T v + g, (B, N), for Phi = (1 - alpha) I, which it is wherever a derivative exists."""
        return g / self.stepsize

    def judge(self, state: SQPState, *params: Tensor) -> Judge | None:
        """Return what judges cotangents and tangents at this state; None where every sample has every derivative.

        The derivative of a program at its KKT point is that of its quadratic model there, which is a QP. Active
        constraints that depend on each other are a verdict if the parameters of a needed gradient enter the functions
        they belong to, or if their curvature makes the derivative depend on the choice of multipliers.
        """
        known = self.at(state, params)
        if known is None:
            return None
        p, m, index, at = state[1].shape[1], state[2].shape[1], known.samples, known.point
        lost = known.lost.any(1)

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            blamed = lost & (g != 0).any(1)
            if blamed.any() and self.degenerate in ("warn", "one_sided", "least_norm"):
                raise SingularHessianError(
                    "the Hessian of the Lagrangian is singular along the active constraints, so that the solution has "
                    f"no derivative, on one side or another, at {int(blamed.sum())} of {len(blamed)} samples: choose "
                    "degenerate='nan'|'zero'.",
                    blamed.nonzero()[:, 0].tolist(),
                )
            part, verdict = examined(g, needed, forward)
            code = torch.where(blamed, SINGULAR, verdict.code)
            return part, replace(
                verdict, code=code, variables=torch.where(blamed[:, None], known.lost, verdict.variables)
            )

        def examined(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            code = g.new_full(g.shape[:1], DIFFERENTIABLE, dtype=torch.long)
            rows, variables = (g.new_zeros(len(g), size, dtype=torch.bool) for size in (p + m, known.lost.shape[1]))
            named = Verdict(
                code, rows, variables, lambda row: f"equalities[{row}]" if row < p else f"inequalities[{row - p}]"
            )
            if at is None:
                return g, named
            moved = moving(lambda *c: self.program.sqp_data(*(part.detach() for part in state), *c), params, needed)
            part, own = at.judged(g[index].to(known.y), moved, p, m, forward)
            curved = (own.code == DIFFERENTIABLE) & self._curved(known, state, params, part, forward)
            code[index], variables[index] = torch.where(curved, DEPENDENT, own.code), own.variables
            rows[index] = torch.where(curved[:, None], at.dependent, own.rows)
            return g.index_put((index,), part.to(g)), named

        return judged

    def at(
        self, state: SQPState, params: Sequence[Tensor], data: SQPData | None = None, qp: QPSolution | None = None
    ) -> Known | None:
        """Return what is known of a state as a KKT point; None if all is regular.

        data, qp: the quadratic model and its solution, if they are known. The answer is kept as long as x is.
        """
        kept: Kept | None = self._kept.get(state[0])
        if kept is not None and kept.suits(*state, *params):
            return kept.found
        with torch.no_grad():
            if data is None or qp is None:
                data = SQPData(*self.program.sqp_data(*state, *params))
                qp = _model_solution(data, state[2])
            lost = self._lost(state, params, qp)
            unclear = (~_clear(state[0], data, qp) & ~lost.any(1)).nonzero()[:, 0]
            known = _examined(unclear, state[0], data, qp, self.degenerate) if len(unclear) else None
            if lost.any():
                known = Known(unclear[:0], None, state[0][:0], lost) if known is None else known._replace(lost=lost)
        self.keep(known, state, params)
        return known

    def _lost(self, state: SQPState, params: Sequence[Tensor], qp: QPSolution) -> Tensor:
        """Return along which variables, (B, n) bool, the Hessian of the Lagrangian is singular at a KKT point.

        The KKT conditions hold there while the step qp is long: x is right, and has no derivative.
        """
        x = state[0]
        length = largest(qp.x) / (1 + largest(x))
        if not isinstance(self.program, SmoothProgram) or (length <= LONG).all():
            return torch.zeros_like(x, dtype=torch.bool)
        mostly = ~(qp.x.abs() < 0.1 * largest(qp.x)[:, None])
        return mostly & singular(self.program, state, length, tuple(params))[:, None]

    def keep(self, known: Known | None, state: SQPState, params: Sequence[Tensor]) -> None:
        """Keep what is known of a state (None: all is regular) as long as its x is."""
        self._kept[state[0]] = Kept.of(known, *state, *params)

    def _on_strong_rows(self, known: Known, state: SQPState, params: Sequence[Tensor], data: SQPData) -> SQPState:
        """Return the state of the known samples after a Newton step on the KKT conditions of their strong rows.

        Rows that depend on each other leave a choice of multipliers: the derivative is that at their own, on the rows
        that are to carry, and the value that at the state's.
        """
        index, at, y = known.samples, known.at, known.y
        n, p, a = state[0].shape[1], state[1].shape[1], self.stepsize
        given = torch.cat(state[1:], 1)
        x, own = state[0][index], given[index]
        with torch.no_grad():
            here = SQPData(*(part[index] for part in data))
            every: System = at.system if at.base is None else at.base
            held = at.strong if at.base is None else at.base.strong
            dx, target = _newton(every, held, here, x, own)
            value = torch.cat([x + a * dx, own + a * (target - own)], 1)
            _, chosen = _newton(at.system, at.strong, here, x, y)
        shifted = given.index_add(0, index, (chosen - own).detach())
        data = SQPData(*self.program.sqp_data(state[0], shifted[:, :p], shifted[:, p:], *params))
        here, own = SQPData(*(part[index] for part in data)), shifted[index]
        dx, target = _newton(at.system, at.strong, here, x, own)
        new = torch.cat([x + a * dx, own + a * (target - own)], 1)
        new = new + (value - new).detach()
        return new[:, :n], new[:, n : n + p], new[:, n + p :]

    def _curved(self, known: Known, state: SQPState, params: Sequence[Tensor], g: Tensor, forward: bool) -> Tensor:
        """Return at which of the known samples, (b,) bool, dependent rows' choice of multipliers enters the derivative.

        They enter by the curvature of their constraints, seen from the directions w that the adjoint solution has.
        """
        index, at, y = known.samples, known.at, known.y
        rows = at.dependent.any(1) & (g != 0).any(1)
        if at.base is None or not isinstance(at.base.kkt, Spectral) or not rows.any():
            return rows & False
        p, n, r = state[1].shape[1], state[0].shape[1], y.shape[1]
        d, e, c = at.units
        kkt, held = at.base.kkt, at.base.rows
        mixed = probe(kkt.K.shape[1], y)
        along = held.put(matvec(kkt.null_basis(), mixed.expand(len(g), -1))[:, n:], r) * e / c
        size = torch.linalg.vector_norm(along, dim=1, keepdim=True)
        along = along * (torch.linalg.vector_norm(y, dim=1, keepdim=True) / torch.where(size > 0, size, 1))
        x, multipliers = state[0].detach(), torch.cat(state[1:], 1).detach()
        both = (multipliers.index_put((index,), v.to(x)) for v in (y, y + along))
        one, two = (SQPData(*self.program.sqp_data(x, v[:, :p], v[:, p:], *params)).hessian[index].to(y) for v in both)
        difference = c[:, :, None] * d[:, :, None] * (two - one) * d[:, None, :]
        difference = (difference + difference.mT) / 2
        u = g * torch.cat([d, torch.where(at.strong, e / c, 0)], 1)
        if forward:
            u = torch.cat([mixed[:n].expand(len(g), n), torch.zeros_like(u[:, n:])], 1)
        rhs = torch.cat([u[:, :n], held.take(u[:, n:])], 1)
        w = (at.restrained.found(rhs) if at.restrained else kkt.solve(rhs))[:, :n]
        S = held.take_rows(dense(at.program.C))
        felt = matvec(difference, w)
        felt = felt - matvec(torch.linalg.pinv(S, rtol=1e-10), matvec(S, felt))
        scale = dense(at.program.H).abs().amax((1, 2)) + difference.abs().amax((1, 2))
        return rows & (largest(felt) > CURVED * scale * torch.maximum(largest(w), largest(u)))


def moving(
    model: Callable[..., SQPData | tuple[Tensor, ...]], params: Sequence[Tensor], needed: Sequence[bool]
) -> list[bool]:
    """Return which of Q, p, G, h, A, b, lower and upper of a model move with the parameters that are needed.

    model: of the params, its parts as of `SQPData`; of matrices, products with them will do. needed: which of the
    params, and of modules' weights after them, a derivative is asked for.
    """
    explicit, weights = needed[: len(params)], any(needed[len(params) :])
    with torch.enable_grad():
        leaves = [
            c.detach().requires_grad_(need and c.is_floating_point()) for c, need in zip(params, explicit, strict=True)
        ]
        data = SQPData(*model(*leaves))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]

        def reached(part: Tensor) -> list[Tensor]:
            if not wanted or not part.requires_grad or not part.numel():
                return []
            some = probe(part.numel(), part).view_as(part)
            found = torch.autograd.grad(part, wanted, some, retain_graph=True, allow_unused=True)
            return [one for one in found if one is not None]

        of_h, of_g = (bool(reached(part)) for part in (data.h, data.g))
        parts = data.hessian, data.jacobian_h, data.jacobian_g
        hessian, jacobian_h, jacobian_g = (any(bool(one.any()) for one in reached(part)) for part in parts)
        if weights:  # of modules, out of sight here
            of_h, of_g = of_h or data.h.requires_grad, of_g or data.g.requires_grad
            hessian, jacobian_h, jacobian_g = (
                known or part.requires_grad
                for known, part in zip((hessian, jacobian_h, jacobian_g), parts, strict=True)
            )
    return [hessian, True, jacobian_g, of_g, jacobian_h, of_h, False, False]


class Known(NamedTuple):
    """What is known of the samples that may lack a derivative.

    samples: (b,), those of which the active constraints may be the reason. point: theirs, None if there are none. y:
    (b, p + m), multipliers that go with it. lost: (B, n) bool, along which variables a sample's Hessian is singular.
    """

    samples: Tensor
    point: Point | None
    y: Tensor
    lost: Tensor

    @property
    def at(self) -> Point:
        """The point of the samples where there are some."""
        if self.point is None:
            raise ValueError("no sample was examined")
        return self.point


def _same(old: Tensor, new: Tensor) -> bool:
    return bool((largest(new - old) <= 1e-9 * (1 + largest(old))).all())


def _model_solution(data: SQPData, lam: Tensor) -> QPSolution:
    guess = (lam > -data.g).detach()
    return solve_qp(data.hessian, data.gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g, guess)


def _clear(x: Tensor, data: SQPData, qp: QPSolution) -> Tensor:
    """Return of which samples, (B,) bool, it is plain without equilibration that they are regular.

    That is so in a program whose rows and columns are of similar sizes if each inequality has a good slack or a good
    multiplier and the KKT matrix of the active ones lets no right-hand side grow much. Samples that are not solved
    count as regular.
    """
    gradient, H, _, Jh, g, Jg = data
    C = torch.cat([Jh, Jg], 1)
    entries = torch.cat([H, C], 1).abs()
    columns, of_rows = entries.amax(1), entries[:, x.shape[1] :].amax(2)
    similar = columns.amin(1) * SIMILAR > columns.amax(1)
    if C.shape[1]:
        similar &= of_rows.amin(1) * SIMILAR > of_rows.amax(1)
    rows, curvature = of_rows[:, Jh.shape[1] :], H.abs().amax((1, 2))
    force = torch.stack([largest(gradient), largest(matvec(H, x)), largest(qp.lam * rows)]).amax(0)
    size = largest(x) + force / curvature
    slack = -g > CLEAR * rows * size[:, None]
    carrying = qp.lam * rows > CLEAR * force[:, None]
    plainly = torch.where(qp.active, carrying & (g.abs() <= CLEAR * CLEAR * rows * size[:, None]), slack & ~carrying)
    K = _kkt_matrix(H, Jh, Jg, qp.active)
    lu, pivots, info = lu_factor(K)
    r = probe(K.shape[1], K).expand(len(K), -1)
    grown = largest(torch.linalg.lu_solve(lu, pivots, r[:, :, None])[:, :, 0]) * K.abs().amax((1, 2))
    regular = (info == 0) & ~qp.singular & (grown < GROWN)
    near = qp.ok & (largest(qp.x) <= NEAR * (1 + largest(x)))
    return ~near | (similar & regular & plainly.all(1))


def _examined(index: Tensor, x: Tensor, data: SQPData, qp: QPSolution, degenerate: str) -> Known | None:
    """Examine some samples' models at their own solutions, of which the error is about the square of the states'.

    Returns those that may lack a derivative, None if there are none.
    """
    eps = torch.finfo(x.dtype).eps
    x, step, nu, lam = (part[index].double() for part in (x, qp.x, qp.nu, qp.lam))
    gradient, H, h, Jh, g, Jg = (part[index].double() for part in data)
    H, C = (H + H.mT) / 2, torch.cat([Jh, Jg], 1)
    upper = matvec(C, x) - torch.cat([h, g], 1)
    lower = torch.cat([upper[:, : h.shape[1]], torch.full_like(g, -torch.inf)], 1)
    program = Program(H, gradient - matvec(H, x), C, lower, upper)
    at, y = x + step, torch.cat([nu, lam.clamp(min=0)], 1)
    units = equilibrate(program)
    scaled, to_y = units.scaled(program), units.e / units.c
    at_s, y_s = at / units.d, y / to_y
    length = largest(step / units.d) / sizes(scaled, at_s, y_s).x[:, 0]
    error = residual(scaled, at_s, y_s) + length.square() + (eps if eps > 1e-12 else 0)
    if activity(scaled, at_s, y_s, error).weak.any():
        y = complemented(scaled, at_s, y_s, error) * to_y
    point = Point.of(program, at, y, degenerate, units, error)
    nothing = torch.zeros_like(data.gradient, dtype=torch.bool)
    return Known(index, point, y, nothing) if point.degenerate.any() else None


def _newton(system: System, carrying: Tensor, data: SQPData, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a step dx and the multipliers after it, of Newton on the carrying rows."""
    gradient, H, h, Jh, g, Jg = (part.double() for part in data)
    C, c = torch.cat([Jh, Jg], 1), torch.cat([h, g], 1)
    carried = torch.where(carrying, y.double(), 0)
    r1, r2 = -(gradient + matvec(C.mT, carried)), torch.where(carrying, -c, 0)
    dx, dy = solved(system, (H + H.mT) / 2, C, r1, r2)
    return dx.to(x), torch.where(carrying, carried + dy, 0).to(x)
