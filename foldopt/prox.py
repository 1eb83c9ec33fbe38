"""Proximal operators prox(x) = argmin_y t g(y) + 1/2 |y - x|^2, batched, with exact derivatives.

Parikh and Boyd, Proximal Algorithms (2014), chapter 6. The indicator function of a set has its projection as proximal
operator: see `foldopt.projections`, which also says what happens to NaN and inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foldopt.checks import require_finite
from foldopt.errors import InputError

__all__ = ["NEWTON_STEPS", "entropy", "group_soft_threshold", "l2_norm", "soft_threshold"]


def __dir__() -> list[str]:
    return __all__


NEWTON_STEPS = 8


def soft_threshold(x: Tensor, t: Tensor | float) -> Tensor:
    """Proximal operator of t |y|_1: sign(x) max(|x| - t, 0). t: number or tensor that broadcasts against x, >= 0."""
    t = _weight(t, x)
    return x.sign() * (x.abs() - t).clamp(min=0)


def l2_norm(x: Tensor, t: Tensor | float) -> Tensor:
    """Proximal operator of t |y|_2: x max(1 - t / |x|, 0).

    x: (..., n), norms along the last dimension. t: number, or tensor that broadcasts against (...), >= 0.
    """
    t = _weight(t, x)
    norm = torch.linalg.vector_norm(x, dim=-1)
    moved = norm > t
    scale = torch.where(moved, 1 - t / torch.where(moved, norm, 1.0), 0.0)
    return scale[..., None] * x


def group_soft_threshold(x: Tensor, t: Tensor | float, groups: int) -> Tensor:
    """Proximal operator of t times the sum of the norms of `groups` equal consecutive groups of each x (B, n).

    Raises InputError where `groups` does not divide n.
    """
    if x.dim() != 2 or x.shape[1] % groups:
        raise InputError(
            f"x has shape {tuple(x.shape)} and groups={groups}: expected (B, n) with n a multiple of groups."
        )
    return l2_norm(x.unflatten(1, (groups, -1)), t).flatten(1)


def entropy(x: Tensor, t: Tensor | float) -> Tensor:
    """Proximal operator of t sum y log y: the y > 0 with y + t (1 + log y) = x, that is t W(exp(x / t - 1) / t).

    t: number or tensor that broadcasts against x, above 0. W is Lambert's function, evaluated by Newton's method on
    w + log w = z. Its last two steps are recorded: as each doubles the order that is right, derivatives are exact up to
    the third.
    """
    t = _weight(t, x)
    if (t <= 0).any():
        raise InputError("t of the entropy holds values that are not above 0; it is a smoothing weight.")
    z = x / t - 1 - t.log()
    with torch.no_grad():
        log_w = torch.where(z < 1, z - z.clamp(max=1).exp().log1p(), z.clamp(min=1).log())
        for _ in range(NEWTON_STEPS):
            log_w = log_w - (log_w.exp() + log_w - z) / (log_w.exp() + 1)
    for _ in range(2):
        log_w = log_w - (log_w.exp() + log_w - z) / (log_w.exp() + 1)
    return t * log_w.exp()


def _weight(t: Tensor | float, x: Tensor) -> Tensor:
    require_finite(x=x)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if not ((t >= 0) & (t < torch.inf)).all():
        raise InputError("t holds negative values, NaN or inf; the weight of a proximal operator is a number >= 0.")
    return t
