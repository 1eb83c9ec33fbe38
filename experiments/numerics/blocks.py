"""Small systems in a few of the coordinates, other ones in each sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from foldopt.batched import matvec


class Chosen:
    """Each sample's chosen coordinates in a row, of as many as the sample of most has.

    chosen: (B, n) bool. most: how many there is room for, at least those of any sample. index: (B, k), which
    coordinates. used: (B, k) bool, False where a sample has fewer.
    """

    def __init__(self, chosen: Tensor, most: int | None = None) -> None:
        B, n = chosen.shape
        if most is None:
            most = int(chosen.sum(1).max()) if B else 0
        self.index = chosen.to(torch.uint8).topk(most, dim=1).indices
        self.used = chosen.gather(1, self.index)
        self.n = n

    def take(self, r: Tensor) -> Tensor:
        """Return the chosen entries of r, (B, n), as (B, k); zero where not used."""
        return torch.where(self.used, r.gather(1, self.index), 0)

    def put(self, y: Tensor) -> Tensor:
        """Return (B, n) with y, (B, k), in the chosen coordinates, else zero; y is zero where not used."""
        return y.new_zeros(len(y), self.n).scatter(1, self.index, y)

    def block(self, K: Tensor) -> Tensor:
        """Return the block of K, (n, n) or (B, n, n), on the chosen coordinates, that of identity where not used."""
        n = self.n + 1
        at = torch.where(self.used, self.index, self.n)  # where not used: the row of zeros that K gets
        place = at[:, :, None] * n + at[:, None, :]
        if K.dim() == 3:
            place = place + n * n * torch.arange(len(K), device=K.device)[:, None, None]
        block = pad(K, (0, 1, 0, 1)).reshape(-1).index_select(0, place.view(-1)).view(place.shape)
        block.diagonal(dim1=1, dim2=2).add_(~self.used)
        return block


def times(K: Tensor, x: Tensor) -> Tensor:
    """Return K x, (B, n), for symmetric K (n, n) or (B, n, n)."""
    return x @ K if K.dim() == 2 else matvec(K, x)
