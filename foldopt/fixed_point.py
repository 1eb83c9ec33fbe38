"""The derivative of a fixed point, to any order: the adjoint and the tangent of x* = U(x*, c) are fixed points again.

With Phi = dU/dx and Psi = dU/dc at x*, the vector-Jacobian product of c -> x* is g^T J = v^T Psi where v = Phi^T v + g
(paper eqs. 21-27, Lemma 2 and Theorem 1), and the Jacobian-vector product t solves t = Phi t + Psi dc.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from foldopt.errors import LinearSolveError, SolverError
from foldopt.linear_solve import LinearSolveInfo, LinearSolver, Phi
from foldopt.linear_solve.dense import compared
from foldopt.step import Recorded, StateVJP, StepFunction, Tensors, flatten, record, state_jvp, unflatten, vjp_of
from foldopt.transforms import (
    Pullback,
    Pushforward,
    looped,
    opaque,
    outer_tangents,
    plain,
    pulled_back,
    pushed_forward,
    through_autograds_vmap,
    transformed,
)
from foldopt.verdicts import Verdict

POLICIES = ("raise", "warn", "nan", "zero")
Judge = Callable[[Tensor, Sequence[bool], bool], tuple[Tensor, Verdict]]


def fixed_point_vjp(
    recorded: Recorded,
    cotangent: Tensors,
    solver: LinearSolver,
    phi: Phi | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensors, LinearSolveInfo]:
    """Solve v = Phi^T v + g (eq. 26): the cotangent v that, pulled back through one step, is the layer's (eq. 27).

    recorded: one step recorded at the fixed point. cotangent: g, shaped like the state, each part (B, ...).
    solver: a linear solver. phi: Phi as a matrix, if it is known or to be kept for further calls.
    keep: (B,) bool, samples to solve for; the others get v = 0.
    Returns v, shaped like the state, and the solver's per-sample certificate.
    """
    v, info, _ = _adjoint_solve(recorded, cotangent, solver, phi, keep, ())
    return v, info


def _adjoint_solve(
    recorded: Recorded,
    cotangent: Tensors,
    solver: LinearSolver,
    phi: Phi | None,
    keep: Tensor | None,
    leaves: Sequence[Tensor],
) -> tuple[Tensors, LinearSolveInfo, list[Tensor | None] | None]:
    """Return what `fixed_point_vjp` does, and what `leaves` get of v where the certificate of v gave that too."""
    g = flatten(cotangent)
    if keep is not None:
        g = torch.where(keep[:, None], g, torch.zeros_like(g))
    vjp = StateVJP(recorded, leaves)
    v, info = solver(vjp, g, phi)
    info = compared(info, phi, v, vjp.last)
    return unflatten(v, recorded.state), info, vjp.kept(v)


@dataclass
class FoldInfo:
    """Per-sample certificates of a layer's last call; all tensors have shape (B,).

    residual: ||U(x*, c) - x*|| / (1 + ||x*||) at the state the solver returned (`QPLayer`: the worst relative violation
    of the KKT conditions). ok: residual within tolerance. causes: why a sample is not, in a word each ("solved" where
    it is), from solvers that know. backward: what the linear solver did in the last backward pass (None before it ran).
    derivative: the verdict on its cotangent, from steps that can tell.
    """

    residual: Tensor
    ok: Tensor
    causes: tuple[str, ...] | None = None
    backward: LinearSolveInfo | None = None
    derivative: Verdict | None = None

    @property
    def status(self) -> tuple[str, ...]:
        """What became of each sample: "solved", or the cause why it was not."""
        if self.causes is not None:
            return self.causes
        return tuple("solved" if ok else "step and solution disagree" for ok in self.ok.tolist())

    @property
    def verdict(self) -> tuple[str, ...] | None:
        """The verdict on the last backward pass in words, one per sample, or None before it.

        "not solved", or one of `foldopt.verdicts.NAMES`.
        """
        if self.derivative is None:
            return None
        names, ok = self.derivative.names, self.ok.tolist()
        if len(names) != len(ok):  # of several cotangents at once, as under vmap
            return names
        return tuple(name if good else "not solved" for name, good in zip(names, ok, strict=True))

    @classmethod
    def joined(cls, parts: Sequence[FoldInfo]) -> FoldInfo:
        """Return the certificates of several calls in a row."""
        causes = None if parts[0].causes is None else tuple(c for p in parts for c in p.causes or ())
        return cls(torch.cat([p.residual for p in parts]), torch.cat([p.ok for p in parts]), causes)


@dataclass
class FixedPoint:
    """What is differentiated by folding; calling it with the params finds the fixed point.

    step: of which it is the fixed point. solver, policy, degenerate: see `foldopt.fold`. recorded: the step's graph
    there, if kept. certificate: what the last call found.
    """

    solver: LinearSolver
    policy: str
    degenerate: str = "raise"
    step: StepFunction = None  # type: ignore[assignment]  # until it is called
    recorded: Recorded | None = None
    certificate: Any = None  # FoldInfo, or LinearSolveInfo of a derivative
    _phi: Phi | None = None
    users: ClassVar[bool] = False
    can_judge: bool = False
    has_jacobian: bool = False

    def __call__(self, *params: Tensor) -> Tensors:
        """Return the parts of the state, then residuals (B,) and which samples have a derivative, (B,) bool."""
        raise NotImplementedError

    def jacobian(self, recorded: Recorded) -> Callable[[], Tensor] | None:
        """Return a function that returns Phi in closed form, or None if there is no closed form."""
        return None

    def inverse(self, recorded: Recorded) -> Callable[[Tensor, bool], Tensor | None] | None:
        """Return the solution of the adjoint and tangent equations in closed form (see `Phi`), or None."""
        return None

    def weights(self, recorded: Recorded) -> Tensor | None:
        """Return the units of the state, (B, N), or None for all 1."""
        return None

    def judge(self, recorded: Recorded) -> Judge | None:
        """Return what tells which cotangents have a derivative at a recorded step; None if all have, or none knows."""
        return None

    def phi(self, recorded: Recorded) -> Phi:
        """Return Phi at a recorded step; that of the step of this call is kept, for it may be asked for again."""
        if recorded is self.recorded and self._phi is not None:
            return self._phi
        closed_form, inverse = self.jacobian(recorded), self.inverse(recorded)
        phi = (
            Phi(closed_form, inverse=inverse)
            if closed_form
            else Phi.assembled(StateVJP(recorded), flatten(recorded.state).detach(), inverse)
        )
        if inverse is not None:
            phi.weights = self.weights(recorded)
        if recorded is self.recorded:
            self._phi = phi
        return phi

    def copy(self) -> Self:
        """Return another one, to be called by itself."""
        other = copy.copy(self)
        other.recorded = other.certificate = other._phi = None
        return other

    def adopt(self, copies: Sequence[Self]) -> None:
        """Take over what copies of it found."""
        self.step = copies[0].step
        parts = [one.certificate for one in copies]
        kind: Any = type(parts[0])
        self.certificate = kind.joined(parts)

    def report(self, backward: LinearSolveInfo | None, derivative: Verdict | None) -> None:
        """Take note of what the linear solver did for a derivative, and of the verdict on it."""
        if isinstance(self.certificate, FoldInfo):
            self.certificate.backward, self.certificate.derivative = backward, derivative


def fixed_point(point: FixedPoint, *params: Tensor) -> Tensors:
    """Call `point` on plain tensors; its state is a function of `params` for every transform of PyTorch."""
    return through_autograds_vmap(
        params, lambda *p: _Fold.apply(point, *p), lambda size, dims, p: _mapped(point, size, dims, p)
    )


def _mapped(
    point: FixedPoint, size: int, in_dims: Sequence[int | None], params: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    copies = [point.copy() for _ in range(size)]
    unused = iter(copies)
    result = looped(size, in_dims, params, lambda *sample: fixed_point(next(unused), *sample))
    point.adopt(copies)
    return result


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(point: FixedPoint, *params: Tensor) -> Tensors:
        return point(*params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.point, *params = inputs
        ctx.n_state = len(output) - 2
        ctx.mark_non_differentiable(*output[-2:])
        kept = (*output[: ctx.n_state], output[-1], *params)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        point, n, needed = ctx.point, ctx.n_state, ctx.needs_input_grad[1:]
        x, keep, c = _split(ctx.saved_tensors, n)
        recorded = None if torch.is_grad_enabled() else point.recorded
        leaves = [] if recorded is None else [p for p, need in zip(recorded.params, needed, strict=True) if need]
        adjoint = _Adjoint(point, n, needed, leaves)
        v = _solved(adjoint, (*cotangent[:n], *x, keep, *c))
        if recorded is None or not all(leaf.requires_grad for leaf in leaves):
            return (None, *pulled_back(_Flat(point.step, n), n, (*[False] * n, *needed), v, (*x, *c))[n:])
        kept: Sequence[Tensor | None] | None = adjoint.kept
        if kept is None:
            kept = opaque(_Pull(recorded, leaves), *v) if transformed(*v) else vjp_of(recorded, leaves, v)
        pulled = iter(kept)
        return (None, *[next(pulled) if need else None for need in needed])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        point, n = ctx.point, ctx.n_state
        with outer_tangents(ctx.saved_tensors) as saved:
            x, keep, c = _split(saved, n)
            r = pushed_forward(_Flat(point.step, n), (*[None] * n, *tangents), (*x, *c))
            moved = torch.stack([(p[:0] if t is None else t).ne(0).any() for t, p in zip(tangents, c, strict=True)])
            return (*_solved(_Tangent(point, n), (*r, *x, keep, *c, moved)), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], point: FixedPoint, *params: Tensor) -> tuple[Tensors, Any]:
        return _mapped(point, info.batch_size, in_dims[1:], params)


_Fold.forward.__signature__ = inspect.signature(_Fold.forward)  # type: ignore[attr-defined]  # asked for in each call


def _split(saved: Tensors, n: int) -> tuple[Tensors, Tensor, Tensors]:
    return patched(saved[:n], saved[n]), saved[n], saved[n + 1 :]


@dataclass(frozen=True)
class _Flat:
    """A step as a function of all its tensors in a row."""

    step: StepFunction
    n_state: int

    def __call__(self, *tensors: Tensor) -> Tensors:
        return self.step(tensors[: self.n_state], tensors[self.n_state :])


@dataclass(frozen=True)
class _Pull:
    """The vjp of a recorded step with respect to `leaves`, zero where one takes no part."""

    recorded: Recorded
    leaves: list[Tensor]

    def __call__(self, *v: Tensor) -> Tensors:
        pulled = vjp_of(self.recorded, self.leaves, v)
        return tuple(torch.zeros_like(leaf) if p is None else p for leaf, p in zip(self.leaves, pulled, strict=True))


class _Linear(FixedPoint):
    """The linear fixed point of a derivative; its params are a right-hand side, x*, the samples to keep, and c."""

    equation: ClassVar[str]
    forward_mode: ClassVar[bool]

    def __init__(self, of: FixedPoint, n: int, asked: Sequence[bool] = (), leaves: Sequence[Tensor] = ()) -> None:
        super().__init__(of.solver, of.policy, of.degenerate, has_jacobian=of.has_jacobian)
        self.of, self.n, self.asked, self.leaves = of, n, asked, leaves
        self.derivative: Verdict | None = None
        self.kept: list[Tensor | None] | None = None  # what the leaves get of the answer, where that is known

    def adopt(self, copies: Sequence[Self]) -> None:
        """Take over what copies of it found."""
        super().adopt(copies)
        verdicts = [one.derivative for one in copies if one.derivative is not None]
        self.derivative = Verdict.joined(verdicts) if len(verdicts) == len(copies) else None

    @property
    def step(self) -> StepFunction:
        """The linear step; kept as an attribute it would be a cycle that holds the recorded graph."""
        return self.linear_step

    @step.setter
    def step(self, _: StepFunction | None) -> None:
        """Do nothing: it follows from the point whose derivative this is."""

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        """Return the right-hand side, x*, the samples to keep and c."""
        n = self.n
        return params[:n], params[n : 2 * n], params[2 * n], params[2 * n + 1 :]

    def linear_step(self, y: Tensors, params: Tensors) -> Tensors:
        """Return the right-hand side plus Phi^T y or Phi y."""
        r, x, _, c = self.split(params)
        moved = self.product(_Flat(self.of.step, self.n), tuple(range(self.n)))(*y, *x, *c)
        return tuple(ri + m for ri, m in zip(r, moved, strict=True))

    def phi(self, recorded: Recorded) -> Phi:
        """Return the Phi of the equation; where there is a closed form, that with what has been factored already."""
        if not self.of.has_jacobian:
            return super().phi(recorded)
        _, x, _, c = self.split(recorded.params)
        return self.turned(self.of.phi(self.of.recorded or record(self.of.step, x, c, self.of.users)))

    def turned(self, phi: Phi) -> Phi:
        """Return the Phi of the equation, given that of the point."""
        raise NotImplementedError

    def product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        """Return the function of (y, x, c) that is linear in y."""
        raise NotImplementedError

    def solve(self, recorded: Recorded, r: Tensors, keep: Tensor | None) -> tuple[Tensors, LinearSolveInfo]:
        """Solve the equation for the samples to keep."""
        raise NotImplementedError

    def __call__(self, *params: Tensor) -> Tensors:
        """Solve the equation and apply the policy to the samples that have no trustworthy derivative."""
        r, x, keep, c = self.split(params)
        recorded = self.of.recorded or record(self.of.step, x, c, self.of.users)
        every = bool(keep.all())
        r, verdict = self.judged(recorded, r, None if every else keep)
        y, info = self.solve(recorded, r, None if every else keep)
        self.certificate = info
        solved = bool(info.ok.all())
        if not solved:
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
        if self.policy != "warn" and not (every and solved):
            keep = keep & info.ok
            y = masked(y, keep, self.policy)
            self.kept = None
        if verdict is not None and self.degenerate in ("nan", "zero") and not verdict.ok.all():
            y = masked(y, verdict.ok, self.degenerate)
            keep = keep & verdict.ok
            self.kept = None
        return (*y, info.residual, keep.clone())

    def judged(self, recorded: Recorded, r: Tensors, keep: Tensor | None) -> tuple[Tensors, Verdict | None]:
        """Judge a right-hand side and apply the policy; return the part of it that has a derivative."""
        judge = self.of.judge(recorded)
        if judge is None:
            code = torch.zeros(len(r[0]), dtype=torch.long, device=r[0].device)
            none = torch.zeros(len(code), 0, dtype=torch.bool, device=code.device)
            self.derivative = Verdict(code, none, none) if self.of.can_judge else None
            return r, None
        g = flatten(r) if keep is None else torch.where(keep[:, None], flatten(r), 0)
        g, verdict = judge(g, self.asked, self.forward_mode)
        self.derivative = verdict
        verdict.enforce(self.degenerate)
        return unflatten(g, recorded.state), verdict


class _Adjoint(_Linear):
    equation = "adjoint equation v = Phi^T v + g"
    forward_mode = False

    def turned(self, phi: Phi) -> Phi:
        return phi.transposed()

    def product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        return Pullback(function, self.n, state)

    def solve(self, recorded: Recorded, r: Tensors, keep: Tensor | None) -> tuple[Tensors, LinearSolveInfo]:
        phi = self.of.phi(recorded)
        v, info, self.kept = _adjoint_solve(recorded, r, self.solver, phi, keep, self.leaves)
        return v, info


class _Tangent(_Linear):
    """Its last param says which of c move, (number of c,) bool."""

    equation = "tangent equation t = Phi t + Psi dc"
    forward_mode = True

    def turned(self, phi: Phi) -> Phi:
        return phi

    def split(self, params: Tensors) -> tuple[Tensors, Tensors, Tensor, Tensors]:
        return super().split(params[:-1])

    def __call__(self, *params: Tensor) -> Tensors:
        self.asked = params[-1].tolist()
        return super().__call__(*params)

    def product(self, function: Callable[..., Tensors], state: tuple[int, ...]) -> Callable[..., Tensors]:
        return Pushforward(function, state)

    def solve(self, recorded: Recorded, r: Tensors, keep: Tensor | None) -> tuple[Tensors, LinearSolveInfo]:
        g = flatten(r) if keep is None else torch.where(keep[:, None], flatten(r), 0)
        jvp, phi = state_jvp(recorded), self.of.phi(recorded).transposed()
        t, info = self.solver(jvp, g, phi)
        return unflatten(t, recorded.state), compared(info, phi, t, jvp)


def _solved(linear: _Linear, params: Tensors) -> Tensors:
    alone = not torch.is_grad_enabled() and plain(*params)
    try:
        return (linear(*params) if alone else fixed_point(linear, *params))[: linear.n]
    finally:
        linear.of.report(linear.certificate, linear.derivative)


def patched(state: Tensors, ok: Tensor) -> Tensors:
    """Replace failed samples by a sound one (zeros if there is none), so that NaN cannot leak into the others."""
    if not transformed() and bool(ok.all()):
        return state
    if not len(ok):
        return state
    source = ok.to(torch.uint8).argmax()[None]
    filler = [torch.where(ok.any(), part.index_select(0, source), 0) for part in state]
    return tuple(
        torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part, fill in zip(state, filler, strict=True)
    )


def apply_policy(policy: str, error: type[SolverError], bad: Tensor, residual: Tensor, what: str, remedy: str) -> None:
    """Raise or warn about the samples in `bad`; the policies "nan" and "zero" act on the gradient instead."""
    if policy in ("nan", "zero"):
        return
    indices = bad.nonzero()[:, 0].tolist()
    worst = indices[int(residual[bad].nan_to_num(nan=torch.inf).argmax())]
    message = (
        f"{what.format(worst=float(residual[worst]))} at {len(indices)} of {len(bad)} samples, worst at index {worst}, "
        f"first {indices[:10]}. {remedy}."
    )
    if policy == "raise":
        raise error(message, indices)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def masked(parts: Tensors, ok: Tensor, policy: str) -> Tensors:
    """Set the failed samples of a gradient to what the policy "nan" or "zero" says."""
    fill = torch.nan if policy == "nan" else 0.0
    return tuple(torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part in parts)
