"""The second-order cone {(t, z): |z| <= t}."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foldopt.cones._base import Cone, Split


@dataclass(frozen=True)
class SecondOrder(Cone):
    """The second-order cone {(t, z): |z| <= t} in R^d with t first, its own dual cone.

    A point (t, z) has the spectral values t + |z| and t - |z|. The projection has no derivative where one of them is 0.

    Source: Boyd and Vandenberghe, Convex Optimization (2004), section 8.1.

    Examples:
        >>> foldopt.cones.SecondOrder().project(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """

    def centre(self, d: int) -> Tensor:
        """Return (1, 0, ..., 0), (d,); see `Cone.centre`."""
        return torch.eye(d, dtype=torch.float64)[0]

    def _split(self, v: Tensor) -> Split:
        t, r, u, inside, polar = _parts(v)
        up, down = torch.cat([torch.ones_like(t), u], -1), torch.cat([torch.ones_like(t), -u], -1)
        s = torch.where(inside, v, torch.where(polar, 0.0, 0.5 * (t + r) * up))
        return s, torch.where(inside, 0.0, torch.where(polar, v, 0.5 * (t - r) * down))

    def _derivative(self, v: Tensor) -> Tensor:
        t, r, u, inside, polar = _parts(v)
        d = v.shape[-1]
        ratio = (t / r.clamp(min=torch.finfo(v.dtype).tiny))[..., None]
        eye = torch.eye(d, dtype=v.dtype, device=v.device)
        D = v.new_zeros(*v.shape, d)
        D[..., 0, 0] = 0.5
        D[..., 0, 1:] = D[..., 1:, 0] = 0.5 * u
        D[..., 1:, 1:] = 0.5 * ((1 + ratio) * eye[1:, 1:] - ratio * u[..., :, None] * u[..., None, :])
        return torch.where(inside[..., None], eye, torch.where(polar[..., None], 0.0, D))

    def _curvature(self, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        t, r, u, inside, polar = _parts(v)
        along_g, along_h = ((w[..., 1:] * u).sum(-1, keepdim=True) for w in (g, h))
        across_g, across_h = g[..., 1:] - along_g * u, h[..., 1:] - along_h * u
        product = (across_g * across_h).sum(-1, keepdim=True)
        turn = across_g * along_h + across_h * along_g + u * product  # -|z|^2 times the second derivative of z / |z|
        z = g[..., :1] * across_h + h[..., :1] * across_g - (t / r.clamp(min=torch.finfo(v.dtype).tiny)) * turn
        bent = 0.5 * torch.cat([product, z], -1) / r.clamp(min=torch.finfo(v.dtype).tiny)
        return torch.where(inside | polar, 0.0, bent)

    def _distance(self, v: Tensor) -> Tensor:
        t, r, _, _, _ = _parts(v)
        return (r - t.abs()).abs()[..., 0] / (math.sqrt(2) if v.shape[-1] > 1 else 1)


def _parts(v: Tensor) -> tuple[Tensor, ...]:
    """Return t and r = |z|, (..., 1), u = z / r, whether v is in the cone, and whether it is in the polar cone."""
    t, z = v[..., :1], v[..., 1:]
    r = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return t, r, z / torch.where(r > 0, r, 1.0), r <= t, (r <= -t) & (r > t)
