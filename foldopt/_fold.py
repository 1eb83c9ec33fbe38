"""Fixed-point folding, and its baselines unfolding and unrolling: one layer, differentiated in three ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo, patched
from foldopt._implicit import FixedPoint, Judge
from foldopt._layer import FixedPointLayer, LayerCall
from foldopt._unrolled import Unrolled
from foldopt.linear_solve import LinearSolver, Phi
from foldopt.linear_solve import linear_solver as resolve
from foldopt.step import Recorded, State, StepFunction, StepVJP, Tensors, flatten, record
from foldopt.transforms import Undeclared, differentiable
from foldopt.verdicts import require_policy


class Implicit:
    """Differentiate the solution implicitly, through one update step (paper section 5): what `fold` does.

    linear_solver, degenerate: see `fold`.
    """

    def __init__(self, linear_solver: str | LinearSolver = "auto", degenerate: str = "raise") -> None:
        require_policy(degenerate)
        self.linear_solver, self.degenerate = resolve(linear_solver), degenerate

    def __call__(self, call: LayerCall) -> tuple[Tensors, FoldInfo]:
        """Return the solution and its certificates."""
        layer, update = call.layer, call.layer.update
        recording = torch.is_grad_enabled() and any(p.requires_grad for p in call.tensors)
        point = CallPoint(
            self.linear_solver,
            layer.on_failure,
            self.degenerate,
            call,
            partial(call.run, update),
            recording,
            can_judge=hasattr(update, "judge"),
            has_jacobian=hasattr(update, "jacobian"),
            has_inverse=hasattr(update, "inverse"),
        )
        *state, _ = differentiable(point, *call.tensors)
        return tuple(state), cast(FoldInfo, point.certificate)


@dataclass(eq=False)
class CallPoint(FixedPoint):
    """The solution of one call of a layer, a fixed point: solves, records a step there and certifies."""

    solver: LinearSolver
    policy: str
    degenerate: str
    call: LayerCall
    step: StepFunction
    recording: bool
    can_judge: bool = False
    has_jacobian: bool = False
    has_inverse: bool = False
    kept_phi: Phi | None = None
    check_undeclared: ClassVar[bool] = True

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the state and the samples to differentiate."""
        with Undeclared() if self.call.transformed else contextlib.nullcontext():
            state = self.call.solve(tensors)
            if self.recording:
                self.recorded = record(self.step, state, tensors)
                stepped = self.recorded.outputs
            else:
                stepped = self.step(state, tensors)
            self.certificate = info = self.call.layer.certify(state, stepped)
            keep = torch.ones_like(info.solved) if self.policy == "warn" else info.solved.clone()
            if self.recorded and not keep.all():
                self.recorded = record(self.step, patched(state, keep), tensors)
        return *(part.clone() for part in state), keep

    def phi(self, recorded: Recorded) -> Phi:
        """Return Phi at a recorded step; that of the step of this call is kept, for it may be asked for again."""
        if recorded is self.recorded and self.kept_phi is not None:
            return self.kept_phi
        inverse = None
        if self.has_inverse:
            stepped = tuple(out.detach() for out in recorded.outputs)
            inverse = self._closed_form("inverse", recorded, stepped[0] if self.call.single else stepped)
        if self.has_jacobian:
            phi = Phi(self._closed_form("jacobian", recorded), inverse=inverse)
        else:
            phi = Phi.assembled(StepVJP(recorded), flatten(recorded.state).detach(), inverse)
        if inverse is not None:
            units = hasattr(self.call.layer.update, "weights")
            phi.weights = self._closed_form("weights", recorded)() if units else None
        if recorded is self.recorded:
            self.kept_phi = phi
        return phi

    def copy(self) -> CallPoint:
        """Return another one, to be called by itself."""
        other = super().copy()
        other.kept_phi = None
        return other

    def judge(self, recorded: Recorded) -> Judge | None:
        """Return the update's own judge of cotangents at this point."""
        return self._closed_form("judge", recorded)()

    def _closed_form(self, name: str, recorded: Recorded, *more: Any) -> Callable[..., Any]:
        """Return the update's method of this name at the recorded state."""
        method = getattr(self.call.layer.update, name)
        state = recorded.state[0] if self.call.single else recorded.state
        params = recorded.params[: self.call.n_params]

        def closed_form(*args: Any) -> Any:  # kept by this call, so it must not hold it: that would be a cycle
            with torch.no_grad():
                return method(*args, *more, state, *params)

        return closed_form


class FoldOptions(TypedDict, total=False):
    """What ready layers hand on to `fold`."""

    linear_solver: str | LinearSolver
    tol: float | None
    on_failure: str
    degenerate: str
    dtype: torch.dtype | None
    modules: Iterable[nn.Module]


def fold(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    on_failure: str = "raise",
    degenerate: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """Turn a black-box solver and one update step into a differentiable layer (fixed-point folding, paper section 5).

    Args:
        solve: ``solve(*params) -> state``, run without gradients. Any code: a closed form, Gurobi, a nonconvex solver.
        update: ``update(state, *params) -> state``, differentiable PyTorch code, one step of any iteration that
            `solve`'s solution is a fixed point of. The samples of a batch must not interact. If it has a method
            ``jacobian(state, *params)`` returning Phi, a dense tensor (B, N, N) or a sparse one, (B, N, N) or (N, N)
            for all samples, of any layout (factored by SuperLU; needs scipy, extra "qp"), or a method ``inverse(g,
            transposed, stepped, state, *params)``, `stepped` the state after the step, returning the v = Phi^T v + g,
            or v = Phi v + g if `transposed`, of shape (B, N), or None where it has none, that closed form is used; the
            answer is certified by the step itself.
        linear_solver: "auto", "direct", "least_squares", "gmres", "bicgstab", "anderson", "lfpi", or an instance with
            settings of its own from `foldopt.linear_solve`, such as ``WarmStart(GMRES(tol=1e-6))``.
        tol: largest accepted ||U(x*, c) - x*|| / (1 + ||x*||) per sample; default 1e-6 in float64, else 1e-3.
        on_failure: what happens to samples whose solution the step does not fix, or whose adjoint equation was not
            solved: "raise" an error, "warn" and use what there is, or make their gradient "nan" or "zero".
        degenerate: what happens to samples that are solved but whose solution has no derivative for the incoming
            gradient, where `update` can tell (it has a method ``judge``, as those of `QPLayer` and `NLPLayer`): "raise"
            an error, "warn" of it and go on as "one_sided", take the derivative of "one_sided" of the pieces that meet
            there or that of "least_norm", or make the gradient "nan" or "zero". See `foldopt.verdicts`.
        dtype: compute in this dtype and answer in that of the first floating parameter; default: no casting.
        modules: further modules whose parameters `update` uses out of sight (found by themselves: `update` if it is
            a module, and modules it closes over or names).

    Returns:
        A module, ``layer(*params) -> state``. `state` is a tensor (B, ...) or a tuple of such; params are tensors,
        batched or shared by the batch. Gradients reach every parameter that requires them, and modules used by
        `update`, to any order, forward and reverse, and under torch.func, of which vmap loops over its samples.
        ``layer.last`` holds per-sample certificates (`FoldInfo`).

    Raises:
        InputError, FixedPointError, LinearSolveError, UndeclaredParameterError: see `foldopt.errors`.

    Example:
        >>> layer = fold(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x))  # Heron's step fixes the square root
        >>> c = torch.tensor([[4.0]], dtype=torch.float64, requires_grad=True)
        >>> layer(c).sum().backward()
        >>> c.grad
        tensor([[0.2500]], dtype=torch.float64)
    """
    derivative = Implicit(linear_solver, degenerate)
    return FixedPointLayer(solve, update, derivative, tol=tol, on_failure=on_failure, dtype=dtype, modules=modules)


def unroll(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    iterations: int,
    tol: float | None = None,
    on_failure: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """Unroll: run `iterations` steps from the starting point ``solve(*params)`` on the graph.

    Same arguments and checks as `foldopt.fold`; time and memory of the backward grow with `iterations`. A sample that
    still moves by more than `tol` in the last step has not converged and falls under `on_failure`; with "nan" or "zero"
    a sample whose step is not finite keeps its last finite state.
    """
    derivative = Unrolled(iterations, from_solution=False)
    return FixedPointLayer(solve, update, derivative, tol=tol, on_failure=on_failure, dtype=dtype, modules=modules)


def unfold(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    iterations: int,
    tol: float | None = None,
    on_failure: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """Fixed-point unfolding: start at the solution ``solve(*params)`` and record `iterations` steps there.

    By Theorem 1 its backward pass is LFPI on v = Phi^T v + g. Same arguments and checks as `foldopt.fold`. Samples that
    the steps carry away from the solution by more than `tol` fall under `on_failure`. After a backward pass
    ``layer.last.backward`` has the last term that it added, relative to g, as its residual; where that is 1 or more the
    pass diverges, which "raise" and "warn" say, but "nan" and "zero" only mark as not ok.
    """
    derivative = Unrolled(iterations, from_solution=True)
    return FixedPointLayer(solve, update, derivative, tol=tol, on_failure=on_failure, dtype=dtype, modules=modules)
