"""What every cone offers: its projection, the derivatives of that, and where they do not exist.

The projection s of v on a closed convex cone K and p = v - s, the projection on the polar cone, are orthogonal (Moreau,
1962). It is homogeneous: project(c v) = c project(v) for c > 0. Each cone therefore works on points whose largest entry
is near 1, and a power of 2 restores the scale.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from foldopt._compat import outer_tangents, plain, through_autograds_vmap
from foldopt.checks import require_finite
from foldopt.errors import FoldoptError, InputError

Split = tuple[Tensor, Tensor]
Found = TypeVar("Found")
LARGEST_EXPONENT = 1000  # 2 to this power and its inverse are normal float64 numbers


class Cone(ABC):
    """A closed convex cone in R^d; its points v are (..., d), any number of them at once.

    A subclass writes the methods with an underscore, for float64 points whose largest entry is near 1.
    """

    def project(self, v: Tensor) -> Tensor:
        """Return the nearest point of the cone, (..., d), in the dtype of v.

        Differentiable twice, in forward and reverse mode, and by torch.func; a third derivative raises FoldoptError.
        Where the projection has no derivative the one of `derivative` is used. Raises InputError for NaN and inf, and
        for a last dimension that is not the cone's; inside of a layer's step such a point becomes NaN instead.
        """
        self._require_size(v)
        require_finite(v=v)
        return self._project(v)

    def split(self, v: Tensor) -> Split:
        """Return v's projections on the cone and on its polar, (..., d) each, not recorded by autograd.

        Their sum is v and their product 0, both to rounding relative to v.
        """
        self._require_size(v)
        unit, scale, finite = _normalized(v)
        return tuple(_restored(part * scale, finite, v) for part in self._split(unit))  # type: ignore[return-value]

    def derivative(self, v: Tensor) -> Tensor:
        """Return the derivative of the projection, (..., d, d), symmetric, between 0 and I; not recorded by autograd.

        Where there is none (see `kinks`), it is the limit of derivatives at nearby points, and a boundary point of the
        cone counts as a point inside.
        """
        self._require_size(v)
        unit, _, finite = _normalized(v)
        return _restored(self._derivative(unit), finite[..., None], v)

    def kinks(self, v: Tensor, tol: float | Tensor) -> Tensor:
        """Return which points lie within `tol`, in the units of v, of a point where there is no derivative, (...) bool.

        tol: number or tensor that broadcasts against the batch (...). Distances are exact to first order in tol.
        """
        self._require_size(v)
        unit, scale, finite = _normalized(v)
        return (self._distance(unit) * scale[..., 0] <= tol) | ~finite[..., 0]

    @abstractmethod
    def centre(self, d: int) -> Tensor:
        """Return a point deep inside of the cone in R^d and of its dual, (d,) float64; 0 for the zero cone."""

    def pushed(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the derivative at v times g, (..., d); the derivative is symmetric. Not recorded by autograd."""
        unit, _, finite = _normalized(v)
        return _restored(self._pushed(unit, g.double()), finite, g)

    def curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        """Return the second derivative of the projection at v along g and h, (..., d); not recorded by autograd.

        0 where the first derivative does not exist because pieces meet on which the projection is linear.
        """
        unit, scale, finite = _normalized(v)
        return _restored(self._curvature(unit, g.double(), h.double()) / scale, finite, v)

    def _require_size(self, v: Tensor) -> None:
        """Raise InputError if the last dimension of v is not that of the cone."""
        if v.dim() < 1 or not v.is_floating_point():
            raise InputError(f"v has shape {tuple(v.shape)} and dtype {v.dtype}: expected floating-point (..., d).")

    def _project(self, v: Tensor) -> Tensor:
        """Return the projection, recorded by autograd; linear ones do without the function that is defined below."""
        return _project(v, self)

    @abstractmethod
    def _split(self, v: Tensor) -> Split:
        """Return the projections on the cone and on its polar."""

    @abstractmethod
    def _derivative(self, v: Tensor) -> Tensor:
        """Return the derivative."""

    def _pushed(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the derivative times g."""
        return (self._derivative(v) @ g[..., None])[..., 0]

    @abstractmethod
    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        """Return the second derivative along g and h."""

    @abstractmethod
    def _distance(self, v: Tensor) -> Tensor:
        """Return the distance to the points without a derivative, (...)."""


class _Recent(threading.local):
    """The last call of a function in a thread: the cone, the points and what came out."""

    call: tuple[Any, Tensor, Any] | None = None


def remembered(method: Callable[[Any, Tensor], Found]) -> Callable[[Any, Tensor], Found]:
    """Keep what a method of a cone found for the points v of its last call.

    The projection, its derivative and the distance to a kink are asked for one after the other at the same points, and
    all of them stand on the same root or eigenvectors.
    """
    recent = _Recent()

    @functools.wraps(method)
    def called(cone: Any, v: Tensor) -> Found:
        kept = recent.call
        if kept is not None and kept[0] == cone and kept[1].device == v.device and torch.equal(kept[1], v):
            return kept[2]
        found = method(cone, v)
        recent.call = cone, v, found
        return found

    return called


@dataclass(frozen=True)
class Dual(Cone):
    """The dual {y: y's >= 0 for all s in `cone`}; its projection is v + project(-v) (Moreau, 1962)."""

    cone: Cone

    def centre(self, d: int) -> Tensor:
        """Return a point deep inside of the dual cone, (d,)."""
        return self.cone.centre(d)

    def _require_size(self, v: Tensor) -> None:
        self.cone._require_size(v)

    def _split(self, v: Tensor) -> Split:
        s, p = self.cone._split(-v)
        return -p, -s

    def _derivative(self, v: Tensor) -> Tensor:
        return torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) - self.cone._derivative(-v)

    def _pushed(self, v: Tensor, g: Tensor) -> Tensor:
        return g - self.cone._pushed(-v, g)

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return self.cone._curvature(-v, g, h)

    def _distance(self, v: Tensor) -> Tensor:
        return self.cone._distance(-v)


def require_three(cone: Cone, v: Tensor) -> None:
    """Raise InputError unless the points v are in R^3."""
    if v.shape[-1] != 3:
        raise InputError(f"v has shape {tuple(v.shape)}: {cone} is in R^3, expected (..., 3).")


def _normalized(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return v in float64 with its largest entry near 1, the factor (..., 1) taken out, and which points are finite."""
    v = v.detach().double()
    finite = v.isfinite().all(-1, keepdim=True)
    v = torch.where(finite, v, 0.0)
    largest = v.abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_zeros(*v.shape[:-1], 1)
    exponent = torch.frexp(largest)[1].clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    scale = torch.exp2(exponent.double())
    return v / scale, scale, finite


def _restored(value: Tensor, finite: Tensor, like: Tensor) -> Tensor:
    """Return `value` in the dtype of `like`, NaN where the point was not finite."""
    return torch.where(finite, value, torch.nan).to(like.dtype)


class _Projection(torch.autograd.Function):
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
        return _project(v.movedim(in_dims[0], 0), cone), 0


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

    A projection is a gradient, so the form that pairs it with w is symmetric in g, h and w. It has no derivative in v.
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
    """v itself, which raises if a derivative in it is asked for."""

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


def _project(v: Tensor, cone: Cone) -> Tensor:
    return _through((v,), lambda v: _Projection.apply(v, cone))


def _push(v: Tensor, g: Tensor, cone: Cone) -> Tensor:
    return _through((v, g), lambda v, g: _Pushed.apply(v, g, cone))


def _curve(v: Tensor, g: Tensor, h: Tensor, cone: Cone) -> Tensor:
    return _through((v, g, h), lambda v, g, h: _Curved.apply(_Constant.apply(v, cone), g, h, cone))


def _through(tensors: tuple[Tensor, ...], function: Any) -> Tensor:
    """Call `function`, also on tensors that autograd's own vmap has batched."""
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
