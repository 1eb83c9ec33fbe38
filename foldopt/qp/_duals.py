"""The multipliers of a quadratic program."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Duals(NamedTuple):
    """The multipliers of a batch of quadratic programs, as ``QPLayer(return_duals=True)`` returns them.

    They belong to the Lagrangian 1/2 x'Qx + p'x + v'(Gx - h) + w'(Ax - b) + u'x with v, w and u for the fields G, A and
    bounds, so that Qx + p + G'v + A'w + u = 0 at a solution. They are differentiable as x is.

    Attributes:
        A: (B, k), of the equalities.
        G: (B, m), of the inequalities, at least 0.
        bounds: (B, n), of the bounds: positive at an upper bound, negative at a lower one, 0 if there are no bounds.

    Examples:
        >>> layer = foldopt.QPLayer(return_duals=True)
        >>> x, duals = layer(torch.eye(2), torch.tensor([-3.0, 1.0]), lower=0, upper=2)
        >>> x
        tensor([[2., 0.]])
        >>> duals.bounds
        tensor([[ 1., -1.]])
    """

    A: Tensor
    G: Tensor
    bounds: Tensor
