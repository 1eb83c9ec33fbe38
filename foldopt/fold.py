"""Fixed-point folding: a black-box solve and one differentiable update step become a differentiable layer.

With x* = U(x*, c) the fixed point, Phi = dU/dx and Psi = dU/dc there, the vector-Jacobian product of c -> x* is
g^T J = v^T Psi where v^T (I - Phi) = g^T (paper eqs. 21-27, Lemma 2 and Theorem 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foldopt.errors import FixedPointError, InputError, LinearSolveError, SolverError
from foldopt.linear_solve import Jacobian, LinearSolveInfo, LinearSolver
from foldopt.linear_solve import linear_solver as resolve
from foldopt.step import (
    Recorded,
    State,
    StepFunction,
    Tensors,
    Update,
    as_tuple,
    flatten,
    record,
    state_vjp,
    unflatten,
    vjp_of,
)

POLICIES = ("raise", "warn", "nan", "zero")


def fixed_point_vjp(
    recorded: Recorded,
    cotangent: Tensors,
    solver: LinearSolver,
    jacobian: Jacobian | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensors, LinearSolveInfo]:
    """Solve v = Phi^T v + g (eq. 26): the cotangent v that, pulled back through one step, is the layer's (eq. 27).

    recorded: one step recorded at the fixed point. cotangent: g, shaped like the state, each part (B, ...).
    solver: a linear solver. jacobian: returns Phi, (B, N, N), if known in closed form.
    keep: (B,) bool, samples to solve for; the others get v = 0.
    Returns v, shaped like the state, and the solver's per-sample certificate.
    """
    g = flatten(cotangent)
    if keep is not None:
        g = torch.where(keep[:, None], g, torch.zeros_like(g))
    v, info = solver(state_vjp(recorded), g, jacobian)
    return unflatten(v, recorded.state), info


@dataclass
class FoldInfo:
    """Per-sample certificates of a layer's last call; all tensors have shape (B,).

    residual: ||U(x*, c) - x*|| / (1 + ||x*||) at the state the solver returned. ok: residual within tolerance.
    backward: what the linear solver did in the last backward pass (None before it ran).
    """

    residual: Tensor
    ok: Tensor
    backward: LinearSolveInfo | None = None


@dataclass
class _Call:
    """What one forward call hands to its backward passes."""

    step: StepFunction
    solver: LinearSolver
    policy: str
    info: FoldInfo
    recorded: Recorded | None = None
    jacobian: Callable[[Recorded], Tensor] | None = None
    n_state: int = 1

    def masked(self) -> Tensor | None:
        """Return the samples to keep if the policy leaves some out, else None."""
        return None if self.policy == "warn" or self.info.ok.all() else self.info.ok


class _Fold(torch.autograd.Function):
    """Identity on the solved state whose derivative with respect to the params is that of the fixed point."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensors:
        return tuple(part.clone() for part in tensors[: call.n_state])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*output, *tensors[call.n_state :])

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        state, params = saved[: call.n_state], saved[call.n_state :]
        pull = _differentiable_vjp if torch.is_grad_enabled() else _plain_vjp
        return (None, *[None] * call.n_state, *pull(call, state, params, cotangent))


def _plain_vjp(call: _Call, state: Tensors, params: Tensors, cotangent: Tensors) -> list[Tensor | None]:
    recorded = call.recorded or record(call.step, state, params)
    v = _adjoint(call, recorded, cotangent)
    return vjp_of(recorded, recorded.params, v)


def _adjoint(call: _Call, recorded: Recorded, cotangent: Tensors) -> Tensors:
    """Solve the adjoint equation and apply the layer's policy to the samples that have no trustworthy gradient."""
    jacobian = None if call.jacobian is None else lambda: call.jacobian(recorded)
    keep = call.masked()
    v, info = fixed_point_vjp(recorded, cotangent, call.solver, jacobian, keep)
    call.info.backward = info
    if info.ok.all() and keep is None:
        return v
    if not info.ok.all():
        _apply_policy(
            call.policy,
            LinearSolveError,
            ~info.ok,
            info.residual,
            f"linear solver {info.method!r} did not solve the adjoint equation v = Phi^T v + g (relative residual "
            "{worst:.1e} after " + f"{int(info.iterations.max()) if len(info.iterations) else 0} products)",
            "Phi may have a spectral radius of 1 or more (lfpi) or I - Phi be singular; use linear_solver='auto', "
            "check the step at that sample, or choose on_failure='nan'|'zero'",
        )
    return v if call.policy == "warn" else masked(v, info.ok & call.info.ok, call.policy)


def _differentiable_vjp(call: _Call, state: Tensors, params: Tensors, cotangent: Tensors) -> list[Tensor | None]:
    """The vjp as a differentiable function: v is itself a fixed point, of v -> Phi^T v + g, and is folded again.

    Aliases cut the path through which x* depends on the params, so that the step is differentiated partially; the
    dependence of x* and v on everything is carried by the saved outputs and by the folded adjoint.
    """
    n = call.n_state

    def adjoint_step(v: Tensors, tensors: Tensors) -> Tensors:
        g, x, c = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        pulled = vjp_of(_record_connected(call.step, x, c), x, v, create_graph=True)
        return tuple(gi if p is None else gi + p for gi, p in zip(g, pulled, strict=True))

    recorded = call.recorded or record(call.step, state, params)
    with torch.no_grad():
        v = _adjoint(call, recorded, tuple(g.detach() for g in cotangent))
    nested = _Call(adjoint_step, call.solver, call.policy, FoldInfo(call.info.residual, call.info.ok), n_state=n)
    v = _Fold.apply(nested, *v, *cotangent, *state, *params)
    aliased = _record_connected(call.step, state, params)
    return vjp_of(aliased, aliased.params, v, create_graph=True)


def _record_connected(step: StepFunction, state: Tensors, params: Tensors) -> Recorded:
    """Record a step on aliases that stay connected to `state` and `params`."""
    x = tuple(part.view_as(part) if part.requires_grad else part.detach().requires_grad_() for part in state)
    c = tuple(p.view_as(p) if p.requires_grad else p for p in params)
    return Recorded(step(x, c), x, c)


def _apply_policy(policy: str, error: type[SolverError], bad: Tensor, residual: Tensor, what: str, remedy: str) -> None:
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
        """Check the parameters and cast floating ones to the layer's dtype; also return the caller's dtype.

        Raises InputError for no parameters, non-tensors, NaN or inf, or parameters on different devices.
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
            if p.is_floating_point() and not p.isfinite().all():
                rows = (~p.isfinite()).reshape(len(p) if p.dim() else 1, -1).any(1).nonzero()[:, 0].tolist()
                raise InputError(
                    f"parameter {i} of shape {tuple(p.shape)} holds NaN or inf, first in rows {rows[:10]}; "
                    "check the network or the data that made it."
                )
        floating = [p.dtype for p in params if p.is_floating_point()]
        answer = floating[0] if floating else torch.get_default_dtype()
        target = self.dtype or answer
        return tuple(p.to(target) if p.is_floating_point() else p for p in params), answer

    def solved(self, params: Tensors) -> tuple[Tensors, bool]:
        """Run the black box without gradients: the state as a tuple, and whether it is a single tensor.

        Raises InputError if the black box returns something else than tensors (B, ...) on the parameters' device.
        """
        with torch.no_grad():
            returned = self.solve(*(p.detach() for p in params))
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

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters of the modules that the update uses, by name."""
        return self._update.weights()

    def step_for(self, single: bool, params: Tensors) -> tuple[StepFunction, Tensors]:
        """Return the step as a function of tuples, and its params: the explicit ones, then the modules' weights."""
        weights = self.weights()
        return self._update.bind(single, len(params), list(weights)), (*params, *weights.values())

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Measure how well the step fixes the solution and apply the policy to the samples where it does not."""
        x = flatten(state)
        residual = torch.linalg.vector_norm(flatten([s.detach() for s in stepped]) - x, dim=1)
        residual = residual / (1 + torch.linalg.vector_norm(x, dim=1))
        tol = self.tolerance(x.dtype)
        info = FoldInfo(residual, residual <= tol)
        if not info.ok.all():
            _apply_policy(
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

    def __init__(self, *args: Any, linear_solver: LinearSolver, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_solver = linear_solver

    def layer(self, *params: Tensor) -> State:
        """Return the solution state of the parameters; see `fold`."""
        cast, answer = self.cast(params)
        state, single = self.solved(cast)
        step, tensors = self.step_for(single, cast)
        record_it = torch.is_grad_enabled() and any(p.requires_grad for p in tensors)
        recorded = record(step, state, tensors) if record_it else None
        with torch.no_grad():
            stepped = recorded.outputs if recorded else step(state, tuple(p.detach() for p in tensors))
        self.last = self.certify(state, stepped)
        if recorded:
            jacobian = self._jacobian(single, len(cast)) if hasattr(self.update, "jacobian") else None
            call = _Call(step, self.linear_solver, self.on_failure, self.last, recorded, jacobian, len(state))
            if (ok := call.masked()) is not None:
                call.recorded = record(step, _patched(state, ok), tensors)
            state = _Fold.apply(call, *state, *tensors)
        state = tuple(part.to(answer) for part in state)
        return state[0] if single else state

    def _jacobian(self, single: bool, n_params: int) -> Callable[[Recorded], Tensor]:
        def jacobian(recorded: Recorded) -> Tensor:
            with torch.no_grad():
                state = recorded.state[0] if single else recorded.state
                return self.update.jacobian(state, *recorded.params[:n_params])

        return jacobian


def _patched(state: Tensors, ok: Tensor) -> Tensors:
    """Replace failed samples by a sound one (zeros if there is none), so that NaN cannot leak into the others."""
    source = int(ok.nonzero()[0, 0]) if ok.any() else None
    filler = [torch.zeros_like(part[:1]) if source is None else part[source : source + 1] for part in state]
    return tuple(
        torch.where(ok.view(-1, *[1] * (part.dim() - 1)), part, fill) for part, fill in zip(state, filler, strict=True)
    )


def fold(
    solve: Callable[..., State],
    update: Callable[..., State],
    *,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    on_failure: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> FoldedLayer:
    """Turn a black-box solver and one update step into a differentiable layer (fixed-point folding, paper section 5).

    Args:
        solve: ``solve(*params) -> state``, run without gradients. Any code: a closed form, Gurobi, a nonconvex solver.
        update: ``update(state, *params) -> state``, differentiable PyTorch code, one step of any iteration that
            `solve`'s solution is a fixed point of. The samples of a batch must not interact. If it has a method
            ``jacobian(state, *params)`` returning Phi of shape (B, N, N), that closed form is used.
        linear_solver: "auto", "direct", "gmres", "bicgstab", "lfpi", or an instance from `foldopt.linear_solve`.
        tol: largest accepted ||U(x*, c) - x*|| / (1 + ||x*||) per sample; default 1e-6 in float64, else 1e-3.
        on_failure: what happens to samples whose solution the step does not fix, or whose adjoint equation was not
            solved: "raise" an error, "warn" and use what there is, or make their gradient "nan" or "zero".
        dtype: compute in this dtype and answer in that of the first floating parameter; default: no casting.
        modules: further modules whose parameters `update` uses out of sight (found by themselves: `update` if it is
            a module, and modules it closes over or names).

    Returns:
        A module, ``layer(*params) -> state``. `state` is a tensor (B, ...) or a tuple of such; params are tensors,
        batched or shared by the batch. Gradients reach every parameter that requires them, and modules used by
        `update`, to any order. ``layer.last`` holds per-sample certificates (`FoldInfo`).

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
        dtype=dtype,
        modules=modules,
    )
