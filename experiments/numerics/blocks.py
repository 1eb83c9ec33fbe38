"""Batched subvectors and submatrices on a set of coordinates that differs from sample to sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foldopt.batched import matvec


class Chosen:
    """The coordinates chosen in each sample, padded to the same number k.

    Args:
        chosen: Which coordinates are chosen, (B, n) bool.
        most: k, at least the largest number of chosen coordinates of a sample; None takes that number.

    Attributes:
        index: The chosen coordinates, (B, k).
        used: False where `index` is padding, (B, k) bool.
    """

    def __init__(self, chosen: Tensor, most: int | None = None) -> None:
        B, n = chosen.shape
        if most is None:
            most = int(chosen.sum(1).max()) if B else 0
        self.index = chosen.to(torch.uint8).topk(most, dim=1).indices
        self.used = chosen.gather(1, self.index)
        self.n = n

    def take(self, r: Tensor) -> Tensor:
        """Return the chosen entries of r (B, n) as (B, k), with zeros in the padding."""
        return torch.where(self.used, r.gather(1, self.index), 0)

    def put(self, y: Tensor) -> Tensor:
        """Return y (B, k) in its coordinates as (B, n), zero elsewhere; y must be zero in the padding."""
        return y.new_zeros(len(y), self.n).scatter(1, self.index, y)

    def block(self, K: Tensor) -> Tensor:
        """Return the block (B, k, k) of K (n, n) or (B, n, n) on the chosen coordinates, padded by the identity."""
        n = self.n + 1
        at = torch.where(self.used, self.index, self.n)  # padding refers to a row of zeros that is appended to K
        place = at[:, :, None] * n + at[:, None, :]
        if K.dim() == 3:
            place = place + n * n * torch.arange(len(K), device=K.device)[:, None, None]
        block = pad(K, (0, 1, 0, 1)).reshape(-1).index_select(0, place.view(-1)).view(place.shape)
        block.diagonal(dim1=1, dim2=2).add_(~self.used)
        return block


def times(K: Tensor, x: Tensor) -> Tensor:
    """Return K x (B, n) for symmetric K, (n, n) or (B, n, n)."""
    return x @ K if K.dim() == 2 else matvec(K, x)
