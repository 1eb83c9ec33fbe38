"""Dual proximal gradient (FDPG) as an update step (paper eq. 28)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foldopt.batched import matvec
from foldopt.checks import require_positive
from foldopt.errors import InputError

__all__ = ["DualProximalGradient"]


class DualProximalGradient(nn.Module):
    """One dual proximal gradient step for min_x 1/2 |x - d|^2 + g(D x), on the dual w of shape (B, m).

    w -> w - s (D u - prox_{g/s}(D u - w / s)) with u = d + D'w; ``primal`` reads x = u out. FDPG is this step with
    Nesterov's momentum, which the fixed point does not see. Beck, First-Order Methods in Optimization (2017), ch. 12.
    Eq. 28 has s = 1/4, right for the differencing operator alone, of which |D|^2 <= 4.

    Args:
        prox: prox(v, t, D, d, *params) -> v, the proximal operator of t g, such as
            ``lambda v, t, D, d, weight: soft_threshold(v, t * weight)``.
        stepsize: s > 0; None takes 1 / |D|_2^2 of the D at hand. The folded gradient does not depend on it.

    Parameters of the step: D (m, n) or (B, m, n), d (B, n), and those of the prox.
    """

    def __init__(self, prox: Callable[..., Tensor], stepsize: float | None = None) -> None:
        super().__init__()
        if not callable(prox):
            raise InputError(f"prox={prox!r} is not callable; expected prox(v, t, D, d, *params).")
        if stepsize is not None:
            require_positive("stepsize", stepsize)
        self.prox, self.stepsize = prox, stepsize

    def forward(self, w: Tensor, D: Tensor, d: Tensor, *params: Tensor) -> Tensor:
        """Return the dual after one step."""
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
        """Return the dual w (B, m) of least norm with D'w = x - d: the only one if D has full row rank."""
        return torch.einsum("...nm,...n->...m", torch.linalg.pinv(D), x - d)

    def _step(self, D: Tensor) -> Tensor:
        if self.stepsize is not None:
            return D.new_tensor(self.stepsize)
        s = torch.linalg.matrix_norm(D.detach(), 2).square().reciprocal()
        return s[:, None] if s.dim() else s
