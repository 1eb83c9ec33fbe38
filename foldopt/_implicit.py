"""The derivative of a fixed point, to any order: its adjoint and its tangent are fixed points again.

Let Phi = dU/dx and Psi = dU/dc at x* = U(x*, c), and J = dx*/dc. The vector-Jacobian product is g^T J = v^T Psi, where
v = Phi^T v + g (paper, eqs. 21-27, Lemma 2 and Theorem 1). The Jacobian-vector product t = J dc solves
t = Phi t + Psi dc. Both equations are fixed points of linear steps, so differentiating them again is the same
operation on these steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from foldopt._certificates import FoldInfo, apply_policy, masked, patched
from foldopt._compat import plain, transforming
from foldopt.errors import LinearSolveError
from foldopt.linear_solve import LinearSolveInfo, LinearSolver, Phi
from foldopt.linear_solve._base import Iterative, Product
from foldopt.linear_solve._dense import compared
from foldopt.step import Recorded, StepFunction, StepJVP, StepVJP, Tensors, flatten, record, unflatten
from foldopt.transforms import Opaque, Pullback, Pushforward, differentiable, looped, pulled_back, pushed_forward
from foldopt.verdicts import Judge, Verdict

__all__ = ["Adjoint", "FixedPoint", "Linear", "Solve", "Tangent", "fixed_point_jvp", "fixed_point_vjp"]

Solve = Callable[[Product, Tensor], tuple[Tensor, LinearSolveInfo]]


def fixed_point_vjp(
    recorded: Recorded, cotangent: Sequence[Tensor], solve: Solve | LinearSolver, wanted: Sequence[Tensor] | None = None
) -> tuple[list[Tensor | None], LinearSolveInfo]:
    """Return g^T J, the vector-Jacobian product of a fixed point with respect to its parameters, J = dx/dc.

    It solves v = Phi^T v + g with the given solver and returns Psi^T v.

    Args:
        recorded: one step recorded at the fixed point, by ``foldopt.step.record(step, x, c)``.
        cotangent: g, one tensor per part of the state and of its shape (B, ...).
        solve: linear solver, ``solve(vjp, g) -> (v, info)`` on flattened states (B, N), such as
            ``foldopt.linear_solve.GMRES()``.
        wanted: the parameters, out of ``recorded.params``, whose gradients are asked for; None, the default, for all.

    Returns:
        The pair (gradients, info): one gradient per wanted parameter, None for those that do not take part, and the
        report of the linear solver.

    Source: paper, eqs. 26 and 27.

    Examples:
        >>> x, c = torch.tensor([[2.0]]), torch.tensor([[4.0]], requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * (x[0] + c[0] / x[0]),), (x,), (c,))
        >>> gradients, info = foldopt.fixed_point_vjp(recorded, (torch.ones(1, 1),), foldopt.linear_solve.GMRES())
        >>> gradients
        [tensor([[0.2500]])]
    """
    step = StepVJP(recorded, recorded.params if wanted is None else wanted)
    v, info = solve(step, flatten(cotangent))  # v = Phi^T v + g
    return step.params(v), info  # v^T Psi


def fixed_point_jvp(
    recorded: Recorded, tangents: Sequence[Tensor | None], solve: Solve | LinearSolver
) -> tuple[Tensors, LinearSolveInfo]:
    """Return J dc, the Jacobian-vector product of a fixed point with respect to its parameters, J = dx/dc.

    It solves t = Phi t + Psi dc with the given solver.

    Args:
        recorded: one step recorded at the fixed point, by ``foldopt.step.record(step, x, c)``.
        tangents: dc, one tensor per parameter and of its shape; None for zero.
        solve: linear solver, ``solve(product, r) -> (t, info)`` on flattened states (B, N), such as
            ``foldopt.linear_solve.GMRES()``; here it is given products with Phi.

    Returns:
        The pair (t, info): the tangent, one tensor per part of the state, and the report of the linear solver.

    Examples:
        >>> x, c = torch.tensor([[2.0]]), torch.tensor([[4.0]], requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * (x[0] + c[0] / x[0]),), (x,), (c,))
        >>> tangent, info = foldopt.fixed_point_jvp(recorded, (torch.ones(1, 1),), foldopt.linear_solve.GMRES())
        >>> tangent
        (tensor([[0.2500]]),)
    """
    step = StepJVP(recorded)
    t, info = solve(step, step.params(tangents))
    return unflatten(t, recorded.state), info


class FixedPoint(Opaque):
    """A fixed point as a function of its parameters: ``point(*c)`` returns ``(*x, keep)`` with x = step(x, c).

    `keep`, (B,) bool, tells which samples have a derivative.

    Attributes:
        solver: linear solver of the derivative's equation.
        policy: the layer's `on_failure`.
        degenerate: the layer's policy for samples without derivative.
        recorded: the step's graph at the fixed point, if it was kept.
        certificate: result of the last call: a `FoldInfo`, or a `LinearSolveInfo` for fixed points of derivatives.
        can_judge: whether the step has a method ``judge``.
        has_jacobian: whether the step has a method ``jacobian``.
    """

    solver: LinearSolver
    policy: str
    degenerate: str
    recorded: Recorded | None = None
    certificate: Any = None
    can_judge: bool = False
    has_jacobian: bool = False
    check_undeclared: ClassVar[bool] = False
    step: StepFunction

    def judge(self, recorded: Recorded) -> Judge | None:
        """Return the function that judges cotangents at a recorded step, or None if there is nothing to judge."""
        return None

    def phi(self, recorded: Recorded) -> Phi:
        """Return Phi at a recorded step."""
        return Phi.assembled(StepVJP(recorded), flatten(recorded.state).detach())

    def vjp(
        self, cotangent: Tensors, inputs: Tensors, outputs: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pull a cotangent of the state back; to be differentiated again, the adjoint is folded in turn."""
        n, keep, recorded, c = len(outputs) - 1, outputs[-1], self.recorded, inputs
        adjoint = Adjoint(self, n, needed)
        try:
            if recorded is not None and not torch.is_grad_enabled() and plain(*cotangent[:n], *outputs, *c):
                wanted = [p for p, need in zip(recorded.params, needed, strict=True) if need]
                if all(p.requires_grad for p in wanted):
                    solve = partial(adjoint.solve, recorded, keep)
                    found = iter(fixed_point_vjp(recorded, cotangent[:n], solve, wanted)[0])
                    return [next(found) if need else None for need in needed]
            x = patched(outputs[:n], keep)
            v = differentiable(adjoint, *cotangent[:n], *x, keep, *c)[:n]
            return pulled_back(_Flat(self.step, n), v, (*x, *c), (*[False] * n, *needed))[n:]
        finally:
            self.report(adjoint)

    def jvp(self, tangents: Sequence[Tensor | None], inputs: Tensors, outputs: Tensors) -> tuple[Tensor | None, ...]:
        """Push tangents of the parameters forward; to be differentiated again, the tangent is folded in turn."""
        n, keep, c = len(outputs) - 1, outputs[-1], inputs
        x = patched(outputs[:n], keep)
        moved = torch.stack([(p[:0] if t is None else t).ne(0).any() for t, p in zip(tangents, c, strict=True)])
        tensors = (*(t for t in tangents if t is not None), *x, *c)
        again = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        tangent = Tangent(self, n)
        try:
            if not again and not transforming(*tensors):
                tangent.asked = moved.tolist()
                moving = [t is not None and p.is_floating_point() for p, t in zip(c, tangents, strict=True)]
                leaves = tuple(p.detach().requires_grad_(moves) for p, moves in zip(c, moving, strict=True))
                recorded = record(self.step, x, leaves, self.check_undeclared)
                found, _ = fixed_point_jvp(recorded, tangents, partial(tangent.solve, recorded, keep))
                return *found, None
            r = pushed_forward(_Flat(self.step, n), (*[None] * n, *tangents), (*x, *c))
            return *differentiable(tangent, *r, *x, keep, *c, moved)[:n], None
        finally:
            self.report(tangent)

    def mapped(self, size: int, in_dims: Sequence[int | None], inputs: Tensors) -> tuple[Tensors, tuple[int, ...]]:
        """Find the fixed points of `size` samples one by one, each by a copy, and join their certificates."""
        copies = [self.copy() for _ in range(size)]
        result = looped(copies, in_dims, inputs)
        self.adopt(copies)
        return result

    def copy(self) -> Self:
        """Return a copy for a separate call."""
        other = copy.copy(self)
        other.recorded = other.certificate = None
        return other

    def adopt(self, copies: Sequence[Self]) -> None:
        """Take over the certificates of copies, joined."""
        self.certificate = type(copies[0].certificate).joined([one.certificate for one in copies])

    def report(self, derivative: Linear) -> None:
        """Store the linear solver's report on a derivative, and the verdict on it, in the certificate."""
        if isinstance(self.certificate, FoldInfo):
            self.certificate.backward, self.certificate.derivative = derivative.certificate, derivative.verdict


@dataclass(frozen=True)
class _Flat(Opaque):
    """A step as a function of one flat list of tensors, the state first."""

    step: StepFunction
    n_state: int

    def __call__(self, *tensors: Tensor) -> Tensors:
        return self.step(tensors[: self.n_state], tensors[self.n_state :])


class Linear(FixedPoint):
    """The linear equation of a derivative as a fixed point; its parameters are a right-hand side, x*, keep and c.

    Attributes:
        point: the fixed point that is differentiated.
        n: number of parts of its state.
        asked: which of the parameters the derivative is asked for.
        verdict: the verdict on the derivative, after a call.
    """

    equation: ClassVar[str]
    forward_mode: ClassVar[bool]

    def __init__(self, point: FixedPoint, n: int, asked: Sequence[bool] = ()) -> None:
        self.point, self.n, self.asked = point, n, asked
        self.solver, self.policy, self.degenerate = point.solver, point.policy, point.degenerate
        self.has_jacobian = point.has_jacobian
        self.verdict: Verdict | None = None

    @property
    def step(self) -> StepFunction:  # type: ignore[override]
        """The linear step; as an attribute it would form a cycle that keeps the recorded graph alive."""
        return self._linear_step

    def _linear_step(self, y: Tensors, params: Tensors) -> Tensors:
        """Return the right-hand side plus Phi^T y or Phi y."""
        r, x, _, c = self.split(params)
        moved = self.opaque_product(_Flat(self.point.step, self.n), tuple(range(self.n)))(*y, *x, *c)
        return tuple(ri + m for ri, m in zip(r, moved, strict=True))

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Return the right-hand side, x*, keep and c."""
        n = self.n
        return params[:n], params[n : 2 * n], params[2 * n], params[2 * n + 1 :]

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return the product with Phi^T or Phi as a function of (y, x, c)."""
        raise NotImplementedError

    def phi(self, recorded: Recorded) -> Phi:
        """Return the matrix of this equation; a closed form reuses what the differentiated point has factored."""
        if not self.point.has_jacobian:
            return super().phi(recorded)
        _, x, _, c = self.split(recorded.params)
        return self.oriented(self.point.phi(self.recorded_at(x, c)))

    def recorded_at(self, x: Tensors, c: Tensors) -> Recorded:
        """Return the recorded step of the fixed point that is differentiated."""
        return self.point.recorded or record(self.point.step, x, c, self.point.check_undeclared)

    def oriented(self, phi: Phi) -> Phi:
        """Return the matrix of this equation, given the Phi of the differentiated point."""
        raise NotImplementedError

    def __call__(self, *params: Tensor) -> Tensors:
        """Return the solution and which samples have one."""
        r, x, keep, c = self.split(params)
        recorded = self.recorded_at(x, c)
        y, _ = self.solve(recorded, keep, self.plain_product(recorded), flatten(r))
        return *unflatten(y, recorded.state), self.keep.clone()

    def plain_product(self, recorded: Recorded) -> Product:
        """Return the product with Phi^T or Phi at a recorded step, for plain tensors."""
        raise NotImplementedError

    def solve(self, recorded: Recorded, keep: Tensor, product: Product, r: Tensor) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the equation for the samples in `keep`, and apply the policies to samples that lack a derivative.

        Args:
            recorded: the recorded step of the differentiated point.
            keep: (B,) bool, the samples to solve for.
            product: the product with Phi^T or Phi.
            r: right-hand side, (B, N).

        Returns:
            The solution (B, N) and the report of the linear solver; both it and the verdict are also stored.
        """
        point, every = self.point, bool(keep.all())
        r = r if every else torch.where(keep[:, None], r, 0)
        if point.can_judge:
            r, self.verdict = self._judged(recorded, r)
            self.verdict.enforce(self.degenerate)
        phi = None
        if not isinstance(self.solver, Iterative):
            phi = point.phi(recorded).transposed() if self.forward_mode else point.phi(recorded)
        y, info = self.solver(product, r, phi)
        self.certificate = info = compared(info, phi, y, product.answer) if point.has_jacobian else info
        self.keep = keep
        if not (every and info.ok.all()):
            y = self._judge_solution(y, info)
        if self.verdict is not None and self.degenerate in ("nan", "zero") and not self.verdict.ok.all():
            y, self.keep = masked((y,), self.verdict.ok, self.degenerate)[0], self.keep & self.verdict.ok
        return y, info

    def _judged(self, recorded: Recorded, r: Tensor) -> tuple[Tensor, Verdict]:
        """Return the part of the right-hand side that has a derivative, and the verdict."""
        judge = self.point.judge(recorded)
        if judge is not None:
            return judge(r, self.asked, self.forward_mode)
        none = torch.zeros(len(r), 0, dtype=torch.bool, device=r.device)
        return r, Verdict(torch.zeros(len(r), dtype=torch.long, device=r.device), none, none)

    def _judge_solution(self, y: Tensor, info: LinearSolveInfo) -> Tensor:
        """Apply the policy to the samples that were not solved, and to those that were not to be kept."""
        if not info.ok.all():
            products = int(info.iterations.max()) if len(info.iterations) else 0
            apply_policy(
                self.policy,
                LinearSolveError,
                ~info.ok,
                info.residual,
                f"linear solver {info.method!r} did not solve the {self.equation} (relative residual "
                f"{{worst:.1e}} after {products} products)",
                info.remedy
                or "Phi may have a spectral radius of 1 or more (lfpi) or I - Phi be singular; use linear_solver="
                "'auto', check the step at that sample, or choose on_failure='nan'|'zero'",
            )
        if self.policy == "warn":
            return y
        self.keep = self.keep & info.ok
        return masked((y,), self.keep, self.policy)[0]

    def adopt(self, copies: Sequence[Self]) -> None:
        """Take over the certificates and verdicts of copies, joined."""
        super().adopt(copies)
        verdicts = [one.verdict for one in copies if one.verdict is not None]
        self.verdict = Verdict.joined(verdicts) if len(verdicts) == len(copies) else None


class Adjoint(Linear):
    """The adjoint equation v = Phi^T v + g."""

    equation = "adjoint equation v = Phi^T v + g"
    forward_mode = False

    def oriented(self, phi: Phi) -> Phi:
        """Return Phi^T."""
        return phi.transposed()

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return (v, x, c) -> Phi^T v."""
        return Pullback(function, self.n, state)

    def plain_product(self, recorded: Recorded) -> Product:
        """Return v -> Phi^T v."""
        return StepVJP(recorded)


class Tangent(Linear):
    """The tangent equation t = Phi t + Psi dc; its last parameter tells which of the parameters c move, bool."""

    equation = "tangent equation t = Phi t + Psi dc"
    forward_mode = True

    def oriented(self, phi: Phi) -> Phi:
        """Return Phi."""
        return phi

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Return the right-hand side, x*, keep and c."""
        return super().split(params[:-1])

    def __call__(self, *params: Tensor) -> Tensors:
        """Return the solution and which samples have one."""
        self.asked = params[-1].tolist()
        return super().__call__(*params)

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return (t, x, c) -> Phi t."""
        return Pushforward(function, state)

    def plain_product(self, recorded: Recorded) -> Product:
        """Return t -> Phi t."""
        return StepJVP(recorded)
