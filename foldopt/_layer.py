"""A layer: a black-box solver, one update step, and how the solution is differentiated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from foldopt._certificates import POLICIES, FoldInfo, apply_policy
from foldopt._compat import transforming
from foldopt.checks import NONFINITE_ALLOWED, require_finite
from foldopt.errors import FixedPointError, InputError
from foldopt.step import Modules, State, Tensors, flatten

TOLERANCE = defaultdict(lambda: 1e-3, {torch.float64: 1e-6})  # of the relative residual of the step


class Derivative(Protocol):
    """How a layer finds its state and differentiates it: `Implicit` or `Unrolled`."""

    def __call__(self, call: LayerCall) -> tuple[Tensors, FoldInfo]:
        """Return the parts of the state and the certificates of a call."""
        ...


class FixedPointLayer(nn.Module):
    """A differentiable layer from a black-box solver and one update step; made by `fold`, `unfold` and `unroll`.

    Args:
        solve, update, tol, on_failure, dtype, modules: see `foldopt.fold`.
        derivative: an `Implicit` or `Unrolled`, how the state is found and differentiated.

    ``layer(*params) -> state``; ``layer.last`` holds the per-sample certificates of the last call, a `FoldInfo`.
    """

    checks_finite: ClassVar[bool] = True  # refuse parameters that hold NaN or inf

    def __init__(
        self,
        solve: Callable[..., State],
        update: Callable[..., State],
        derivative: Derivative,
        *,
        tol: float | None = None,
        on_failure: str = "raise",
        dtype: torch.dtype | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        if not callable(solve):
            raise InputError(f"solve={solve!r} is not callable; expected solve(*params) -> state.")
        if not callable(update):
            raise InputError(f"update={update!r} is not callable; expected update(state, *params) -> state.")
        if on_failure not in POLICIES:
            raise InputError(f"on_failure={on_failure!r} is unknown; choose one of {POLICIES}.")
        if tol is not None and not tol > 0:
            raise InputError(f"tol={tol}: the fixed-point tolerance is a relative residual, take one above 0.")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype} is not a floating-point type; use torch.float64 or torch.float32.")
        self.solve, self.update, self.derivative = solve, update, derivative
        self.tol, self.on_failure, self.dtype = tol, on_failure, dtype
        self.inside = Modules(update, modules)
        self.last: FoldInfo | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def forward(self, *params: Tensor) -> State:
        """Return the layer's state for the parameters; torch.compile leaves it as it is."""
        if torch.compiler.is_compiling():
            # As a decorator, disable would load the compiler, which is 5 s of import time.
            return torch.compiler.disable(self.forward)(*params)
        call = LayerCall(self, params)
        found, self.last = self.derivative(call)
        state = tuple(part.to(call.answer) for part in found)
        return state[0] if call.single else state

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Measure how well the step fixes the solution and apply the policy to the samples where it does not."""
        x = flatten(state)
        residual = torch.linalg.vector_norm(flatten([s.detach() for s in stepped]) - x, dim=1)
        residual = residual / (1 + torch.linalg.vector_norm(x, dim=1))
        tol = self.tol or TOLERANCE[x.dtype]
        info = FoldInfo(residual, residual <= tol)
        if not info.solved.all():
            apply_policy(
                self.on_failure,
                FixedPointError,
                ~info.solved,
                residual,
                "the update step does not fix the solver's solution: ||U(x*, c) - x*|| / (1 + ||x*||) is {worst:.1e}, "
                f"above tol={tol:.0e},",
                "Solver and step disagree (other problem, sign or dual), the solver failed or stopped early, or the "
                "instance is infeasible; tighten the solver, raise tol=, or choose on_failure='nan'|'zero'",
            )
        return info


class LayerAround(nn.Module):
    """A layer around another, ``layer.fold``, whose certificates are its own."""

    fold: FixedPointLayer

    def folded(self, *params: Any) -> FixedPointLayer:
        """Return the folded layer that a call with these params uses."""
        return self.fold

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call."""
        return self.fold.last


class LayerCall:
    """One call of a layer: its tensors, and the solver and the step as functions of them.

    tensors: the parameters, cast to the layer's dtype, then the trainable weights of modules inside of the step.
    answer: the caller's dtype. single: whether the state is one tensor, known once `solve` has run. transformed:
    whether a transform of PyTorch is under way.

    Raises InputError for no parameters, non-tensors, or parameters on different devices.
    """

    def __init__(self, layer: FixedPointLayer, params: Tensors) -> None:
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
        self.answer = floating[0] if floating else torch.get_default_dtype()
        dtype = layer.dtype or self.answer
        weights = layer.inside.weights() if layer.inside.holder else {}
        self.layer, self.n_params, self.names = layer, len(params), list(weights)
        self.tensors = (*(p.to(dtype) if p.is_floating_point() else p for p in params), *weights.values())
        self.single, self.transformed = True, transforming()

    def solve(self, tensors: Tensors) -> Tensors:
        """Run the black box without gradients and return the parts of its state.

        Raises InputError if a parameter holds NaN or inf, or if the black box returns something else than tensors
        (B, ...) on the parameters' device.
        """
        params = tuple(p.detach() for p in tensors[: self.n_params])
        floating = {i: p for i, p in enumerate(params) if p.is_floating_point()}
        if self.layer.checks_finite and (self.transformed or not all(p.sum().isfinite() for p in floating.values())):
            require_finite(**{f"parameter {i}": p for i, p in floating.items()})
        with torch.no_grad():
            returned = self.run(self.layer.solve, None, params + tensors[self.n_params :])
        self.single = isinstance(returned, Tensor)
        state: Tensors = (returned,) if self.single else returned if isinstance(returned, tuple) else ()
        if not state or not all(isinstance(part, Tensor) and part.dim() >= 1 for part in state):
            raise InputError(
                f"solve returned {type(returned).__name__}, expected a tensor of shape (B, ...) or a tuple of such."
            )
        if len({len(part) for part in state}) > 1:
            raise InputError(
                f"solve returned parts of different batch sizes, shapes {[tuple(p.shape) for p in state]}."
            )
        like = next(iter(floating.values()), params[0])
        for i, part in enumerate(state):
            if part.device != like.device:
                raise InputError(f"solve returned part {i} on {part.device}, but the parameters are on {like.device}.")
        return tuple(part.detach().to(self.layer.dtype or like.dtype) for part in state)

    def step(self, state: Tensors, tensors: Tensors) -> Tensors:
        """Return the parts of the state after one update step."""
        return self.run(self.layer.update, state, tensors)

    def run(self, function: Callable[..., Any], state: Tensors | None, tensors: Tensors) -> Any:
        """Call the black box (state: None) or the update step; values that are not finite may pass.

        The layer certifies every sample: one that is not finite is no reason to stop the others. Weights behind the
        parameters take their places inside of the modules; the black box needs that where a transform hides them.

        Raises InputError if a step changes the shapes of the state.
        """
        args: tuple[Any, ...] = tensors[: self.n_params]
        weights = tensors[self.n_params :]
        if state is not None:
            args = (state[0] if self.single else state, *args)
        elif not self.transformed:
            weights = ()
        token = NONFINITE_ALLOWED.set(True)
        try:
            if weights:
                with self.layer.inside.replaced(self.names, weights):
                    returned = function(*args)
            else:
                returned = function(*args)
        finally:
            NONFINITE_ALLOWED.reset(token)
        if state is None:
            return returned
        new = (returned,) if isinstance(returned, Tensor) else tuple(returned)
        got, expected = [tuple(part.shape) for part in new], [tuple(part.shape) for part in state]
        if got != expected:
            raise InputError(f"update returned a state of shapes {got}, but its input state has shapes {expected}.")
        return new
