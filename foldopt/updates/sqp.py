"""Sequential quadratic programming as an update step (paper eqs. 31 and 32)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from foldopt._compat import plain
from foldopt.batched import matvec
from foldopt.errors import InputError, SingularHessianError
from foldopt.qp._kkt import Spectral, probe
from foldopt.qp._operations import dense
from foldopt.qp._systems import System, solved
from foldopt.solvers.interior_point import largest
from foldopt.solvers.qp import QPSolution, solve_qp
from foldopt.updates._conditions import LONG, singular
from foldopt.updates._kept import Kept
from foldopt.updates._sqp_analysis import Known, analysed, clearly_regular, moving
from foldopt.updates.newton import Judge
from foldopt.updates.programs import SmoothProgram, SQPData, SQPProgram, SQPState
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, SINGULAR, Verdict, require_policy

__all__ = ["SQP"]

CURVED = 1e-8  # smallest change of the Hessian along w, relative to the Hessian, that counts


class SQP(nn.Module):
    """One step of sequential quadratic programming: ``SQP(program)((x, nu, lam), *params) -> (x, nu, lam)``.

    The step solves the quadratic model (eq. 31, with the factor 1/2 that the paper's 31a lacks) for a direction d and
    multipliers mu. It returns x + alpha d and lam + alpha (mu - lam), which corrects eq. 32c; nu moves like lam.
    The Hessian of the Lagrangian must be positive semidefinite on the null space of the active constraints.

    The quadratic program is differentiated through its KKT system on the active constraints. SQP is Newton's method
    near a KKT point with linearly independent active constraints. With alpha = 1 therefore Phi = 0, and the folded
    derivative is one solve with the KKT matrix.

    At some KKT points x may lack a derivative: a constraint is active with a multiplier of 0, active constraints depend
    on each other, or x is not unique. There the step is a Newton step on the strongly active constraints, and `judge`
    tells which cotangents have a derivative. If the Hessian of the Lagrangian is singular along the active constraints,
    Newton steps stay long although the KKT residual is small. The step leaves such a state as it is; it has no
    derivative.

    The state is x (B, n), the multipliers nu (B, p) of the equalities and lam (B, m) >= 0 of the inequalities. After a
    call ``last`` holds the solution of the quadratic model, a `foldopt.solvers.qp.QPSolution`.

    Args:
        program: the program, any object with the method ``sqp_data`` of an `SQPProgram`, such as a `SmoothProgram`.
        stepsize: alpha in (0, 1]; default 1, the full step.
        degenerate: policy of the layer for missing derivatives, one of `foldopt.verdicts.POLICIES`; default "raise".
            With "one_sided" and "warn", only independent ones among dependent active constraints carry multipliers;
            with the others, dependent constraints share them.
        nan: whether a cotangent of NaN also reaches parameters that enter inactive constraints only; default False.

    Raises:
        InputError: `program` has no method ``sqp_data``, `stepsize` is outside (0, 1], or `degenerate` is unknown.

    Source: paper, eqs. 31 and 32; Nocedal and Wright, Numerical Optimization (2006), chapter 18.

    Examples:
        Minimize |x - c|^2 / 2 subject to x_1 + x_2 = 4. The objective is quadratic, so that one step solves it:

        >>> def objective(x, c):
        ...     return (x - c).square().sum(1) / 2
        >>> def equality(x, c):
        ...     return x.sum(1, keepdim=True) - 4
        >>> step = foldopt.SQP(foldopt.SmoothProgram(objective, equality))
        >>> x, c = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[4.0, 2.0]], dtype=torch.float64)
        >>> x, nu, lam = step((x, x[:, :1], x[:, :0]), c)
        >>> x.round(decimals=6), nu.round(decimals=6)
        (tensor([[3., 1.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
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
        self._kept = WeakIdKeyDictionary()  # the analysis of a state, by its x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_kept": WeakIdKeyDictionary()}

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step.

        Args:
            state: x (B, n), nu (B, p) and lam (B, m).
            *params: parameters of the program.

        Returns:
            The new (x, nu, lam).
        """
        x, nu, lam = state
        data = SQPData(*self.program.sqp_data(x, nu, lam, *params))
        qp = _model_solution(data, lam)
        self.last = QPSolution(*(t.detach() for t in qp))
        a = self.stepsize
        moved = x + a * qp.x, nu + a * (qp.nu - nu), lam + a * (qp.lam - lam)
        # Only a derivative, or a state that moves, needs the analysis of the state.
        choice = torch.is_grad_enabled() or not all(map(_same, state, moved))
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
        """Solve v = Phi^T v + g, (B, N), with Phi = (1 - alpha) I, which holds wherever a derivative exists."""
        return g / self.stepsize

    def judge(self, state: SQPState, *params: Tensor) -> Judge | None:
        """Return the function that judges cotangents and tangents at this state; None if every derivative exists.

        At a KKT point the program has the same derivative as its quadratic model there, which is a QP. Active
        constraints that depend on each other get the verdict "dependent rows" in two cases: if a needed parameter
        enters these constraints, or if the derivative depends on the choice of their multipliers through curvature.
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
        """Return the analysis of a state as a KKT point; None if every sample is regular.

        The analysis is cached as long as the tensor x of the state exists.

        Args:
            state: x (B, n), nu (B, p) and lam (B, m).
            params: parameters of the program.
            data: the quadratic model at the state; default None: computed here.
            qp: the solution of that model; default None: computed here.
        """
        kept: Kept | None = self._kept.get(state[0])
        if kept is not None and kept.suits(*state, *params):
            return kept.found
        with torch.no_grad():
            if data is None or qp is None:
                data = SQPData(*self.program.sqp_data(*state, *params))
                qp = _model_solution(data, state[2])
            lost = self._lost(state, params, qp)
            unclear = (~clearly_regular(state[0], data, qp) & ~lost.any(1)).nonzero()[:, 0]
            known = analysed(unclear, state[0], data, qp, self.degenerate) if len(unclear) else None
            if lost.any():
                known = Known(unclear[:0], None, state[0][:0], lost) if known is None else known._replace(lost=lost)
        self.keep(known, state, params)
        return known

    def _lost(self, state: SQPState, params: Sequence[Tensor], qp: QPSolution) -> Tensor:
        """Return along which variables, (B, n) bool, the Hessian of the Lagrangian is singular at a KKT point.

        There the KKT conditions hold although the step `qp` is long: x is a solution, but has no derivative.
        """
        x = state[0]
        length = largest(qp.x) / (1 + largest(x))
        if not isinstance(self.program, SmoothProgram) or (length <= LONG).all():
            return torch.zeros_like(x, dtype=torch.bool)
        mostly = ~(qp.x.abs() < 0.1 * largest(qp.x)[:, None])
        return mostly & singular(self.program, state, length, tuple(params))[:, None]

    def keep(self, known: Known | None, state: SQPState, params: Sequence[Tensor]) -> None:
        """Cache the analysis of a state (None: all is regular) as long as the tensor x of the state exists."""
        self._kept[state[0]] = Kept.of(known, *state, *params)

    def _on_strong_rows(self, known: Known, state: SQPState, params: Sequence[Tensor], data: SQPData) -> SQPState:
        """Return the state of the known samples after a Newton step on the strongly active constraints.

        If active constraints depend on each other, their multipliers can be chosen. The value of the result belongs to
        the multipliers of the state, its derivative to those that the policy `degenerate` chooses.
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
        """Return for which known samples, (b,) bool, the derivative depends on dependent constraints' multipliers.

        The multipliers matter if they change the Hessian of the Lagrangian along the x part w of the adjoint solution.
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


def _same(old: Tensor, new: Tensor) -> bool:
    return bool((largest(new - old) <= 1e-9 * (1 + largest(old))).all())


def _model_solution(data: SQPData, lam: Tensor) -> QPSolution:
    guess = (lam > -data.g).detach()
    return solve_qp(data.hessian, data.gradient, data.jacobian_h, -data.h, data.jacobian_g, -data.g, guess)


def _newton(system: System, carrying: Tensor, data: SQPData, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step dx (b, n) and the new multipliers (b, p + m) of a Newton step on the rows in `carrying`."""
    gradient, H, h, Jh, g, Jg = (part.double() for part in data)
    C, c = torch.cat([Jh, Jg], 1), torch.cat([h, g], 1)
    carried = torch.where(carrying, y.double(), 0)
    r1, r2 = -(gradient + matvec(C.mT, carried)), torch.where(carrying, -c, 0)
    dx, dy = solved(system, (H + H.mT) / 2, C, r1, r2)
    return dx.to(x), torch.where(carrying, carried + dy, 0).to(x)
