"""The zero cone, the whole space and the nonnegative half line; in R^d, products of d of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split


@dataclass(frozen=True)
class Zero(Cone):
    """{0}: the slack of an equality. Its dual is `Free`."""

    def centre(self, d: int) -> Tensor:
        """Return 0, (d,)."""
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
    """The whole space: the multiplier of an equality. Its dual is `Zero`."""

    def centre(self, d: int) -> Tensor:
        """Return 0, (d,)."""
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
    """{s >= 0}, its own dual."""

    def centre(self, d: int) -> Tensor:
        """Return the vector of ones, (d,)."""
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
