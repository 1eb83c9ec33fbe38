"""The projection on a cone as torch records it: differentiable twice, in both modes and under vmap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldopt._compat import outer_tangents, plain, through_autograds_vmap
from foldopt.errors import FoldoptError

if TYPE_CHECKING:
    from foldopt.cones._base import Cone


class _Projection(torch.autograd.Function):
    """The projection of v, (..., d)."""

    @staticmethod
    def forward(v: Tensor, cone: Cone) -> Tensor:
        return cone.split(v)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, ctx.cone = inputs
        ctx.save_for_backward(v)
        ctx.save_for_forward(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return _push(v, g, ctx.cone), None

    @staticmethod
    def jvp(ctx: Any, g: Tensor, _: None) -> Tensor:
        with outer_tangents(ctx.saved_tensors) as (v,):
            return _push(v, g, ctx.cone)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, cone: Cone) -> tuple[Tensor, int]:
        return recorded_projection(v.movedim(in_dims[0], 0), cone), 0


class _Pushed(torch.autograd.Function):
    """The derivative at v times g, both (..., d) and of the same shape."""

    @staticmethod
    def forward(v: Tensor, g: Tensor, cone: Cone) -> Tensor:
        return cone.pushed(v, g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, g, ctx.cone = inputs
        ctx.save_for_backward(v, g)
        ctx.save_for_forward(v, g)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, g = ctx.saved_tensors
        of_v, of_g, _ = ctx.needs_input_grad
        return _curve(v, g, w, ctx.cone) if of_v else None, _push(v, w, ctx.cone) if of_g else None, None

    @staticmethod
    def jvp(ctx: Any, dv: Tensor | None, dg: Tensor | None, _: None) -> Tensor:
        with outer_tangents(ctx.saved_tensors) as (v, g):
            moved = torch.zeros_like(g) if dg is None else _push(v, dg, ctx.cone)
            return moved if dv is None else moved + _curve(v, g, dv, ctx.cone)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, g: Tensor, cone: Cone) -> tuple[Tensor, int]:
        v, g = _together(info.batch_size, in_dims, (v, g))
        return _push(v, g, cone), 0


class _Curved(torch.autograd.Function):
    """The second derivative at v along g and h, all (..., d).

    A projection is the gradient of a function, so its second derivative along g and h, paired with w, is symmetric in
    g, h and w. There is no derivative with respect to v.
    """

    @staticmethod
    def forward(v: Tensor, g: Tensor, h: Tensor, cone: Cone) -> Tensor:
        return cone.curvature(v, g, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, g, h, ctx.cone = inputs
        ctx.save_for_backward(v, g, h)
        ctx.save_for_forward(v, g, h)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (v, g, h), (_, of_g, of_h, _) = ctx.saved_tensors, ctx.needs_input_grad
        return w, _curve(v, h, w, ctx.cone) if of_g else None, _curve(v, g, w, ctx.cone) if of_h else None, None

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, dg: Tensor | None, dh: Tensor | None, __: None) -> Tensor:
        with outer_tangents(ctx.saved_tensors) as (v, g, h):
            moved = torch.zeros_like(g) if dg is None else _curve(v, dg, h, ctx.cone)
            return moved if dh is None else moved + _curve(v, g, dh, ctx.cone)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, g: Tensor, h: Tensor, cone: Cone) -> tuple[Tensor, int]:
        v, g, h = _together(info.batch_size, in_dims, (v, g, h))
        return _curve(v, g, h, cone), 0


class _Constant(torch.autograd.Function):
    """The identity; differentiating through it raises FoldoptError, because third derivatives are not implemented."""

    @staticmethod
    def forward(v: Tensor, cone: Cone) -> Tensor:
        return v.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.cone = inputs[1]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        raise _third_order(ctx.cone)

    @staticmethod
    def jvp(ctx: Any, dv: Tensor, _: None) -> Tensor:
        raise _third_order(ctx.cone)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], v: Tensor, cone: Cone) -> tuple[Tensor, int]:
        return _Constant.apply(v.movedim(in_dims[0], 0), cone), 0


def _third_order(cone: Cone) -> FoldoptError:
    return FoldoptError(f"the projection on {cone} has derivatives of the first and second order only.")


def recorded_projection(v: Tensor, cone: Cone) -> Tensor:
    """Return the projection of v (..., d) on the cone, with derivatives of the first and second order."""
    return _through((v,), lambda v: _Projection.apply(v, cone))


def _push(v: Tensor, g: Tensor, cone: Cone) -> Tensor:
    return _through((v, g), lambda v, g: _Pushed.apply(v, g, cone))


def _curve(v: Tensor, g: Tensor, h: Tensor, cone: Cone) -> Tensor:
    return _through((v, g, h), lambda v, g, h: _Curved.apply(_Constant.apply(v, cone), g, h, cone))


def _through(tensors: tuple[Tensor, ...], function: Any) -> Tensor:
    """Call `function`; tensors that autograd's own vmap has batched are mapped by hand."""
    if plain(*tensors):
        return function(*tensors)
    mapped = through_autograds_vmap(
        tensors, lambda *t: (function(*t),), lambda size, dims, t: ((function(*_together(size, dims, t)),), (0,))
    )
    return mapped[0]


def _together(size: int, in_dims: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors with the mapped dimension first, those without it repeated."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims[: len(tensors)], strict=True)
    ]
