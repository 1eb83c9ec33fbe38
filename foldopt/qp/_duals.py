"""The multipliers of a quadratic program."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Duals(NamedTuple):
    """Multipliers of a QP, of the Lagrangian 1/2 x'Qx + p'x + G'(Gx - h) + A'(Ax - b) + bounds'x.

    A: (B, k). G: (B, m) >= 0. bounds: (B, n), positive at an upper and negative at a lower bound; 0 without bounds.
    """

    A: Tensor
    G: Tensor
    bounds: Tensor
