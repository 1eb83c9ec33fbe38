"""Fixed-point folding, and its baselines unrolling and unfolding: one layer, differentiated in three ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo, patched
from foldopt._implicit import FixedPoint
from foldopt._layer import FixedPointLayer, LayerCall
from foldopt._unrolled import Unrolled
from foldopt.linear_solve import LinearSolver, Phi
from foldopt.linear_solve import linear_solver as resolve
from foldopt.step import Recorded, State, StepFunction, StepVJP, Tensors, flatten, record
from foldopt.transforms import Undeclared, differentiable
from foldopt.verdicts import Judge, require_policy

__all__ = ["CallPoint", "Implicit", "fold", "unfold", "unroll"]


class Implicit:
    """Differentiate the solution implicitly, through one update step at the fixed point, as `foldopt.fold` does.

    Args:
        linear_solver: solver of the backward equation: a name or an instance, as in `foldopt.fold`; default "auto".
        degenerate: policy for samples whose solution has no derivative, as in `foldopt.fold`; default "raise".

    Raises:
        InputError: a name is unknown.

    Source: paper, section 5.

    Examples:
        >>> derivative = foldopt.Implicit("direct")
        >>> layer = foldopt.FixedPointLayer(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x), derivative)
        >>> layer(torch.tensor([[4.0]]))
        tensor([[2.]])
    """

    def __init__(self, linear_solver: str | LinearSolver = "auto", degenerate: str = "raise") -> None:
        require_policy(degenerate)
        self.linear_solver, self.degenerate = resolve(linear_solver), degenerate

    def __call__(self, call: LayerCall) -> tuple[Tensors, FoldInfo]:
        """Return the solution of a layer's call and its certificates."""
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
    """The solution of one call of a layer as a fixed point: it solves, records one step there and certifies it."""

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
        """Return the parts of the state, and which samples to differentiate."""
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
        """Return Phi at a recorded step; that of this call's own step is kept, because it may be needed again."""
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
        """Return a copy for a separate call."""
        other = super().copy()
        other.kept_phi = None
        return other

    def judge(self, recorded: Recorded) -> Judge | None:
        """Return the function with which the update judges cotangents at this point."""
        return self._closed_form("judge", recorded)()

    def _closed_form(self, name: str, recorded: Recorded, *more: Any) -> Callable[..., Any]:
        """Return the update's method of this name, bound to the recorded state and parameters."""
        method = getattr(self.call.layer.update, name)
        state = recorded.state[0] if self.call.single else recorded.state
        params = recorded.params[: self.call.n_params]

        # This object keeps the function below, so the function must not refer to it: that would be a cycle.
        def closed_form(*args: Any) -> Any:
            with torch.no_grad():
                return method(*args, *more, state, *params)

        return closed_form


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
    """Turn a black-box solver and one update step into a differentiable layer: fixed-point folding.

    The solver returns a solution x of the parameters c, and the step U has it as a fixed point, x = U(x, c). Let
    Phi = dU/dx and Psi = dU/dc there, and let g be the gradient of the loss with respect to x. Then the gradient with
    respect to c is v^T Psi, where v solves the backward equation v = Phi^T v + g. Only one step is recorded, however
    many iterations the solver took.

    Args:
        solve: ``solve(*params) -> state``, run without gradients: a closed form, Gurobi, any code.
        update: ``update(state, *params) -> state``, differentiable PyTorch code: one step of any iteration of which the
            solver's solution is a fixed point. The samples of a batch must not interact. Two optional methods give
            closed forms, which the layer checks against the step itself. ``jacobian(state, *params)`` returns Phi as a
            dense tensor (B, N, N), or as a sparse one, (B, N, N) or (N, N) for all samples, in any layout (sparse ones
            need scipy, extra "qp"). ``inverse(g, transposed, stepped, state, *params)`` returns v, (B, N), with v =
            Phi^T v + g, or v = Phi v + g if `transposed`, or None; `stepped` is the state after the step.
        linear_solver: solver of the backward equation: "auto", "direct", "least_squares", "gmres", "bicgstab",
            "anderson", "lfpi", or an instance from `foldopt.linear_solve`, such as ``GMRES(tol=1e-6)``; default "auto".
        tol: largest accepted relative residual ``||U(x, c) - x|| / (1 + ||x||)`` of a sample; default 1e-6 in float64,
            otherwise 1e-3.
        on_failure: policy for samples whose solution the step does not fix, or whose backward equation was not solved:
            "raise" an error (the default), "warn" and go on, or make their gradient "nan" or "zero".
        degenerate: policy for samples whose solution has no derivative for the incoming gradient, where the update can
            tell (it has a method ``judge``, as the steps of `QPLayer` and `NLPLayer` do): "raise" an error (the
            default), "warn" and go on as "one_sided", take the derivative of one of the smooth pieces that meet there
            ("one_sided" or "least_norm"), or make the gradient "nan" or "zero". See `foldopt.verdicts`.
        dtype: compute in this dtype and return the dtype of the first floating parameter; default None: no casting.
        modules: modules whose weights `update` uses and foldopt cannot find; default none. It finds `update` itself if
            it is a module, and modules that it closes over or uses by a global name.

    Returns:
        A layer, ``layer(*params) -> state``. The state is a tensor (B, ...) or a tuple of such. Parameters are tensors;
        those without a batch dimension are shared, and their gradients are summed over the batch. Gradients reach every
        parameter that requires them and the weights of modules in `update`, to any order, in reverse and forward mode
        and under torch.func (vmap runs the samples one by one). ``layer.last`` holds the certificates of the last call,
        a `FoldInfo`.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a parameter holds NaN or inf, or the solver or
            the step returns tensors of wrong shapes or on another device.
        FixedPointError: the step does not fix the solution of the samples that are listed, with on_failure="raise".
        LinearSolveError: the backward equation was not solved for the samples listed, with on_failure="raise".
        DegenerateError: the samples listed have no derivative for the incoming gradient, with degenerate="raise".
        UndeclaredParameterError: the step uses a tensor that requires a gradient and is not a parameter of the layer.

    Source: paper, section 5 (eqs. 21 to 27, Lemma 2 and Theorem 1).

    Examples:
        Heron's step x -> (x + c / x) / 2 has the square root of c as its fixed point, so it differentiates any solver
        of x^2 = c:

        >>> layer = foldopt.fold(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x))
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
    """Turn a starting point and an update step into a layer that unrolls: all steps are differentiated.

    The steps are recorded on the autograd graph, so time and memory of the backward pass grow with their number. It is
    the baseline that folding replaces.

    Args:
        solve: ``solve(*params) -> state``, the starting point of the iteration, run without gradients.
        update: ``update(state, *params) -> state``, differentiable PyTorch code. The samples must not interact.
        iterations: number of steps, at least 1.
        tol: largest accepted relative change ``||x_K - x_(K-1)|| / (1 + ||x_(K-1)||)`` of a sample in the last step;
            default 1e-6 in float64, otherwise 1e-3.
        on_failure: policy for samples that changed more in the last step, so have not converged: "raise" an error (the
            default), "warn" and go on, or make their gradient "nan" or "zero". With the last two, a sample whose step
            is not finite keeps its last finite state.
        dtype: compute in this dtype and return the dtype of the first floating parameter; default None: no casting.
        modules: modules whose weights `update` uses and foldopt cannot find, as in `foldopt.fold`; default none.

    Returns:
        A layer, ``layer(*params) -> state``, with certificates in ``layer.last``.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a parameter is not finite or shapes do not
            fit.
        FixedPointError: the iteration has not converged for the samples listed, with on_failure="raise"; when called.

    Source: paper, section 2.

    Examples:
        >>> layer = foldopt.unroll(lambda c: torch.ones_like(c), lambda x, c: 0.5 * (x + c / x), iterations=8)
        >>> c = torch.tensor([[4.0]], dtype=torch.float64, requires_grad=True)
        >>> layer(c).sum().backward()
        >>> c.grad
        tensor([[0.2500]], dtype=torch.float64)
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
    """Turn a solver and an update step into a layer that unfolds: it differentiates steps at the solution.

    By Theorem 1 its backward pass of K steps is K steps of the linear fixed-point iteration on v = Phi^T v + g. `fold`
    solves the same equation with one recorded step; unfolding is the baseline between it and unrolling.

    Args:
        solve: ``solve(*params) -> state``, the solver, run without gradients.
        update: ``update(state, *params) -> state``, differentiable PyTorch code that fixes the solution. The samples
            must not interact.
        iterations: number of recorded steps, at least 1.
        tol: largest accepted relative residual of the first step, and largest accepted relative distance of the last
            state from the solution; default 1e-6 in float64, otherwise 1e-3.
        on_failure: policy for samples that exceed it, and for samples whose backward pass diverges: "raise" an error
            (the default), "warn" and go on, or make their gradient "nan" or "zero". The last two cannot change the
            gradient of a backward pass that diverges; they only mark the sample in ``layer.last.backward.ok``.
        dtype: compute in this dtype and return the dtype of the first floating parameter; default None: no casting.
        modules: modules whose weights `update` uses and foldopt cannot find, as in `foldopt.fold`; default none.

    Returns:
        A layer, ``layer(*params) -> state``. After a backward pass ``layer.last.backward.residual`` is the norm of the
        last term that the pass added, relative to the incoming gradient; the pass diverges where it is 1 or more.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a parameter is not finite or shapes do not
            fit.
        FixedPointError: the step does not fix the solution, or the steps move away from it, with on_failure="raise".
        LinearSolveError: the backward pass diverges for the samples listed, with on_failure="raise".

    Source: paper, sections 3 and 4.

    Examples:
        >>> layer = foldopt.unfold(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x), iterations=2)
        >>> c = torch.tensor([[4.0]], dtype=torch.float64, requires_grad=True)
        >>> layer(c).sum().backward()
        >>> c.grad
        tensor([[0.2500]], dtype=torch.float64)
    """
    derivative = Unrolled(iterations, from_solution=True)
    return FixedPointLayer(solve, update, derivative, tol=tol, on_failure=on_failure, dtype=dtype, modules=modules)
