"""Fixed-point folding: a black-box solve and one differentiable update step become a differentiable layer.

With x* = U(x*, c) the fixed point, Phi = dU/dx and Psi = dU/dc there, the vector-Jacobian product of c -> x* is
g^T J = v^T Psi where v^T (I - Phi) = g^T (paper eqs. 21-27, Lemma 2 and Theorem 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldopt.checks import require_finite
from foldopt.errors import FixedPointError, InputError
from foldopt.fixed_point import POLICIES, FixedPoint, FoldInfo, Judge, apply_policy, fixed_point, patched
from foldopt.linear_solve import LinearSolver
from foldopt.linear_solve import linear_solver as resolve
from foldopt.step import Recorded, State, StepFunction, Tensors, Update, as_tuple, flatten, record
from foldopt.transforms import Undeclared, transformed
from foldopt.verdicts import require_policy


class FixedPointLayer(nn.Module):
    """What folded, unfolded and unrolled layers share: solving without gradients, checks, dtype, the certificate."""

    def __init__(
        self,
        solve: Callable[..., State],
        update: Callable[..., State],
        *,
        tol: float | None = None,
        on_failure: str = "raise",
        dtype: torch.dtype | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        if not callable(solve):
            raise InputError(f"solve={solve!r} is not callable; expected solve(*params) -> state.")
        if on_failure not in POLICIES:
            raise InputError(f"on_failure={on_failure!r} is unknown; choose one of {POLICIES}.")
        if tol is not None and not tol > 0:
            raise InputError(f"tol={tol}: the fixed-point tolerance is a relative residual, take one above 0.")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype} is not a floating-point type; use torch.float64 or torch.float32.")
        self.solve, self.update = solve, update
        self.tol, self.on_failure, self.dtype = tol, on_failure, dtype
        self._update = Update(update, modules)
        self.last: FoldInfo | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def forward(self, *params: Tensor) -> State:
        """Return the layer's state for the parameters; torch.compile leaves it as it is."""
        if torch.compiler.is_compiling():
            # As a decorator, disable would load the compiler, which is 5 s of import time.
            return torch.compiler.disable(self.layer)(*params)
        return self.layer(*params)

    def layer(self, *params: Tensor) -> State:
        """Compute the state; each kind of layer has its own."""
        raise NotImplementedError

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return the fixed-point tolerance: `tol`, or 1e-6 for float64 and 1e-3 for lower precision."""
        return self.tol or (1e-6 if dtype == torch.float64 else 1e-3)

    def cast(self, params: Sequence[Tensor]) -> tuple[Tensors, torch.dtype]:
        """Cast floating parameters to the layer's dtype; also return the caller's dtype.

        Raises InputError for no parameters, non-tensors, or parameters on different devices.
        """
        if not params:
            raise InputError("the layer was called without parameters; pass at least one tensor.")
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise InputError(f"parameter {i} is a {type(p).__name__}, expected a tensor; use torch.as_tensor.")
            if p.device != params[0].device:
                raise InputError(
                    f"parameter {i} is on {p.device} but parameter 0 is on {params[0].device}; move them to one device."
                )
        floating = [p.dtype for p in params if p.is_floating_point()]
        answer = floating[0] if floating else torch.get_default_dtype()
        target = self.dtype or answer
        return tuple(p.to(target) if p.is_floating_point() else p for p in params), answer

    def solved(self, params: Tensors, weights: dict[str, Tensor] | None = None) -> tuple[Tensors, bool]:
        """Run the black box without gradients: the state as a tuple, and whether it is a single tensor.

        weights: what to put in the place of the modules' parameters meanwhile.

        Raises InputError if a parameter holds NaN or inf, or if the black box returns something else than tensors
        (B, ...) on the parameters' device.
        """
        self.require(params)
        with torch.no_grad():
            returned = self._update.call_with(weights or {}, self.solve, *(p.detach() for p in params))
        single = isinstance(returned, Tensor)
        state = as_tuple(returned) if single or isinstance(returned, tuple) else ()
        like = next((p for p in params if p.is_floating_point()), params[0])
        if not state or not all(isinstance(part, Tensor) and part.dim() >= 1 for part in state):
            raise InputError(
                f"solve returned {type(returned).__name__}, expected a tensor of shape (B, ...) or a tuple of such."
            )
        if len({len(part) for part in state}) > 1:
            raise InputError(
                f"solve returned parts of different batch sizes, shapes {[tuple(p.shape) for p in state]}."
            )
        for i, part in enumerate(state):
            if part.device != like.device:
                raise InputError(f"solve returned part {i} on {part.device}, but the parameters are on {like.device}.")
        dtype = self.dtype or like.dtype
        return tuple(part.detach().to(dtype) for part in state), single

    def require(self, params: Tensors) -> None:
        """Refuse parameters that hold NaN or inf."""
        require_finite(**{f"parameter {i}": p for i, p in enumerate(params) if p.is_floating_point()})

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters of the modules that the update uses, by name."""
        return self._update.weights()

    def step_for(self, single: bool, params: Tensors) -> tuple[StepFunction, Tensors]:
        """Return the step as a function of tuples, and its params: the explicit ones, then the modules' weights."""
        weights = self.weights()
        return self.bind(single, len(params), list(weights)), (*params, *weights.values())

    def bind(self, single: bool, n_params: int, names: Sequence[str]) -> StepFunction:
        """Return the step as a function of tuples; see `foldopt.step.Update.bind`."""
        return self._update.bind(single, n_params, names)

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Measure how well the step fixes the solution and apply the policy to the samples where it does not."""
        x = flatten(state)
        residual = torch.linalg.vector_norm(flatten([s.detach() for s in stepped]) - x, dim=1)
        residual = residual / (1 + torch.linalg.vector_norm(x, dim=1))
        tol = self.tolerance(x.dtype)
        info = FoldInfo(residual, residual <= tol)
        if not info.ok.all():
            apply_policy(
                self.on_failure,
                FixedPointError,
                ~info.ok,
                residual,
                "the update step does not fix the solver's solution: ||U(x*, c) - x*|| / (1 + ||x*||) is {worst:.1e}, "
                f"above tol={tol:.0e},",
                "Solver and step disagree (other problem, sign or dual), the solver failed or stopped early, or the "
                "instance is infeasible; tighten the solver, raise tol=, or choose on_failure='nan'|'zero'",
            )
        return info


class FoldedLayer(FixedPointLayer):
    """A differentiable layer from a black-box solver and one update step; made by `fold`."""

    def __init__(self, *args: Any, linear_solver: LinearSolver, degenerate: str = "raise", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_policy(degenerate)
        self.linear_solver, self.degenerate = linear_solver, degenerate

    def layer(self, *params: Tensor) -> State:
        """Return the solution state of the parameters; see `fold`."""
        cast, answer = self.cast(params)
        weights = self.weights()
        tensors = (*cast, *weights.values())
        recording = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
        solved = Solved(self.linear_solver, self.on_failure, self, len(cast), list(weights), recording)
        *found, _, _ = fixed_point(solved, *tensors)
        self.last = solved.certificate
        state = tuple(part.to(answer) for part in found)
        return state[0] if solved.single else state


class Solved(FixedPoint):
    """One call of a folded layer: solves, records a step there and certifies."""

    users = True

    def __init__(
        self,
        solver: LinearSolver,
        policy: str,
        layer: FoldedLayer,
        n_params: int,
        names: list[str],
        recording: bool,
    ) -> None:
        super().__init__(solver, policy, layer.degenerate)
        self.layer, self.n_params, self.names, self.recording = layer, n_params, names, recording
        self.guarded = transformed()
        self.single = True
        self.can_judge = hasattr(layer.update, "judge")
        self.has_jacobian = hasattr(layer.update, "jacobian")

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the state, its residuals and the samples to differentiate."""
        with Undeclared() if self.guarded else contextlib.nullcontext():
            params = tensors[: self.n_params]
            weights = dict(zip(self.names, tensors[self.n_params :], strict=True)) if self.guarded else None
            state, self.single = self.layer.solved(params, weights)
            self.step = self.layer.bind(self.single, self.n_params, self.names)
            if self.recording:
                self.recorded = record(self.step, state, tensors)
                stepped = self.recorded.outputs
            else:
                stepped = self.step(state, tensors)
            self.certificate = info = self.layer.certify(state, stepped)
            keep = torch.ones_like(info.ok) if self.policy == "warn" else info.ok.clone()
            if self.recorded and not keep.all():
                self.recorded = record(self.step, patched(state, keep), tensors)
        return (*(part.clone() for part in state), info.residual, keep)

    def adopt(self, copies: Sequence[Solved]) -> None:
        """Take over what copies of it found."""
        super().adopt(copies)
        self.single = copies[0].single

    def jacobian(self, recorded: Recorded) -> Callable[[], Tensor] | None:
        """Return the update's own closed form of Phi, if it has one."""
        return self._closed_form("jacobian", recorded, ())

    def inverse(self, recorded: Recorded) -> Callable[[Tensor, bool], Tensor | None] | None:
        """Return the update's own solution of the adjoint equation, if it has one."""
        stepped = tuple(out.detach() for out in recorded.outputs)
        return self._closed_form("inverse", recorded, (stepped[0] if self.single else stepped,))

    def weights(self, recorded: Recorded) -> Tensor | None:
        """Return the update's own units of the state, if it has some."""
        return self._asked("weights", recorded)

    def judge(self, recorded: Recorded) -> Judge | None:
        """Return the update's own judge of cotangents at this point, if it has one."""
        return self._asked("judge", recorded)

    def _asked(self, name: str, recorded: Recorded) -> Any:
        method = getattr(self.layer.update, name, None)
        if method is None:
            return None
        state = recorded.state[0] if self.single else recorded.state
        with torch.no_grad():
            return method(state, *recorded.params[: self.n_params])

    def _closed_form(self, name: str, recorded: Recorded, more: tuple[Any, ...]) -> Callable[..., Tensor] | None:
        method = getattr(self.layer.update, name, None)
        if method is None:
            return None
        state = recorded.state[0] if self.single else recorded.state
        params = recorded.params[: self.n_params]

        def closed_form(*args: Any) -> Tensor:  # kept by this call, so it must not hold it: that would be a cycle
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
) -> FoldedLayer:
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
    return FoldedLayer(
        solve,
        update,
        linear_solver=resolve(linear_solver),
        tol=tol,
        on_failure=on_failure,
        degenerate=degenerate,
        dtype=dtype,
        modules=modules,
    )
