"""A learned linear operator, the only parameter of the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.denoising.problem import differencing
from foldopt.checks import require_whole
from foldopt.errors import InputError

STRUCTURES = ("free", "zero_sum", "filter")


class Operator(nn.Module):
    """A model that returns an operator D, (n_outputs, n_inputs), for any inputs; D starts as the differencing one.

    Args:
        n_inputs: Length of the signals.
        n_outputs: Number of rows of D, n_inputs - 1.
        structure: "free" learns every entry. "zero_sum" subtracts the mean of each row, so that D x does not depend on
            the level of x. "filter" learns one filter on the differences of x that all rows share, and the logarithm of
            a weight for each row; these rows sum to zero, too.
        half_width: The filter has 2 half_width + 1 taps.

    Raises:
        InputError: The sizes are not those of a differencing operator, or an option is out of range.
    """

    def __init__(self, n_inputs: int, n_outputs: int, structure: str, half_width: int) -> None:
        super().__init__()
        if n_outputs != n_inputs - 1:
            raise InputError(
                f"model=operator is an operator of shape {(n_inputs - 1, n_inputs)}, but the task asks for "
                f"{(n_outputs, n_inputs)}; choose model=mlp."
            )
        if structure not in STRUCTURES:
            raise InputError(f"model.structure={structure!r} is unknown; choose one of {STRUCTURES}.")
        require_whole("model.half_width", half_width, 0)
        self.structure, self.half_width = structure, half_width
        start = differencing(n_inputs)
        if structure == "filter":
            self.log_weights = nn.Parameter(torch.zeros(n_outputs, dtype=start.dtype))
            self.taps = nn.Parameter(torch.eye(2 * half_width + 1, dtype=start.dtype)[half_width].clone())
            self.differences: Tensor
            self.register_buffer("differences", start, persistent=False)
        else:
            self.D = nn.Parameter(start)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return D."""
        if self.structure == "filter":
            return self.log_weights.exp()[:, None] * self._filtered()
        return self.D - self.D.mean(1, keepdim=True) if self.structure == "zero_sum" else self.D.clone()

    def _filtered(self) -> Tensor:
        """Return the product of the banded Toeplitz matrix of the taps with the differencing operator."""
        place = torch.arange(len(self.log_weights), device=self.taps.device)
        offset = place - place[:, None] + self.half_width
        inside = (offset >= 0) & (offset <= 2 * self.half_width)
        taps = self.taps[offset.clamp(0, 2 * self.half_width)]
        return torch.where(inside, taps, 0) @ self.differences
