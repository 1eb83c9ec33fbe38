"""The layer that all derivatives share: a black-box solver, one update step, and an object that differentiates them."""

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

__all__ = ["TOLERANCE", "Derivative", "FixedPointLayer", "LayerAround", "LayerCall"]

TOLERANCE = defaultdict(lambda: 1e-3, {torch.float64: 1e-6})  # largest accepted relative residual of the step


class Derivative(Protocol):
    """How a layer finds its state and differentiates it: `Implicit` or `Unrolled`."""

    def __call__(self, call: LayerCall) -> tuple[Tensors, FoldInfo]:
        """Return the parts of the state and the certificates of a call."""
        ...


class FixedPointLayer(nn.Module):
    """A differentiable layer made of a black-box solver and one update step.

    `foldopt.fold`, `unfold` and `unroll` make it. ``layer(*params)`` returns the state; ``layer.last`` holds the
    certificates of the last call, a `FoldInfo`, or None before the first.

    Args:
        solve: ``solve(*params) -> state``, run without gradients.
        update: ``update(state, *params) -> state``, differentiable PyTorch code.
        derivative: `Implicit` or `Unrolled`: how the state is found and differentiated.
        tol: largest accepted relative residual of the step; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise" (the default), "warn", "nan" or "zero", for samples that fail.
        dtype: compute in this dtype and return the dtype of the first floating parameter; default None: no casting.
        modules: modules whose weights `update` uses and foldopt cannot find, as in `foldopt.fold`; default none.

    Raises:
        InputError: an argument is invalid. When the layer is called it raises the errors of `foldopt.fold`.

    Examples:
        >>> derivative = foldopt.Implicit()
        >>> layer = foldopt.FixedPointLayer(lambda c: c.sqrt(), lambda x, c: 0.5 * (x + c / x), derivative)
        >>> layer(torch.tensor([[4.0]]))
        tensor([[2.]])
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
            raise InputError(
                f"tol={tol}: expected a number above 0, the largest accepted relative residual of the step."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype} is not a floating-point type; use torch.float64 or torch.float32.")
        self.solve, self.update, self.derivative = solve, update, derivative
        self.tol, self.on_failure, self.dtype = tol, on_failure, dtype
        self.inside = Modules(update, modules)
        self.last: FoldInfo | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def forward(self, *params: Tensor) -> State:
        """Return the layer's state for the parameters; torch.compile runs it uncompiled.

        Args:
            *params: tensors on one device, at least one; those without a batch dimension are shared by all samples.

        Returns:
            A tensor (B, ...) or a tuple of such, as `solve` returns it.

        Raises:
            InputError: no parameter, something other than a tensor, different devices, or a parameter that is not
                finite.
        """
        if torch.compiler.is_compiling():
            # Used as a decorator, disable would load the compiler at import, which takes 5 s.
            return torch.compiler.disable(self.forward)(*params)
        call = LayerCall(self, params)
        found, self.last = self.derivative(call)
        state = tuple(part.to(call.answer) for part in found)
        return state[0] if call.single else state

    def certify(self, state: Tensors, stepped: Tensors) -> FoldInfo:
        """Measure how well the step fixes the state, and apply the policy to samples where it does not.

        Args:
            state: parts of the solution.
            stepped: parts of the state after one step from there.

        Returns:
            The certificates.

        Raises:
            FixedPointError: the residual of a sample exceeds the tolerance, and the policy is "raise".
        """
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
    """A module that wraps a folded layer, kept as ``layer.fold``, and shows its certificates as its own."""

    fold: FixedPointLayer

    def folded(self, *params: Any) -> FixedPointLayer:
        """Return the folded layer that a call with these parameters uses."""
        return self.fold

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call, or None before the first."""
        return self.fold.last


class LayerCall:
    """One call of a layer: its tensors, and the solver and the step as functions of these tensors.

    Attributes:
        tensors: the parameters, cast to the layer's dtype, then the trainable weights of modules used by the step.
        n_params: number of parameters; the weights follow them.
        answer: dtype of the caller, in which the state is returned.
        single: whether the state is one tensor; known after `solve` has run.
        transformed: whether a transform of torch.func is running.

    Raises:
        InputError: there are no parameters, one is no tensor, or they are on different devices.
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
        """Run the solver without gradients and return the parts of its state.

        Raises:
            InputError: a parameter holds NaN or inf, or the solver returned something other than tensors (B, ...) on
                the parameters' device.
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
                f"solve returned parts of different batch sizes, shapes {[tuple(p.shape) for p in state]}; the first "
                "dimension of every part is the batch."
            )
        like = next(iter(floating.values()), params[0])
        for i, part in enumerate(state):
            if part.device != like.device:
                raise InputError(
                    f"solve returned part {i} on {part.device}, but the parameters are on {like.device}; move it there."
                )
        return tuple(part.detach().to(self.layer.dtype or like.dtype) for part in state)

    def step(self, state: Tensors, tensors: Tensors) -> Tensors:
        """Return the parts of the state after one update step."""
        return self.run(self.layer.update, state, tensors)

    def run(self, function: Callable[..., Any], state: Tensors | None, tensors: Tensors) -> Any:
        """Call the solver (state None) or the update step, with checks of finiteness turned off.

        The layer certifies every sample by itself, so a sample that is not finite must not stop the others. The
        trailing tensors replace the weights inside the modules; the solver needs that only where a transform hides
        them.

        Raises:
            InputError: the step changed the shapes of the state.
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
            raise InputError(
                f"update returned a state of shapes {got}, but its input state has shapes {expected}; a step keeps the "
                "shapes of its state."
            )
        return new
