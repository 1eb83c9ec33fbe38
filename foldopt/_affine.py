"""Multiplication with a constant sparse matrix, differentiable to any order and under every transform of torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foldopt._compat import outer_tangents, plain, through_autograds_vmap

__all__ = ["SparseMap"]


class SparseMap:
    """The map p -> p M' for a constant scipy CSR matrix M: (..., columns) to (..., rows), on the CPU."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self._transposed: SparseMap | None = None

    @property
    def transposed(self) -> SparseMap:
        """The map of M'; it is made once."""
        if self._transposed is None:
            self._transposed = SparseMap(self.matrix.T.tocsr())
            self._transposed._transposed = self
        return self._transposed

    @property
    def size(self) -> SparseMap:
        """The map of the absolute values of M."""
        return SparseMap(abs(self.matrix))

    def __call__(self, p: Tensor) -> Tensor:
        """Return p M'."""
        if plain(p):
            return _Times.apply(p, self)
        return through_autograds_vmap(
            (p,), lambda p: (_Times.apply(p, self),), lambda size, dims, p: ((self(p[0]),), (0,))
        )[0]


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(p: Tensor, of: SparseMap) -> Tensor:
        flat = p.detach().reshape(-1, p.shape[-1]).numpy()
        return torch.from_numpy((of.matrix @ flat.T).T.copy()).view(*p.shape[:-1], of.matrix.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, ctx.of = inputs
        ctx.save_for_forward(p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.of.transposed(g), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor:
        with outer_tangents((t,)):
            return ctx.of(t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], p: Tensor, of: SparseMap) -> tuple[Tensor, int]:
        return of(p.movedim(in_dims[0], 0)), 0
