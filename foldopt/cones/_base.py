"""The interface of a cone: its projection, the derivatives of the projection, and where they do not exist.

The projection s of v on a closed convex cone K is orthogonal to p = v - s, the projection of v on the polar cone
(Moreau, 1962). The projection is homogeneous: project(c v) = c project(v) for c > 0. Each cone therefore works on
points whose largest entry is near 1, and a power of 2 restores the scale.
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

from foldopt.checks import require_finite
from foldopt.cones._recorded import recorded_projection
from foldopt.errors import InputError

Split = tuple[Tensor, Tensor]
Found = TypeVar("Found")
LARGEST_EXPONENT = 1000  # 2 to this power and its inverse are normal float64 numbers


class Cone(ABC):
    """A closed convex cone K in R^d with the projection on it, the base class of all cones.

    project(v) is the point of K nearest to v, and v - project(v) is the projection on the polar cone, the set of
    points p with p's <= 0 for all s in K. All methods take points of shape (..., d), any number of them at once.

    A subclass implements `centre` and the methods `_split`, `_derivative`, `_curvature` and `_distance`, for float64
    points whose largest entry is near 1.

    Source: Moreau, Décomposition orthogonale d'un espace hilbertien selon deux cônes mutuellement polaires (1962).

    Examples:
        >>> from foldopt.cones import Cone, SecondOrder
        >>> isinstance(SecondOrder(), Cone)
        True
        >>> s, p = SecondOrder().split(torch.tensor([0.0, 3.0, 4.0]))
        >>> s, p, s @ p
        (tensor([2.5000, 1.5000, 2.0000]), tensor([-2.5000,  1.5000,  2.0000]), tensor(0.))
    """

    def project(self, v: Tensor) -> Tensor:
        """Return the nearest point of the cone.

        The result can be differentiated twice, in forward and reverse mode and by `torch.func`. At points without a
        derivative the choice of `derivative` is used.

        Args:
            v: (..., d), of any floating-point dtype.

        Returns:
            (..., d), in the dtype of v.

        Raises:
            InputError: if v holds NaN or inf, or its last dimension is not that of the cone. Inside the step of a
                layer, points that are not finite give NaN instead.
            FoldoptError: if a third derivative is asked for.
        """
        self._require_size(v)
        require_finite(v=v)
        return self._project(v)

    def split(self, v: Tensor) -> Split:
        """Return the projections on the cone and on its polar cone, without a gradient.

        Args:
            v: (..., d).

        Returns:
            A pair (s, p) of shape (..., d) each, with s + p = v and s'p = 0 to rounding relative to v.

        Raises:
            InputError: if the last dimension of v is not that of the cone.
        """
        self._require_size(v)
        unit, scale, finite = _normalized(v)
        return tuple(_restored(part * scale, finite, v) for part in self._split(unit))  # type: ignore[return-value]

    def derivative(self, v: Tensor) -> Tensor:
        """Return the derivative of the projection, without a gradient.

        At points without a derivative (see `kinks`) it is the limit of the derivatives at some nearby points: a point
        on the boundary of the cone is treated as a point inside it.

        Args:
            v: (..., d).

        Returns:
            (..., d, d), symmetric with eigenvalues between 0 and 1.

        Raises:
            InputError: if the last dimension of v is not that of the cone.
        """
        self._require_size(v)
        unit, _, finite = _normalized(v)
        return _restored(self._derivative(unit), finite[..., None], v)

    def kinks(self, v: Tensor, tol: float | Tensor) -> Tensor:
        """Return which points are close to a point where the projection has no derivative.

        Args:
            v: (..., d).
            tol: the distance that counts as close, in the units of v; a number, or a tensor that broadcasts against the
                batch (...). Distances are exact to first order in `tol`.

        Returns:
            (...) bool; True also for points that are not finite.

        Raises:
            InputError: if the last dimension of v is not that of the cone.
        """
        self._require_size(v)
        unit, scale, finite = _normalized(v)
        return (self._distance(unit) * scale[..., 0] <= tol) | ~finite[..., 0]

    @abstractmethod
    def centre(self, d: int) -> Tensor:
        """Return a point deep inside both the cone and its dual cone.

        Args:
            d: the dimension of the cone.

        Returns:
            (d,) float64; 0 for the zero cone and the whole space.
        """

    def pushed(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the product of the derivative at v with a vector, without a gradient.

        Args:
            v: (..., d), the points.
            g: (..., d), the vectors. The derivative is symmetric, so that this is the vector-Jacobian product as well.

        Returns:
            (..., d), in the dtype of g.
        """
        unit, _, finite = _normalized(v)
        return _restored(self._pushed(unit, g.double()), finite, g)

    def curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        """Return the second derivative of the projection along two vectors, without a gradient.

        It is 0 where the first derivative does not exist because pieces meet on which the projection is linear.

        Args:
            v: (..., d), the points.
            g: (..., d), the first direction.
            h: (..., d), the second direction.

        Returns:
            (..., d), in the dtype of v.
        """
        unit, scale, finite = _normalized(v)
        return _restored(self._curvature(unit, g.double(), h.double()) / scale, finite, v)

    def _require_size(self, v: Tensor) -> None:
        """Raise InputError if the last dimension of v is not that of the cone."""
        if v.dim() < 1 or not v.is_floating_point():
            raise InputError(f"v has shape {tuple(v.shape)} and dtype {v.dtype}: expected floating-point (..., d).")

    def _project(self, v: Tensor) -> Tensor:
        """Return the projection, recorded by autograd. Piecewise linear projections override this with torch code."""
        return recorded_projection(v, self)

    @abstractmethod
    def _split(self, v: Tensor) -> Split:
        """Return the projections on the cone and on its polar cone."""

    @abstractmethod
    def _derivative(self, v: Tensor) -> Tensor:
        """Return the derivative of the projection."""

    def _pushed(self, v: Tensor, g: Tensor) -> Tensor:
        """Return the product of the derivative with g."""
        return (self._derivative(v) @ g[..., None])[..., 0]

    @abstractmethod
    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        """Return the second derivative of the projection along g and h."""

    @abstractmethod
    def _distance(self, v: Tensor) -> Tensor:
        """Return the distance (...) to the nearest point without a derivative."""


class _Recent(threading.local):
    """The last call of a method in this thread: the cone, the points and the result."""

    call: tuple[Any, Tensor, Any] | None = None


def remembered(method: Callable[[Any, Tensor], Found]) -> Callable[[Any, Tensor], Found]:
    """Decorate a method of a cone so that it returns the stored result if it is called again with the same points.

    The projection, its derivative and the distance to a kink are usually computed one after the other at the same
    points, and all of them need the same root or the same eigenvectors.
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
    """The dual cone of a cone K: all y with y's >= 0 for every s in K.

    Its projection is v + project(-v), with the projection on K.

    Args:
        cone: the cone K.

    Source: Moreau, Décomposition orthogonale d'un espace hilbertien selon deux cônes mutuellement polaires (1962).

    Examples:
        >>> from foldopt.cones import Dual, Exponential
        >>> Dual(Exponential()).project(torch.tensor([-1.0, 0.0, 0.0]))
        tensor([-0.8923,  0.0971,  0.2944])
    """

    cone: Cone

    def centre(self, d: int) -> Tensor:
        """Return a point deep inside both the dual cone and the cone; see `Cone.centre`."""
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
    """Return v / scale in float64 with a largest entry near 1, the scale (..., 1), and which points are finite."""
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
