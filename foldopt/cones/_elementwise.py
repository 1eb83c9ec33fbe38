"""The zero cone, the whole space and the nonnegative orthant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split


@dataclass(frozen=True)
class Zero(Cone):
    """The cone {0} in R^d, the slack of equalities. Its dual cone is `Free`.

    Examples:
        >>> foldopt.cones.Zero().project(torch.tensor([1.0, 2.0]))
        tensor([0., 0.])
    """

    def centre(self, d: int) -> Tensor:
        """Return 0, (d,); see `Cone.centre`."""
        return torch.zeros(d, dtype=torch.float64)

    def _project(self, v: Tensor) -> Tensor:
        return v * 0

    def _split(self, v: Tensor) -> Split:
        return torch.zeros_like(v), v

    def _derivative(self, v: Tensor) -> Tensor:
        return v.new_zeros(*v.shape, v.shape[-1])

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(v)

    def _distance(self, v: Tensor) -> Tensor:
        return torch.full_like(v[..., 0], torch.inf)


@dataclass(frozen=True)
class Free(Cone):
    """The whole space R^d, the multipliers of equalities. Its dual cone is `Zero`.

    Examples:
        >>> foldopt.cones.Free().project(torch.tensor([1.0, -2.0]))
        tensor([ 1., -2.])
    """

    def centre(self, d: int) -> Tensor:
        """Return 0, (d,); see `Cone.centre`."""
        return torch.zeros(d, dtype=torch.float64)

    def _project(self, v: Tensor) -> Tensor:
        return v.clone()

    def _split(self, v: Tensor) -> Split:
        return v, torch.zeros_like(v)

    def _derivative(self, v: Tensor) -> Tensor:
        return torch.eye(v.shape[-1], dtype=v.dtype, device=v.device).expand(*v.shape, v.shape[-1])

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(v)

    def _distance(self, v: Tensor) -> Tensor:
        return torch.full_like(v[..., 0], torch.inf)


@dataclass(frozen=True)
class Nonnegative(Cone):
    """The nonnegative orthant {s: s >= 0} in R^d, its own dual cone.

    The projection has no derivative where an entry is 0.

    Examples:
        >>> foldopt.cones.Nonnegative().project(torch.tensor([1.0, -2.0]))
        tensor([1., 0.])
    """

    def centre(self, d: int) -> Tensor:
        """Return the vector of ones, (d,); see `Cone.centre`."""
        return torch.ones(d, dtype=torch.float64)

    def _project(self, v: Tensor) -> Tensor:
        return v.clamp(min=0)

    def _split(self, v: Tensor) -> Split:
        return v.clamp(min=0), v.clamp(max=0)

    def _derivative(self, v: Tensor) -> Tensor:
        return torch.diag_embed((v >= 0).to(v))

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return torch.zeros_like(v)

    def _distance(self, v: Tensor) -> Tensor:
        return v.abs().amin(-1)
