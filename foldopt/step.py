"""One recorded update step: the graph that every derivative of a folded layer is taken through."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt._compat import parameters_replaced, wrapped_by_func
from foldopt.errors import UndeclaredParameterError
from foldopt.linear_solve._base import Product

__all__ = [
    "Modules",
    "Recorded",
    "State",
    "StepFunction",
    "StepJVP",
    "StepVJP",
    "Tensors",
    "as_tuple",
    "flatten",
    "pushforward",
    "record",
    "unflatten",
    "vjp_of",
]

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


def record(step: StepFunction, state: Tensors, params: Tensors, check_undeclared: bool = True) -> Recorded:
    """Run `step` once on detached copies of `state` and `params` and keep its graph.

    check_undeclared: raise UndeclaredParameterError if the graph reaches any other tensor that requires grad.
    """
    with torch.enable_grad():
        x = tuple(part.detach().requires_grad_() for part in state)
        c = tuple(p.detach().requires_grad_(p.requires_grad) for p in params)
        outputs = step(x, c)
    if check_undeclared:
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


@dataclass(eq=False)
class StepVJP(Product):
    """v -> Phi^T v on flattened states, (B, N); `params` pulls v back to the step's parameters instead.

    wanted: the recorded params to pull back to. `answer` keeps what the same pass gives for them, so that checking an
    expected answer and pulling it back take one pass.
    """

    recorded: Recorded
    wanted: Sequence[Tensor] = ()
    _kept: tuple[Tensor, list[Tensor | None]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return Phi^T v."""
        state = self.recorded.state
        pulled = vjp_of(self.recorded, state, unflatten(v, state))
        return flatten([torch.zeros_like(s) if p is None else p for p, s in zip(pulled, state, strict=True)])

    def answer(self, v: Tensor) -> Tensor:
        """Return Phi^T v, and keep Psi^T v.

        Where v is zero in a part of the state, as in the multipliers if nothing but x is used, that part costs nothing.
        """
        state = self.recorded.state
        parts: Sequence[Tensor | None] = unflatten(v, state)
        if len(parts) > 1 and v.any():
            parts = [p if p is not None and p.any() else None for p in parts]
        pulled = vjp_of(self.recorded, (*state, *self.wanted), parts)
        self._kept = v, pulled[len(state) :]
        return flatten([torch.zeros_like(s) if p is None else p for p, s in zip(pulled, state, strict=False)])

    def params(self, v: Tensor) -> list[Tensor | None]:
        """Return Psi^T v, one part per wanted parameter; None for those that take no part."""
        if self._kept is not None and self._kept[0] is v:
            return self._kept[1]
        return vjp_of(self.recorded, self.wanted, unflatten(v, self.recorded.state))


class StepJVP(Product):
    """t -> Phi t on flattened states, (B, N); `params` pushes tangents of the step's parameters forward instead."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self._push = pushforward(recorded, recorded.state)

    def __call__(self, t: Tensor) -> Tensor:
        """Return Phi t."""
        return flatten(self._push(unflatten(t, self.recorded.state)))

    def params(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Return Psi dc, (B, N); a tangent may be None for zero."""
        moved = [(p, t) for p, t in zip(self.recorded.params, tangents, strict=True) if t is not None]
        return flatten(pushforward(self.recorded, [p for p, _ in moved])([t for _, t in moved]))


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


class Modules:
    """The modules whose parameters an update step uses: the step is a pure function of its arguments and of these.

    They are `update` itself if it is one, those it closes over or uses by a global name, those in its
    functools.partial arguments, and `more`.
    """

    def __init__(self, update: Callable[..., State], more: Iterable[nn.Module] = ()) -> None:
        self.update, self.more = update, tuple(more)
        self.holder = nn.ModuleList(dict.fromkeys([*self.more, *_modules_of(update)]))

    def __getstate__(self) -> dict[str, Any]:
        return {"update": self.update, "more": self.more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Modules.__init__(self, **state)

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, and those that torch.func has put in their place."""
        return {n: p for n, p in self.holder.named_parameters() if p.requires_grad or wrapped_by_func(p)}

    def replaced(self, names: Sequence[str], weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Put `weights` in the place of the parameters of these names."""
        return parameters_replaced(self.holder, names, weights)


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
