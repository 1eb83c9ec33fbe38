"""One recorded update step: the graph that every derivative of a folded layer is taken through."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt.checks import certified
from foldopt.errors import InputError, UndeclaredParameterError

Tensors = tuple[Tensor, ...]
State = Tensor | Tensors
StepFunction = Callable[[Tensors, Tensors], Tensors]


def as_tuple(state: State) -> Tensors:
    """Return a state as a plain tuple of tensors."""
    return (state,) if isinstance(state, Tensor) else tuple(state)


def flatten(state: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts of a state, each (B, ...), to (B, N)."""
    if len(state) == 1 and state[0].dim() == 2:
        return state[0]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in state], dim=1)


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """Split (B, N) into parts of the shapes of `like`: the inverse of `flatten`."""
    if len(like) == 1:
        return (flat.reshape(like[0].shape),)
    sizes = [part.shape[1:].numel() for part in like]
    return tuple(piece.reshape(part.shape) for piece, part in zip(flat.split(sizes, dim=1), like, strict=True))


class Recorded(NamedTuple):
    """The graph of one step at a fixed point: outputs, and the leaves they were computed from."""

    outputs: Tensors
    state: Tensors
    params: Tensors


def record(step: StepFunction, state: Tensors, params: Tensors, users: bool = True) -> Recorded:
    """Run `step` once on detached copies of `state` and `params` and keep its graph.

    users: whether `step` is the user's; raises UndeclaredParameterError if its graph reaches any other tensor.
    """
    with torch.enable_grad():
        x = tuple(part.detach().requires_grad_() for part in state)
        c = tuple(p.detach().requires_grad_(p.requires_grad) for p in params)
        outputs = step(x, c)
    if users:
        _refuse_undeclared(outputs, (*x, *c))
    return Recorded(outputs, x, c)


def vjp_of(
    recorded: Recorded, inputs: Sequence[Tensor], cotangent: Sequence[Tensor | None], **kwargs: Any
) -> list[Tensor | None]:
    """Pull `cotangent` back through the recorded step to `inputs`; None where an input takes no part.

    A part of the cotangent may be None for zero.
    """
    wanted = [i for i in inputs if i.requires_grad]
    parts = zip(recorded.outputs, cotangent, strict=True)
    reached = [(out, v) for out, v in parts if v is not None and out.requires_grad]
    if not wanted or not reached:
        return [None] * len(inputs)
    outputs, vectors = zip(*reached, strict=True)
    pulled = iter(torch.autograd.grad(outputs, wanted, vectors, retain_graph=True, allow_unused=True, **kwargs))
    return [next(pulled) if i.requires_grad else None for i in inputs]


class StateVJP:
    """v -> Phi^T v on flattened states, (B, N).

    leaves: of the recorded params. `last` is for a v that is expected to be the answer: the same pullback that tells
    whether it is also gives what the leaves get of it.
    """

    def __init__(self, recorded: Recorded, leaves: Sequence[Tensor] = ()) -> None:
        self.recorded, self.leaves = recorded, leaves
        self._last: tuple[Tensor, list[Tensor | None]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return Phi^T v."""
        return self._pulled(unflatten(v, self.recorded.state), ())[0]

    def last(self, v: Tensor) -> Tensor:
        """Return Phi^T v, and keep Psi^T v.

        Where v is zero in a part of the state, as in the multipliers if nothing but x is used, that part costs nothing.
        """
        parts = unflatten(v, self.recorded.state)
        whole = len(parts) == 1 or not v.any()
        moved, kept = self._pulled(parts if whole else [p if p.any() else None for p in parts], self.leaves)
        self._last = v, kept
        return moved

    def kept(self, v: Tensor) -> list[Tensor | None] | None:
        """Return Psi^T v if v is the very tensor that `last` was called with, else None."""
        return self._last[1] if self._last is not None and self._last[0] is v else None

    def _pulled(self, v: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        state = self.recorded.state
        pulled = vjp_of(self.recorded, (*state, *leaves), v)
        moved = [torch.zeros_like(s) if p is None else p for p, s in zip(pulled, state, strict=False)]
        return flatten(moved), pulled[len(state) :]


def state_jvp(recorded: Recorded) -> Callable[[Tensor], Tensor]:
    """Return t -> Phi t on flattened states (B, N)."""
    push = pushforward(recorded, recorded.state)
    return lambda t: flatten(push(unflatten(t, recorded.state)))


def pushforward(
    recorded: Recorded, inputs: Sequence[Tensor], create_graph: bool = False
) -> Callable[[Sequence[Tensor]], Tensors]:
    """Return the map from tangents of `inputs` to those of the recorded outputs.

    The vjp is linear in its cotangent; the vjp of that map is the jvp.
    """
    with torch.enable_grad():
        dummies = [torch.zeros_like(out, requires_grad=True) for out in recorded.outputs]
        pulled = vjp_of(recorded, inputs, dummies, create_graph=True)

    def push(tangents: Sequence[Tensor]) -> Tensors:
        paired = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p is not None]
        moved = vjp_of(
            Recorded(tuple(p for p, _ in paired), (), ()), dummies, [t for _, t in paired], create_graph=create_graph
        )
        return tuple(torch.zeros_like(d) if m is None else m for d, m in zip(dummies, moved, strict=True))

    return push


def _refuse_undeclared(outputs: Tensors, declared: Iterable[Tensor]) -> None:
    known = {id(leaf) for leaf in declared}
    pending = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise UndeclaredParameterError(
                f"the update step uses a tensor of shape {tuple(leaf.shape)} that requires grad but was not passed to "
                "the layer, so its gradient would be lost. Pass it as one of the layer's parameters, name the module "
                "that owns it in `modules=`, or detach it if no gradient is wanted."
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


class Update:
    """A user's update step, seen as a pure function of (state, parameters and the modules' own parameters).

    Modules are `update` itself if it is one, those it closes over or uses by a global name, those in its
    functools.partial arguments, and `modules`. Their trainable parameters follow the explicit ones as `weights`.
    """

    def __init__(self, update: Callable[..., State], modules: Iterable[nn.Module] = ()) -> None:
        if not callable(update):
            raise InputError(f"update={update!r} is not callable; expected update(state, *params) -> state.")
        self.update, self.modules = update, tuple(modules)
        self._holder = nn.ModuleList(dict.fromkeys([*self.modules, *_modules_of(update)]))

    def __getstate__(self) -> dict[str, Any]:
        return {"update": self.update, "modules": self.modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Update.__init__(self, **state)

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters of the modules, by name, and those that torch.func has put in their place."""
        return {
            name: p
            for name, p in self._holder.named_parameters()
            if p.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(p)
        }

    def call_with(self, weights: dict[str, Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` with the modules' parameters replaced by `weights`.

        torch.func.functional_call would leave its tensors behind in a module that it reaches by two names.
        """
        with certified():
            return self._call_with(weights, function, *args)

    def _call_with(self, weights: dict[str, Tensor], function: Callable[..., Any], *args: Any) -> Any:
        if not weights:
            return function(*args)
        current = dict(self._holder.named_parameters())
        new = {id(current[name]): value for name, value in weights.items()}
        slots: list[tuple[dict[str, Any], str, Any]] = [
            (module._parameters, name, p)
            for module in self._holder.modules()
            for name, p in module._parameters.items()
            if id(p) in new
        ]
        try:
            for parameters, name, p in slots:
                parameters[name] = new[id(p)]
            return function(*args)
        finally:
            for parameters, name, p in slots:
                parameters[name] = p

    def bind(self, single: bool, n_params: int, names: Sequence[str]) -> StepFunction:
        """Return step(state, params + weights) -> state on tuples, with shapes checked.

        single: whether the user's state is one tensor; n_params: how many of the params are explicit; names: those of
        the weights that follow.
        """

        def step(state: Tensors, params: Tensors) -> Tensors:
            args = (state[0] if single else state, *params[:n_params])
            weights = dict(zip(names, params[n_params:], strict=True))
            new = as_tuple(self.call_with(weights, self.update, *args))
            got, expected = [tuple(part.shape) for part in new], [tuple(part.shape) for part in state]
            if got != expected:
                raise InputError(f"update returned a state of shapes {got}, but its input state has shapes {expected}.")
            return new

        return step


def _modules_of(update: Callable[..., State]) -> list[nn.Module]:
    if isinstance(update, nn.Module):
        return [update]
    if isinstance(update, functools.partial):
        bound = [*update.args, *update.keywords.values()]
        return [a for a in bound if isinstance(a, nn.Module)] + _modules_of(update.func)
    found = [owner] if isinstance(owner := getattr(update, "__self__", None), nn.Module) else []
    function = getattr(update, "__func__", update)
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        found += [v for v in (*names.nonlocals.values(), *names.globals.values()) if isinstance(v, nn.Module)]
    return found
