"""The SQP step for large programs whose derivatives are sparse matrices (paper eqs. 31 and 32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt._sparsity import Model, SparseDerivatives, Sparsity
from foldopt.batched import matvec
from foldopt.errors import InputError
from foldopt.qp._activity import activity, complemented
from foldopt.qp._kkt import Factored, probe
from foldopt.qp._operations import numbers, rescaled
from foldopt.qp._program import Program, equilibrate, residual, sizes
from foldopt.qp._sparse_kkt import SparseKKT, packages
from foldopt.qp._systems import Equilibrated, solved
from foldopt.qp.matrix import SparseMatrix
from foldopt.solvers.interior_point import largest
from foldopt.updates._kept import Kept
from foldopt.updates._sqp_analysis import moving
from foldopt.updates.newton import Judge, Point
from foldopt.updates.programs import SmoothProgram, SQPData, SQPProgram, SQPState
from foldopt.updates.sqp import CURVED
from foldopt.verdicts import DEPENDENT, DIFFERENTIABLE, Verdict

__all__ = ["SparseSQP"]

RECENT = 2  # number of states whose factorizations are cached
TOUCHING = (
    1e-6  # largest slack, relative to the size of its row, of a constraint that counts as active in `multipliers`
)
NEGATIVE = 1e-9  # size, relative to the largest multiplier, from which a negative multiplier is not rounding


class SparseSQP(nn.Module):
    """One SQP step on a program whose derivatives are sparse: ``step((x, nu, lam), *params) -> (x, nu, lam)``.

    It is a Newton step on the KKT conditions R(z, c) = 0 of the constraints whose multiplier exceeds their slack, with
    one sparse KKT matrix K for each sample. K is recovered from a few products with the derivatives, see
    `foldopt.Sparsity`, and is a constant in the backward pass. The step z - K^-1 R(z, c) has the same fixed points for
    every regular K, and therefore the same derivatives of any order. With K = dR/dz, Phi = 0. Autograd records only R,
    so that memory is needed for a few vectors and the factors of K.

    `judge` tells which cotangents have a derivative, as in `foldopt.SQP`. It is cautious if active constraints depend
    on each other: if a change of their multipliers changes the Hessian along the adjoint solution, it claims no
    derivative, and "one_sided" acts as "least_norm".

    The state is x (B, n), the multipliers nu (B, p) of the equalities and lam (B, m) >= 0 of the inequalities. The step
    needs scipy and qdldl (extra "qp").

    Args:
        program: the program, a `SmoothProgram`.
        sparsity: the places where its derivatives may have entries; default None: detected at the first call.
        nan: whether a cotangent of NaN also reaches parameters that enter inactive constraints only; default False.

    Raises:
        InputError: `program` is not a `SmoothProgram`.
        MissingDependencyError: scipy or qdldl is not installed.

    Source: paper, eqs. 31 and 32; Nocedal and Wright, Numerical Optimization (2006), chapter 18.

    Examples:
        Minimize |x - c|^2 / 2 subject to x_1 + x_2 = 3. The objective is quadratic, so that one step solves it:

        >>> def objective(x, c):
        ...     return (x - c).square().sum(1) / 2
        >>> def equality(x, c):
        ...     return x.sum(1, keepdim=True) - 3
        >>> step = foldopt.updates.SparseSQP(foldopt.SmoothProgram(objective, equality))
        >>> x, c = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[3.0, 2.0]], dtype=torch.float64)
        >>> x, nu, lam = step((x, x[:, :1], x[:, :0]), c)
        >>> x.round(decimals=6), nu.round(decimals=6)
        (tensor([[2., 1.]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """

    def __init__(self, program: SQPProgram, sparsity: Sparsity | None = None, nan: bool = False) -> None:
        super().__init__()
        if not isinstance(program, SmoothProgram):
            raise InputError(f"program={program!r}: sparse derivatives are those of a foldopt.SmoothProgram.")
        packages()
        self.program: SmoothProgram = program
        self.derivatives, self.nan = SparseDerivatives(program, sparsity), nan
        self._kept: list[Kept] = []

    @property
    def sparsity(self) -> Sparsity | None:
        """The places where the derivatives may have entries; None before the first call if none were given."""
        return self.derivatives.sparsity

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": []}

    def forward(self, state: SQPState, *params: Tensor) -> SQPState:
        """Return the state after one step.

        Args:
            state: x (B, n), nu (B, p) and lam (B, m).
            *params: parameters of the program.

        Returns:
            The new (x, nu, lam).

        Raises:
            InputError: the given sparsity misses entries.
        """
        x, nu = state[:2]
        known = self.at(state, params)
        value = torch.cat([known.x, known.y], 1).to(x)
        if torch.is_grad_enabled():
            value = self._differentiable(known, state, params, value)
        n, p = x.shape[1], nu.shape[1]
        return value[:, :n], value[:, n : n + p], value[:, n + p :]

    def _differentiable(self, known: Known, state: SQPState, params: Sequence[Tensor], value: Tensor) -> Tensor:
        """Return `value` with the derivative of a Newton step on the strongly active constraints."""
        x, y = state[0], torch.cat(state[1:], 1)
        model, at = known.model, known.point
        strong, sound = at.strong.to(x.device), at.sound.to(x.device)[:, None]
        carried = torch.where(strong, y, 0)
        slope = torch.func.grad(lambda z: self.program.lagrangian(z, carried, *params).sum())(x)
        c = self.program.constraints(x, *params)
        r1, r2 = torch.where(sound, -slope, 0), torch.where(strong & sound, -c, 0)
        dx, dy = solved(at.system, model.H, model.C, r1.double().cpu(), r2.double().cpu())
        new = torch.cat([x + dx.to(x), carried + dy.to(x)], 1)
        if self.nan:
            parts = self.program.objective(x, *params)[:, None], c
            new = new + 0 * sum(part.nan_to_num(0, 0, 0).sum(1, keepdim=True) for part in parts)
        return new + (value - new).detach()

    def inverse(self, g: Tensor, transposed: bool, stepped: SQPState, state: SQPState, *params: Tensor) -> Tensor:
        """Solve v = Phi^T v + g; the solution is g because Phi = 0."""
        return g

    def weights(self, state: SQPState, *params: Tensor) -> Tensor:
        """Return the units in which the state and its errors are measured, (B, n + p + m)."""
        d, e, c = self.at(state, params).point.units
        return torch.cat([d, e / c], 1).to(state[0])

    def judge(self, state: SQPState, *params: Tensor) -> Judge | None:
        """Return the function that judges cotangents and tangents at this state; None if every derivative exists."""
        known = self.at(state, params)
        at = known.point
        if not at.degenerate.any():
            return None
        p, m = state[1].shape[1], state[2].shape[1]

        def judged(g: Tensor, needed: Sequence[bool], forward: bool) -> tuple[Tensor, Verdict]:
            moved = moving(lambda *c: self._products(state, c), params, needed)
            part, own = at.judged(g.double().cpu(), moved, p, m, forward)
            asked = (own.code == DIFFERENTIABLE) & at.degenerate & (g != 0).any(1).cpu()
            curved = asked & self._curved(known, state, params, part, forward) if asked.any() else asked
            device = g.device
            return part.to(g), Verdict(
                torch.where(curved, DEPENDENT, own.code).to(device),
                torch.where(curved[:, None], at.dependent, own.rows).to(device),
                own.variables.to(device),
                lambda row: f"equalities[{row}]" if row < p else f"inequalities[{row - p}]",
            )

        return judged

    def multipliers(self, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        """Return multipliers (nu, lam) that make the gradient of the Lagrangian at x (B, n) small in the 2-norm.

        They are the least-squares multipliers of the active constraints. Inequalities with a negative multiplier are
        dropped and the rest is solved again, until none is negative.
        """
        np, sparse, _ = packages()
        h, g = self.program.values(x, *params)[1:]
        model = self.model(x, torch.cat([h, g], 1) * 0, params)
        p, n = h.shape[1], x.shape[1]
        out = torch.zeros_like(model.c)
        for i, (c, gradient) in enumerate(zip(model.c.numpy(), model.gradient.numpy(), strict=True)):
            C = model.C.to_scipy(i)
            size = np.sqrt(np.asarray(C.multiply(C).sum(1)).ravel())
            inequality = np.arange(len(c)) >= p
            active = np.flatnonzero(~inequality | (c >= -TOUCHING * np.maximum(size, 1)))
            y = np.zeros(0)
            while len(active):
                unit = 1 / np.where(size[active] > 0, size[active], 1)
                system = SparseKKT(sparse.identity(n, format="csr"), sparse.diags(unit) @ C[active])
                y = system.solve(np.concatenate([-gradient, np.zeros(len(active))]))[0][n:]
                wrong = inequality[active] & (y < -NEGATIVE * np.abs(y).max())
                if not wrong.any():
                    y = np.where(inequality[active], np.maximum(y, 0), y) * unit
                    break
                active = active[~wrong]
            out[i, torch.from_numpy(active)] = torch.from_numpy(y[: len(active)])
        out = out.to(x)
        return out[:, :p], out[:, p:]

    def model(self, x: Tensor, y: Tensor, params: Sequence[Tensor]) -> Model:
        """Return the quadratic model.

        Args:
            x: the point, (B, n).
            y: the multipliers, (B, p + m).
            params: parameters of the program.

        Returns:
            The model, with sparse matrices, in float64 on the CPU.

        Raises:
            InputError: the given sparsity misses entries.
        """
        return self.derivatives.model(x, y, params)

    def at(self, state: SQPState, params: Sequence[Tensor]) -> Known:
        """Return the analysis of a state; those of the `RECENT` latest states are cached."""
        for kept in self._kept:
            if kept.suits(*state, *params):
                return kept.found
        with torch.no_grad():
            x, y = state[0].detach(), torch.cat(state[1:], 1).detach()
            known = _examined(self.model(x, y, params), x.double().cpu(), y.double().cpu(), state[1].shape[1])
        new = Kept.of(known, *state, *params)
        if new is not None:
            self._kept = [new, *self._kept[: RECENT - 1]]
        return known

    def _products(self, state: SQPState, params: Sequence[Tensor]) -> SQPData:
        """Return the quadratic model with products with its matrices in place of the matrices."""
        x, nu, lam = (part.detach() for part in state)
        y = torch.cat([nu, lam], 1)
        _, h, g = self.program.values(x, *params)
        p = nu.shape[1]

        def slope(z: Tensor, w: Tensor) -> Tensor:
            return torch.func.grad(lambda v: self.program.lagrangian(v, w, *params).sum())(z)

        along = probe(x.shape[1], x).expand_as(x)
        hessian = torch.func.vjp(lambda z: slope(z, y), x)[1](along)[0]
        mixed = probe(y.shape[1], y)
        of_h, of_g = (
            torch.func.vjp(lambda z: self.program.constraints(z, *params), x)[1](part.expand_as(y))[0]
            for part in (torch.where(torch.arange(len(mixed), device=y.device) < p, mixed, 0), mixed)
        )
        return SQPData(slope(x, 0 * y), hessian, h, of_h, g, of_g - of_h)

    def _curved(self, known: Known, state: SQPState, params: Sequence[Tensor], g: Tensor, forward: bool) -> Tensor:
        """Return for which samples, (B,) bool, the derivative may depend on the multipliers of dependent constraints.

        It may if these multipliers change the Hessian of the Lagrangian along the x part w of the adjoint solution.
        """
        at = known.point
        if at.base is None or not at.dependent.any():
            return at.degenerate & False
        n, r = known.x.shape[1], known.y.shape[1]
        d, e, c = at.units
        u = g * torch.cat([d, torch.where(at.strong, e / c, 0)], 1)
        if forward:
            u = torch.cat([probe(n, u).expand(len(u), n), torch.zeros_like(u[:, n:])], 1)
        rhs = torch.cat([u[:, :n], at.base.rows.take(u[:, n:])], 1)
        w = (at.restrained.found(rhs) if at.restrained else at.base.kkt.solve(rhs))[:, :n]
        x, y = state[0].detach(), torch.cat(state[1:], 1).detach()
        length = torch.where(known.y.any(1, keepdim=True), largest(known.y)[:, None], 1)
        curved = at.degenerate & False
        for along in at.base.kkt.null_vectors()[:, n:].unbind(2):
            along = at.base.rows.put(along, r) * e / c
            size = largest(along)[:, None]
            along = along * (length / torch.where(size > 0, size, 1))
            H, other = (self.model(x, v, params).H for v in (y, y + along.to(y)))
            if H.pattern is not other.pattern:
                return at.dependent.any(1)
            change = rescaled(SparseMatrix(H.pattern, c * (other.values - H.values)), d, d)
            scale = largest(numbers(at.program.H)) + largest(numbers(change))
            felt = largest(matvec(change, w))
            curved |= felt > CURVED * scale * torch.maximum(largest(w), largest(u))
        return curved & at.dependent.any(1)


class Known(NamedTuple):
    """The analysis of a state.

    Attributes:
        model: the quadratic model at the state.
        x: the point after a Newton step on the KKT conditions of the model, (B, n).
        y: the multipliers after that step, (B, p + m).
        point: which derivatives exist at (x, y).
    """

    model: Model
    x: Tensor
    y: Tensor
    point: Point


def _examined(model: Model, x: Tensor, y: Tensor, p: int) -> Known:
    """Take a Newton step from (x, y) and analyse its end, whose error is about the square of the error at (x, y)."""
    gradient, H, c, C = model
    upper = C.matvec(x) - c
    lower = torch.cat([upper[:, :p], torch.full_like(upper[:, p:], -torch.inf)], 1)
    program = Program(H, gradient - H.matvec(x), C, lower, upper)
    units = equilibrate(program)
    d, e, unit = units
    scaled, to_y = units.scaled(program), e / unit
    active = program.equality | (y / to_y > -e * c)
    base = Equilibrated(scaled, units, active)
    carried = torch.where(active, y, 0)
    dx, dy = base.solve(-(gradient + C.mT.matvec(carried)), torch.where(active, -c, 0))
    x, y = x + dx, torch.where(active, carried + dy, 0)
    x_s, y_s = x / d, y / to_y
    error = residual(scaled, x_s, y_s) + (largest(dx / d) / sizes(scaled, x_s, y_s).x[:, 0]).square()
    supported = y
    if activity(scaled, x_s, y_s, error).weak.any():
        supported = complemented(scaled, x_s, y_s, error) * to_y
    systems = [base.kkt.known(i) for i in range(len(x))] if isinstance(base.kkt, Factored) else None
    return Known(model, x, y, Point.of(program, x, supported, "least_norm", units, error, systems))
