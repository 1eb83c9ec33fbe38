"""Dual proximal gradient (FDPG) as an update step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foldopt.batched import matvec
from foldopt.checks import require_positive
from foldopt.errors import InputError

__all__ = ["DualProximalGradient"]


class DualProximalGradient(nn.Module):
    """One dual proximal gradient step for min_x 1/2 |x - d|^2 + g(D x); its state is the dual w, (B, m).

    With u = d + D'w the step is w -> w - s (D u - prox_{g/s}(D u - w / s)). At the fixed point x = u is the solution,
    which `primal` returns. FDPG is this step with Nesterov's momentum, which does not change the fixed point. The paper
    has s = 1/4, which is right only for the differencing operator, with |D|_2^2 <= 4.

    The step is called as ``step(w, D, d, *params)`` with D (m, n) or (B, m, n) and d (B, n).

    Args:
        prox: ``prox(v, t, D, d, *params) -> v``, the proximal operator of t g for v (B, m), such as
            ``lambda v, t, D, d, weight: soft_threshold(v, t * weight)``.
        stepsize: s, above 0; None, the default, takes 1 / |D|_2^2 of the given D. The folded gradient does not depend
            on it.

    Raises:
        InputError: prox cannot be called, or stepsize is not above 0.

    Source: paper, eq. 28; Beck, First-Order Methods in Optimization (2017), chapter 12.

    Examples:
        >>> step = foldopt.DualProximalGradient(lambda v, t, D, d: foldopt.prox.soft_threshold(v, t))
        >>> w, D, d = torch.zeros(1, 2), torch.eye(2), torch.tensor([[3.0, 0.5]])
        >>> w = step(w, D, d)
        >>> step.primal(w, D, d)
        tensor([[2., 0.]])
    """

    def __init__(self, prox: Callable[..., Tensor], stepsize: float | None = None) -> None:
        super().__init__()
        if not callable(prox):
            raise InputError(f"prox={prox!r} is not callable; expected prox(v, t, D, d, *params).")
        if stepsize is not None:
            require_positive("stepsize", stepsize)
        self.prox, self.stepsize = prox, stepsize

    def forward(self, w: Tensor, D: Tensor, d: Tensor, *params: Tensor) -> Tensor:
        """Return the dual after one step.

        Args:
            w: dual, (B, m).
            D: matrix, (m, n) or (B, m, n).
            d: data, (B, n).
            *params: further parameters of the proximal operator.

        Returns:
            The dual, (B, m).
        """
        s = self._step(D)
        u = self.primal(w, D, d)
        Du = u @ D.mT if D.dim() == 2 else matvec(D, u)
        return w - s * (Du - self.prox(Du - w / s, 1 / s, D, d, *params))

    @staticmethod
    def primal(w: Tensor, D: Tensor, d: Tensor) -> Tensor:
        """Return x = d + D'w, (B, n)."""
        return d + (w @ D if D.dim() == 2 else matvec(D.mT, w))

    @staticmethod
    def dual(x: Tensor, D: Tensor, d: Tensor) -> Tensor:
        """Return the dual w, (B, m), of least norm with D'w = x - d; it is the only one if D has full row rank."""
        return torch.einsum("...nm,...n->...m", torch.linalg.pinv(D), x - d)

    def _step(self, D: Tensor) -> Tensor:
        """Return the stepsize, one per sample if each has its own D."""
        if self.stepsize is not None:
            return D.new_tensor(self.stepsize)
        s = torch.linalg.matrix_norm(D.detach(), 2).square().reciprocal()
        return s[:, None] if s.dim() else s
