"""The derivative of a fixed point, to any order: its adjoint and its tangent are fixed points again.

With Phi = dU/dx and Psi = dU/dc at x* = U(x*, c), the vector-Jacobian product of c -> x* is g^T J = v^T Psi where
v = Phi^T v + g (paper eqs. 21-27, Lemma 2 and Theorem 1), and the Jacobian-vector product t solves t = Phi t + Psi dc.
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
from foldopt.verdicts import Verdict

Judge = Callable[[Tensor, Sequence[bool], bool], tuple[Tensor, Verdict]]
Solve = Callable[[Product, Tensor], tuple[Tensor, LinearSolveInfo]]


def fixed_point_vjp(
    recorded: Recorded, cotangent: Sequence[Tensor], solve: Solve | LinearSolver, wanted: Sequence[Tensor] | None = None
) -> tuple[list[Tensor | None], LinearSolveInfo]:
    """Return g^T J for J = dx*/dc, the vector-Jacobian product of the fixed point (paper eqs. 26 and 27).

    recorded: one step recorded at the fixed point, ``foldopt.step.record(step, x, c)``. cotangent: g, shaped like the
    state, each part (B, ...). solve: a linear solver, ``solve(vjp, g) -> (v, info)`` on flattened states, (B, N).
    wanted: those of ``recorded.params`` to pull back to; None: all.
    Returns one gradient per wanted parameter, None for those that take no part, and the solver's info.
    """
    step = StepVJP(recorded, recorded.params if wanted is None else wanted)
    v, info = solve(step, flatten(cotangent))  # v = Phi^T v + g
    return step.params(v), info  # v^T Psi


def fixed_point_jvp(
    recorded: Recorded, tangents: Sequence[Tensor | None], solve: Solve | LinearSolver
) -> tuple[Tensors, LinearSolveInfo]:
    """Return J dc for J = dx*/dc, the Jacobian-vector product of the fixed point.

    recorded, solve: as for `fixed_point_vjp`; the solver is given products with Phi instead of Phi^T. tangents: dc, one
    per parameter, None for zero.
    Returns the tangent t = Phi t + Psi dc, shaped like the state, and the solver's info.
    """
    step = StepJVP(recorded)
    t, info = solve(step, step.params(tangents))
    return unflatten(t, recorded.state), info


class FixedPoint(Opaque):
    """A fixed point as a function of its parameters: ``point(*c) -> (*x, keep)``, x* = step(x*, c).

    keep: (B,) bool, the samples that have a derivative. solver, policy, degenerate: as `linear_solver`, `on_failure`
    and `degenerate` of `foldopt.fold`. recorded: the step's graph there, if kept. certificate: what the last call
    found, a `FoldInfo`, or a `LinearSolveInfo` of the fixed points of derivatives.
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
        """Return what tells which cotangents have a derivative at a recorded step; None if all have, or none knows."""
        return None

    def phi(self, recorded: Recorded) -> Phi:
        """Return Phi at a recorded step."""
        return Phi.assembled(StepVJP(recorded), flatten(recorded.state).detach())

    def vjp(
        self, cotangent: Tensors, inputs: Tensors, outputs: Tensors, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Pull a cotangent of the state back; where that is differentiated again, the adjoint is folded once more."""
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
        """Push tangents of the parameters forward; where that is differentiated again, this is folded once more."""
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
        """Find the fixed points of `size` samples one by one, each by a copy, and gather the certificates."""
        copies = [self.copy() for _ in range(size)]
        result = looped(copies, in_dims, inputs)
        self.adopt(copies)
        return result

    def copy(self) -> Self:
        """Return another one, to be called by itself."""
        other = copy.copy(self)
        other.recorded = other.certificate = None
        return other

    def adopt(self, copies: Sequence[Self]) -> None:
        """Take over the certificates of copies."""
        self.certificate = type(copies[0].certificate).joined([one.certificate for one in copies])

    def report(self, derivative: Linear) -> None:
        """Take note of what the linear solver did for a derivative, and of the verdict on it."""
        if isinstance(self.certificate, FoldInfo):
            self.certificate.backward, self.certificate.derivative = derivative.certificate, derivative.verdict


@dataclass(frozen=True)
class _Flat(Opaque):
    """A step as a function of all its tensors in a row."""

    step: StepFunction
    n_state: int

    def __call__(self, *tensors: Tensor) -> Tensors:
        return self.step(tensors[: self.n_state], tensors[self.n_state :])


class Linear(FixedPoint):
    """The linear equation of a derivative as a fixed point; its params are a right-hand side, x*, keep and c.

    of: the point whose derivative it is. n: the number of parts of the state. asked: the parameters that the derivative
    is about.
    """

    equation: ClassVar[str]
    forward_mode: ClassVar[bool]

    def __init__(self, of: FixedPoint, n: int, asked: Sequence[bool] = ()) -> None:
        self.of, self.n, self.asked = of, n, asked
        self.solver, self.policy, self.degenerate = of.solver, of.policy, of.degenerate
        self.has_jacobian = of.has_jacobian
        self.verdict: Verdict | None = None

    @property
    def step(self) -> StepFunction:  # type: ignore[override]
        """The linear step; kept as an attribute it would be a cycle that holds the recorded graph."""
        return self._linear_step

    def _linear_step(self, y: Tensors, params: Tensors) -> Tensors:
        """Return the right-hand side plus Phi^T y or Phi y."""
        r, x, _, c = self.split(params)
        moved = self.opaque_product(_Flat(self.of.step, self.n), tuple(range(self.n)))(*y, *x, *c)
        return tuple(ri + m for ri, m in zip(r, moved, strict=True))

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Return the right-hand side, x*, the samples to keep and c."""
        n = self.n
        return params[:n], params[n : 2 * n], params[2 * n], params[2 * n + 1 :]

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return the function of (y, x, c) that is linear in y."""
        raise NotImplementedError

    def phi(self, recorded: Recorded) -> Phi:
        """Return the Phi of the equation; where there is a closed form, that with what has been factored already."""
        if not self.of.has_jacobian:
            return super().phi(recorded)
        _, x, _, c = self.split(recorded.params)
        return self.turned(self.of.phi(self.recorded_at(x, c)))

    def recorded_at(self, x: Tensors, c: Tensors) -> Recorded:
        """Return the step of which this is the derivative, recorded."""
        return self.of.recorded or record(self.of.step, x, c, self.of.check_undeclared)

    def turned(self, phi: Phi) -> Phi:
        """Return the Phi of the equation, given that of the point."""
        raise NotImplementedError

    def __call__(self, *params: Tensor) -> Tensors:
        """Return the solution and the samples that have one."""
        r, x, keep, c = self.split(params)
        recorded = self.recorded_at(x, c)
        y, _ = self.solve(recorded, keep, self.plain_product(recorded), flatten(r))
        return *unflatten(y, recorded.state), self.keep.clone()

    def plain_product(self, recorded: Recorded) -> Product:
        """Return the product with Phi^T or Phi."""
        raise NotImplementedError

    def solve(self, recorded: Recorded, keep: Tensor, product: Product, r: Tensor) -> tuple[Tensor, LinearSolveInfo]:
        """Solve the equation for the samples to keep; apply the policies to those without a trustworthy derivative.

        r: the right-hand side, (B, N). Returns the solution and the linear solver's info; notes both and the verdict.
        """
        of, every = self.of, bool(keep.all())
        r = r if every else torch.where(keep[:, None], r, 0)
        if of.can_judge:
            r, self.verdict = self._judged(recorded, r)
            self.verdict.enforce(self.degenerate)
        phi = None
        if not isinstance(self.solver, Iterative):
            phi = of.phi(recorded).transposed() if self.forward_mode else of.phi(recorded)
        y, info = self.solver(product, r, phi)
        self.certificate = info = compared(info, phi, y, product.answer) if of.has_jacobian else info
        self.keep = keep
        if not (every and info.ok.all()):
            y = self._judge_solution(y, info)
        if self.verdict is not None and self.degenerate in ("nan", "zero") and not self.verdict.ok.all():
            y, self.keep = masked((y,), self.verdict.ok, self.degenerate)[0], self.keep & self.verdict.ok
        return y, info

    def _judged(self, recorded: Recorded, r: Tensor) -> tuple[Tensor, Verdict]:
        """Return the part of a right-hand side that has a derivative, and the verdict on it."""
        judge = self.of.judge(recorded)
        if judge is not None:
            return judge(r, self.asked, self.forward_mode)
        none = torch.zeros(len(r), 0, dtype=torch.bool, device=r.device)
        return r, Verdict(torch.zeros(len(r), dtype=torch.long, device=r.device), none, none)

    def _judge_solution(self, y: Tensor, info: LinearSolveInfo) -> Tensor:
        """Apply the policy to the samples that are not to be kept or not solved."""
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
        """Take over the certificates and verdicts of copies."""
        super().adopt(copies)
        verdicts = [one.verdict for one in copies if one.verdict is not None]
        self.verdict = Verdict.joined(verdicts) if len(verdicts) == len(copies) else None


class Adjoint(Linear):
    """v = Phi^T v + g."""

    equation = "adjoint equation v = Phi^T v + g"
    forward_mode = False

    def turned(self, phi: Phi) -> Phi:
        """Return Phi^T."""
        return phi.transposed()

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return (v, x, c) -> Phi^T v."""
        return Pullback(function, self.n, state)

    def plain_product(self, recorded: Recorded) -> Product:
        """Return v -> Phi^T v."""
        return StepVJP(recorded)


class Tangent(Linear):
    """t = Phi t + Psi dc; its last param says which of c move, (number of c,) bool."""

    equation = "tangent equation t = Phi t + Psi dc"
    forward_mode = True

    def turned(self, phi: Phi) -> Phi:
        """Return Phi."""
        return phi

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Return the right-hand side, x*, the samples to keep and c."""
        return super().split(params[:-1])

    def __call__(self, *params: Tensor) -> Tensors:
        """Return the solution and the samples that have one."""
        self.asked = params[-1].tolist()
        return super().__call__(*params)

    def opaque_product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return (t, x, c) -> Phi t."""
        return Pushforward(function, state)

    def plain_product(self, recorded: Recorded) -> Product:
        """Return t -> Phi t."""
        return StepJVP(recorded)
