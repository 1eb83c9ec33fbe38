"""A learned linear operator, the only parameter of the denoiser."""

from __future__ import annotations

from torch import Tensor, nn

from experiments.problems.denoising import differencing
from foldopt.errors import InputError


class Operator(nn.Module):
    """The operator D itself, (n_outputs, n_inputs), whatever the inputs; starts as the differencing operator.

    zero_sum: subtract each row's mean, so that D x does not depend on the level of x.
    """

    def __init__(self, n_inputs: int, n_outputs: int, zero_sum: bool) -> None:
        super().__init__()
        if n_outputs != n_inputs - 1:
            raise InputError(
                f"model=operator starts as the differencing operator, {(n_inputs - 1, n_inputs)}, but the task asks "
                f"for {(n_outputs, n_inputs)}; choose model=mlp."
            )
        self.D = nn.Parameter(differencing(n_inputs))
        self.zero_sum = zero_sum

    def forward(self, inputs: Tensor) -> Tensor:
        """Return D."""
        return self.D - self.D.mean(1, keepdim=True) if self.zero_sum else self.D.clone()
