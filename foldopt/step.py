"""One recorded update step: all derivatives of a folded layer are taken through its autograd graph.

A *state* is a tuple of tensors, each (B, ...); N is the number of its entries per sample. A *step* is a function
``step(state, params) -> state``. Phi is its derivative with respect to the state, Psi with respect to the parameters.
"""

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
    """Return a state as a tuple of tensors.

    Args:
        state: a tensor, or a tuple of tensors.

    Returns:
        The tuple.

    Examples:
        >>> foldopt.step.as_tuple(torch.zeros(1))
        (tensor([0.]),)
    """
    return (state,) if isinstance(state, Tensor) else tuple(state)


def flatten(state: Sequence[Tensor]) -> Tensor:
    """Concatenate the parts of a state to one vector per sample.

    Args:
        state: tensors, each (B, ...).

    Returns:
        Tensor (B, N).

    Examples:
        >>> foldopt.step.flatten((torch.zeros(1, 2), torch.ones(1))).tolist()
        [[0.0, 0.0, 1.0]]
    """
    if len(state) == 1 and state[0].dim() == 2:
        return state[0]
    return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in state], dim=1)


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Tensors:
    """Split one vector per sample into the parts of a state: the inverse of `flatten`.

    Args:
        flat: tensor (B, N).
        like: a state; its shapes are those of the result.

    Returns:
        The parts.

    Examples:
        >>> foldopt.step.unflatten(torch.tensor([[1.0, 2.0, 3.0]]), (torch.zeros(1, 2), torch.zeros(1)))
        (tensor([[1., 2.]]), tensor([3.]))
    """
    if len(like) == 1:
        return (flat.reshape(like[0].shape),)
    sizes = [part.shape[1:].numel() for part in like]
    return tuple(piece.reshape(part.shape) for piece, part in zip(flat.split(sizes, dim=1), like, strict=True))


class Recorded(NamedTuple):
    """The autograd graph of one step at a fixed point; `record` makes it.

    Attributes:
        outputs: parts of the state after the step, on the graph.
        state: leaves that the step started from.
        params: leaves that the step took as parameters.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + c[0],), (x,), (c,))
        >>> recorded.outputs[0].detach()
        tensor([[1.5000]])
    """

    outputs: Tensors
    state: Tensors
    params: Tensors


def record(step: StepFunction, state: Tensors, params: Tensors, check_undeclared: bool = True) -> Recorded:
    """Run a step once on detached copies of the state and the parameters, and keep its autograd graph.

    Args:
        step: ``step(state, params) -> state``, on tuples of tensors.
        state: where the step starts, parts (B, ...); all of them are differentiated.
        params: parameters; those that require a gradient are differentiated.
        check_undeclared: whether to look for other tensors in the graph that require a gradient; default True.

    Returns:
        The recorded step.

    Raises:
        UndeclaredParameterError: the graph reaches a tensor that requires a gradient and is neither part of the state
            nor a parameter.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + c[0],), (x,), (c,))
        >>> recorded.state[0].requires_grad
        True
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
    """Pull a cotangent back through a recorded step.

    Args:
        recorded: the recorded step.
        inputs: tensors of its graph to pull back to, such as ``recorded.params``.
        cotangent: one tensor per output, of its shape; None for zero.
        **kwargs: further arguments of `torch.autograd.grad`, such as ``create_graph=True``.

    Returns:
        One gradient per input; None for inputs that do not take part.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + c[0],), (x,), (c,))
        >>> foldopt.step.vjp_of(recorded, recorded.state, (torch.ones(1, 1),))
        [tensor([[0.5000]])]
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
    """The product v -> Phi^T v on flattened states (B, N), by autograd; `params` returns Psi^T v.

    Checking a solution v and pulling it back to the parameters needs the same backward pass through the step: `answer`
    keeps Psi^T v, and `params` returns it for the same v.

    Args:
        recorded: the recorded step.
        wanted: the parameters of the step, out of ``recorded.params``, for which `params` returns Psi^T v; default
            none.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + 2 * c[0],), (x,), (c,))
        >>> product = foldopt.step.StepVJP(recorded, recorded.params)
        >>> product(torch.ones(1, 1)), product.params(torch.ones(1, 1))
        (tensor([[0.5000]]), [tensor([[2.]])])
    """

    recorded: Recorded
    wanted: Sequence[Tensor] = ()
    _kept: tuple[Tensor, list[Tensor | None]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N), for v (B, N)."""
        state = self.recorded.state
        pulled = vjp_of(self.recorded, state, unflatten(v, state))
        return flatten([torch.zeros_like(s) if p is None else p for p, s in zip(pulled, state, strict=True)])

    def answer(self, v: Tensor) -> Tensor:
        """Return Phi^T v, (B, N), and keep Psi^T v.

        Parts of the state where v is zero cost nothing, such as the multipliers if only x is used.
        """
        state = self.recorded.state
        parts: Sequence[Tensor | None] = unflatten(v, state)
        if len(parts) > 1 and v.any():
            parts = [p if p is not None and p.any() else None for p in parts]
        pulled = vjp_of(self.recorded, (*state, *self.wanted), parts)
        self._kept = v, pulled[len(state) :]
        return flatten([torch.zeros_like(s) if p is None else p for p, s in zip(pulled, state, strict=False)])

    def params(self, v: Tensor) -> list[Tensor | None]:
        """Return Psi^T v, one tensor per wanted parameter; None for those that do not take part."""
        if self._kept is not None and self._kept[0] is v:
            return self._kept[1]
        return vjp_of(self.recorded, self.wanted, unflatten(v, self.recorded.state))


class StepJVP(Product):
    """The product t -> Phi t on flattened states (B, N), by autograd; `params` returns Psi dc.

    Args:
        recorded: the recorded step.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + 2 * c[0],), (x,), (c,))
        >>> product = foldopt.step.StepJVP(recorded)
        >>> product(torch.ones(1, 1)), product.params([torch.ones(1, 1)])
        (tensor([[0.5000]]), tensor([[2.]]))
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self._push = pushforward(recorded, recorded.state)

    def __call__(self, t: Tensor) -> Tensor:
        """Return Phi t, (B, N), for t (B, N)."""
        return flatten(self._push(unflatten(t, self.recorded.state)))

    def params(self, tangents: Sequence[Tensor | None]) -> Tensor:
        """Return Psi dc, (B, N); `tangents` is dc, one tensor per parameter, None for zero."""
        moved = [(p, t) for p, t in zip(self.recorded.params, tangents, strict=True) if t is not None]
        return flatten(pushforward(self.recorded, [p for p, _ in moved])([t for _, t in moved]))


def pushforward(
    recorded: Recorded, inputs: Sequence[Tensor], create_graph: bool = False
) -> Callable[[Sequence[Tensor]], Tensors]:
    """Return the map from tangents of some inputs to tangents of the outputs of a recorded step.

    The vector-Jacobian product is linear in its cotangent, and the vector-Jacobian product of that linear map is the
    Jacobian-vector product; so two backward passes make a forward one.

    Args:
        recorded: the recorded step.
        inputs: the tensors of its graph that move.
        create_graph: whether the result is to be differentiable; default False.

    Returns:
        Function from one tangent per input to one tangent per output.

    Examples:
        >>> x, c = torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + 2 * c[0],), (x,), (c,))
        >>> foldopt.step.pushforward(recorded, recorded.params)([torch.ones(1, 1)])
        (tensor([[2.]]),)
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
    """Raise UndeclaredParameterError if the graph of the outputs reaches a leaf that is not declared."""
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
    """The modules whose parameters an update step uses, so that gradients reach these parameters too.

    They are the update itself if it is a module, the modules that it closes over or uses by a global name, those among
    the arguments of a `functools.partial`, and `more`.

    Args:
        update: the update step.
        more: further modules, which cannot be found that way; default none.

    Examples:
        >>> network = torch.nn.Linear(1, 1)
        >>> modules = foldopt.step.Modules(lambda x, c: network(x))
        >>> list(modules.weights())
        ['0.weight', '0.bias']
    """

    def __init__(self, update: Callable[..., State], more: Iterable[nn.Module] = ()) -> None:
        self.update, self.more = update, tuple(more)
        self.holder = nn.ModuleList(dict.fromkeys([*self.more, *_modules_of(update)]))

    def __getstate__(self) -> dict[str, Any]:
        return {"update": self.update, "more": self.more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Modules.__init__(self, **state)

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, including those that torch.func has replaced."""
        return {n: p for n, p in self.holder.named_parameters() if p.requires_grad or wrapped_by_func(p)}

    def replaced(self, names: Sequence[str], weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Return a context in which the parameters of these names are replaced by `weights`."""
        return parameters_replaced(self.holder, names, weights)


def _modules_of(update: Callable[..., State]) -> list[nn.Module]:
    """Return the modules that an update step is, closes over, or names."""
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
