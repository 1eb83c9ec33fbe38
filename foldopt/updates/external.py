"""Functions that are not PyTorch code, with the derivatives that the user supplies, as parts of a program."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from foldopt.errors import InputError

__all__ = ["ExternalFunction"]


class _Use(threading.local):
    """Whether the Hessians that are evaluated now are only multiplied with the step of an update at a solution."""

    times_step = False


_use = _Use()


@contextlib.contextmanager
def hessian_times_step() -> Iterator[None]:
    """Say that Hessians evaluated inside are multiplied with an update step, which is zero at a solution.

    Their derivative, which an `ExternalFunction` does not know, is then multiplied with zero.
    """
    before, _use.times_step = _use.times_step, True
    try:
        yield
    finally:
        _use.times_step = before


class ExternalFunction:
    """Functions from outside of PyTorch: callbacks compute their values, Jacobian and Hessian.

    An instance is called like a PyTorch function, ``F(z) -> (B, r)`` for z (B, k). It may be used together with PyTorch
    code in the objective and the constraints of a `foldopt.NLPLayer` or `foldopt.SmoothProgram`. Parameters on which
    the external code depends go into z next to the variables: ``F(torch.cat([x, c], 1))``.

    The callbacks give the first and second derivatives, which is all that the gradient of a layer needs. The gradient
    of a layer's gradient, and the third derivative of the functions themselves, raise an InputError. Derivatives are
    taken in reverse mode; forward mode (``torch.func.jvp``, ``jacfwd``) is not there.

    Args:
        value: ``value(z) -> (r,)``, for one sample z, a NumPy array (k,) of float64.
        jacobian: ``jacobian(z) -> (r, k)``, the Jacobian of value.
        hessian: ``hessian(z, w) -> (k, k)``, the symmetric Hessian of w[0] value[0] + ... + w[r-1] value[r-1].

    Raises:
        InputError: when it is called or differentiated: z is not (B, k), the batch is empty, a callback returns a wrong
            shape, or a third derivative is needed.

    Examples:
        >>> import numpy as np
        >>> F = ExternalFunction(
        ...     value=lambda z: np.array([z[0] ** 2 * z[1]]),
        ...     jacobian=lambda z: np.array([[2 * z[0] * z[1], z[0] ** 2]]),
        ...     hessian=lambda z, w: w[0] * np.array([[2 * z[1], 2 * z[0]], [2 * z[0], 0.0]]),
        ... )
        >>> z = torch.tensor([[3.0, 2.0]], dtype=torch.float64, requires_grad=True)
        >>> F(z).sum().backward()
        >>> z.grad
        tensor([[12.,  9.]], dtype=torch.float64)
    """

    def __init__(
        self, value: Callable[[Any], Any], jacobian: Callable[[Any], Any], hessian: Callable[[Any, Any], Any]
    ) -> None:
        self.value, self.jacobian, self.hessian = value, jacobian, hessian
        self._last: dict[str, dict[bytes, Tensor]] = {}  # what each callback returned in the last call, by arguments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}}

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate the functions.

        Args:
            z: the variables and parameters, (B, k).

        Returns:
            The values, (B, r).

        Raises:
            InputError: z is not (B, k), the batch is empty, or `value` returns a wrong shape.
        """
        if z.dim() != 2:
            raise InputError(f"an ExternalFunction was called with shape {tuple(z.shape)}, expected (B, k).")
        out: Tensor = _Values.apply(z, self)
        return out

    def values(self, z: Tensor) -> Tensor:
        """Return value(z) of every sample, (B, r), without derivatives."""
        return self._rows("value", (None,), z)

    def jacobians(self, z: Tensor) -> Tensor:
        """Return jacobian(z) of every sample, (B, r, k), without derivatives."""
        return self._rows("jacobian", (None, z.shape[1]), z)

    def hessians(self, z: Tensor, w: Tensor) -> Tensor:
        """Return hessian(z, w) of every sample, (B, k, k), without derivatives; w has shape (B, r)."""
        return self._rows("hessian", (z.shape[1], z.shape[1]), z, w)

    def _rows(self, name: str, shape: tuple[int | None, ...], *args: Tensor) -> Tensor:
        """Call a callback on each row of args; equal rows, and rows of the previous call, are not computed again."""
        if not len(args[0]):
            raise InputError("an ExternalFunction was called with an empty batch: its number of values is unknown.")
        arrays = [arg.detach().double().cpu().numpy() for arg in args]
        known: dict[bytes, Tensor] = {}
        before, found = self._last.get(name, {}), []
        for rows in zip(*arrays, strict=True):
            key = b"".join(row.tobytes() for row in rows)
            value = known.get(key, before.get(key))
            if value is None:
                value = torch.as_tensor(getattr(self, name)(*(row.copy() for row in rows)))
                if value.dim() != len(shape) or any(
                    e not in (None, d) for e, d in zip(shape, value.shape, strict=True)
                ):
                    raise InputError(
                        f"{name} of an ExternalFunction returned shape {tuple(value.shape)} for a sample of "
                        f"{args[0].shape[1]} entries, expected {tuple('r' if e is None else e for e in shape)}."
                    )
            known[key] = value
            found.append(value)
        self._last[name] = known
        return torch.stack(found).to(args[0])


def _mapped(function: Any, info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """Apply an autograd.Function under vmap: the mapped dimension joins the batch, because samples are independent.

    The last of args is the `ExternalFunction`.
    """
    *tensors, external = args
    flat = []
    for tensor, dim in zip(tensors, dims, strict=False):
        moved = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        flat.append(moved.flatten(0, 1))
    out = function.apply(*flat, external)
    return out.unflatten(0, (info.batch_size, -1)), 0


class _Values(torch.autograd.Function):
    """z (B, k) -> value(z) (B, r)."""

    @staticmethod
    def forward(z: Tensor, external: ExternalFunction) -> Tensor:
        return external.values(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, ctx.external = inputs
        ctx.save_for_backward(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return _Pulled.apply(z, g, ctx.external), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _mapped(_Values, info, in_dims, *args)


class _Pulled(torch.autograd.Function):
    """(z, w) -> J(z)'w (B, k). Its derivatives are the Hessian and J."""

    @staticmethod
    def forward(z: Tensor, w: Tensor, external: ExternalFunction) -> Tensor:
        return torch.einsum("brk,br->bk", external.jacobians(z), w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, w, ctx.external = inputs
        ctx.save_for_backward(z, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, w = ctx.saved_tensors
        of_z, of_w, _ = ctx.needs_input_grad
        moved = torch.einsum("bij,bj->bi", _Hessians.apply(z, w, ctx.external), g) if of_z else None
        return moved, _Pushed.apply(z, g, ctx.external) if of_w else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _mapped(_Pulled, info, in_dims, *args)


class _Pushed(torch.autograd.Function):
    """(z, u) -> J(z)u (B, r)."""

    @staticmethod
    def forward(z: Tensor, u: Tensor, external: ExternalFunction) -> Tensor:
        return torch.einsum("brk,bk->br", external.jacobians(z), u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, u, ctx.external = inputs
        ctx.save_for_backward(z, u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, u = ctx.saved_tensors
        of_z, of_u, _ = ctx.needs_input_grad
        moved = torch.einsum("bij,bj->bi", _Hessians.apply(z, g, ctx.external), u) if of_z else None
        return moved, _Pulled.apply(z, g, ctx.external) if of_u else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _mapped(_Pushed, info, in_dims, *args)


class _Hessians(torch.autograd.Function):
    """(z, w) -> the Hessian of w.value (B, k, k), linear in w; the derivative with respect to z is unknown."""

    @staticmethod
    def forward(z: Tensor, w: Tensor, external: ExternalFunction) -> Tensor:
        return external.hessians(z, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, w, ctx.external = inputs
        ctx.times_step = _use.times_step
        ctx.save_for_backward(z, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, w = ctx.saved_tensors
        of_z, of_w, _ = ctx.needs_input_grad
        return (
            _Third.apply(z, w, g, ctx.times_step) if of_z else None,
            _Contracted.apply(z, g, w, ctx.external) if of_w else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _mapped(_Hessians, info, in_dims, *args)


class _Contracted(torch.autograd.Function):
    """(z, G, w) -> the sum of the entries of G * H_i for the Hessian H_i of each function, (B, r); w gives only r."""

    @staticmethod
    def forward(z: Tensor, G: Tensor, w: Tensor, external: ExternalFunction) -> Tensor:
        units = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        return torch.stack([(external.hessians(z, one.expand_as(w)) * G).sum((1, 2)) for one in units], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, G, w, ctx.external = inputs
        ctx.save_for_backward(z, G, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, G, _ = ctx.saved_tensors
        return _Third.apply(z, g, G, False), _Hessians.apply(z, g, ctx.external), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _mapped(_Contracted, info, in_dims, *args)


class _Third(torch.autograd.Function):
    """The derivative of a Hessian with respect to z, times g: zero where g holds an update step, which is zero itself.

    Everywhere else, and for the derivative of this term, third derivatives are needed, which are unknown.
    """

    @staticmethod
    def forward(z: Tensor, w: Tensor, g: Tensor, times_step: bool) -> Tensor:
        if not times_step:
            _refuse_third(g)
        return torch.zeros_like(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, None, None, None]:
        _refuse_third(g)
        return None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], z: Tensor, w: Tensor, g: Tensor, times_step: bool
    ) -> tuple[Tensor, int]:
        if not times_step:
            _refuse_third(g)
        shape = z.shape if in_dims[0] is None else z.movedim(in_dims[0], 0).shape[1:]
        return z.new_zeros(info.batch_size, *shape), 0


def _refuse_third(g: Tensor | None) -> None:
    """Raise InputError if the third derivatives are multiplied with anything but zero."""
    if g is not None and bool(g.any()):
        raise InputError(
            "an ExternalFunction has first and second derivatives only: the gradient of a layer's gradient needs "
            "third ones. Write the functions in PyTorch, or difference the gradient."
        )
