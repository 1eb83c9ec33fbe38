"""The network of the synthetic studies (paper App. E): linear layers with ReLU."""

from __future__ import annotations

from torch import nn

from foldopt.checks import require_whole


class MLP(nn.Sequential):
    """`layers` linear layers, `width` wide between them, each but the last followed by ReLU.

    batch_norm: normalize before each ReLU, by the batch in training and by running averages in evaluation.
    """

    def __init__(self, n_inputs: int, n_outputs: int, layers: int, width: int, batch_norm: bool) -> None:
        require_whole("layers", layers, 1)
        require_whole("width", width, 1)
        sizes = [n_inputs, *[width] * (layers - 1), n_outputs]
        stack: list[nn.Module] = []
        for k in range(layers):
            stack.append(nn.Linear(sizes[k], sizes[k + 1]))
            if k < layers - 1:
                stack += [nn.BatchNorm1d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        super().__init__(*stack)
