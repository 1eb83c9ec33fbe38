"""Nesterov and Todd's scaling of products of nonnegative half lines and second-order cones, batched.

For s and z inside the cone, W is the symmetric matrix with W z = W^-1 s. On a second-order cone, with
J = diag(1, -1, ..., -1), it is W = eta (2 v v' - J) with v'Jv = 1, and W^2 = eta^2 (2 w w' - J) with w'Jw = 1
(Vandenberghe, The CVXOPT linear and quadratic cone program solvers, 2010, section 4). A half line is a second-order
cone in R^1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TINY = 1e-300


class Blocks:
    """Second-order cones in R^m, in groups of k cones of equal size d; rows (k, d) has the rows of a group."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.groups = tuple(groups)
        self.degree = sum(len(rows) for rows in groups)

    def each(self, function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
        """Apply `function` to each group (..., k, d) of the vectors; the result has the shape of the last vector."""
        out = torch.empty_like(vectors[-1])
        for rows in self.groups:
            out[..., rows] = function(*(v[..., rows] for v in vectors))
        return out

    def unit(self, like: Tensor) -> Tensor:
        """Return the unit element, (1, 0, ..., 0) in each cone, (1, m)."""
        e = like.new_zeros(1, sum(rows.numel() for rows in self.groups))
        for rows in self.groups:
            e[:, rows[:, 0]] = 1
        return e

    def product(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the Jordan product (u'v, u_0 v_1 + v_0 u_1)."""
        return self.each(_product, u, v)

    def quotient(self, u: Tensor, v: Tensor) -> Tensor:
        """Return x such that the Jordan product of u and x is v, for u inside the cone."""
        return self.each(_quotient, u, v)

    def least(self, v: Tensor) -> Tensor:
        """Return the smallest spectral value t - |z| over all cones, (B,); inf if there are no cones."""
        found = [_least(v[:, rows])[..., 0].amin(1) for rows in self.groups]
        return torch.stack(found).amin(0) if found else v.new_full((len(v),), torch.inf)

    def longest(self, u: Tensor, du: Tensor) -> Tensor:
        """Return the longest step in [0, inf] from u, inside the cone, along du that stays in the cone, (B,)."""
        found = [_longest(u[:, rows], du[:, rows]).amin(1) for rows in self.groups]
        return torch.stack(found).amin(0) if found else u.new_full((len(u),), torch.inf)


class Scaling:
    """The scaling W of s and z (B, m), both inside the cone; `point` is W z = W^-1 s."""

    def __init__(self, blocks: Blocks, s: Tensor, z: Tensor) -> None:
        self.blocks = blocks
        parts = [_scaling(s[:, rows], z[:, rows]) for rows in blocks.groups]
        self.eta, self.w = torch.empty_like(s), torch.empty_like(s)
        for rows, (eta, w) in zip(blocks.groups, parts, strict=True):
            self.eta[:, rows], self.w[:, rows] = eta.expand_as(w), w
        self.point = self.times(z)

    def times(self, v: Tensor) -> Tensor:
        """Return W v, (B, m)."""
        return self.blocks.each(lambda eta, w, v: eta * _half(w, v), self.eta, self.w, v)

    def divided(self, v: Tensor) -> Tensor:
        """Return W^-1 v, (B, m)."""
        return self.blocks.each(lambda eta, w, v: _half(_reflected(w), v) / eta, self.eta, self.w, v)

    def divided_columns(self, M: Tensor) -> Tensor:
        """Return W^-1 M, (B, m, n)."""
        eta, w = self.eta[:, None], self.w[:, None]
        return self.blocks.each(lambda eta, w, v: _half(_reflected(w), v) / eta, eta, w, M.mT).mT


def _scaling(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    s_size, z_size = (_determinant(u).sqrt() for u in (s, z))
    s, z = s / s_size, z / z_size
    gamma = (0.5 * (1 + (s * z).sum(-1, keepdim=True))).sqrt()
    w = (s + _reflected(z)) / (2 * gamma)
    tail = w[..., 1:]
    head = (1 + tail.square().sum(-1, keepdim=True)).sqrt()  # ensures w'Jw = 1 to rounding
    return (s_size / z_size).sqrt(), torch.cat([head, tail], -1)


def _determinant(v: Tensor) -> Tensor:
    """Return v'Jv, (..., 1), at least TINY."""
    norm = torch.linalg.vector_norm(v[..., 1:], dim=-1, keepdim=True)
    return ((v[..., :1] - norm) * (v[..., :1] + norm)).clamp(min=TINY)


def _least(v: Tensor) -> Tensor:
    return v[..., :1] - torch.linalg.vector_norm(v[..., 1:], dim=-1, keepdim=True)


def _reflected(v: Tensor) -> Tensor:
    """Return J v."""
    return torch.cat([v[..., :1], -v[..., 1:]], -1)


def _half(w: Tensor, v: Tensor) -> Tensor:
    """Return the product of v with the square root of 2 w w' - J."""
    along = (w[..., 1:] * v[..., 1:]).sum(-1, keepdim=True)
    tail = v[..., 1:] + (v[..., :1] + along / (1 + w[..., :1])) * w[..., 1:]
    return torch.cat([w[..., :1] * v[..., :1] + along, tail], -1)


def _product(u: Tensor, v: Tensor) -> Tensor:
    head = (u * v).sum(-1, keepdim=True)
    return torch.cat([head, u[..., :1] * v[..., 1:] + v[..., :1] * u[..., 1:]], -1)


def _quotient(u: Tensor, v: Tensor) -> Tensor:
    head = (u * _reflected(v)).sum(-1, keepdim=True) / _determinant(u)
    return torch.cat([head, (v[..., 1:] - head * u[..., 1:]) / u[..., :1]], -1)


def _longest(u: Tensor, du: Tensor) -> Tensor:
    """Return the longest steps, (B, k), after scaling u to the unit element (Vandenberghe, 2010, section 8.3)."""
    size = _determinant(u).sqrt()
    unit, step = u / size, du / size
    head = (unit * _reflected(step)).sum(-1, keepdim=True)
    tail = step[..., 1:] - (head + step[..., :1]) / (unit[..., :1] + 1) * unit[..., 1:]
    slope = torch.linalg.vector_norm(tail, dim=-1) - head[..., 0]
    return torch.where(slope > 0, 1 / slope.clamp(min=TINY), torch.inf)
