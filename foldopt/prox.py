"""Proximal operators prox(x) = argmin_y t g(y) + 1/2 |y - x|^2, for batches, with exact derivatives.

They are parts of proximal gradient steps (`foldopt.ProximalGradient`, `foldopt.DualProximalGradient`). The proximal
operator of the indicator function of a set is the projection on it; these are in `foldopt.projections`. NaN and inf in
x raise `InputError`, except inside a layer's step, where the sample comes out as NaN and the layer reports it.

Source: Parikh and Boyd, Proximal Algorithms (2014), chapter 6.
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
    """Proximal operator of t |y|_1: sign(x) max(|x| - t, 0), for every entry.

    Args:
        x: tensor of any shape.
        t: weight, at least 0: a number or a tensor that broadcasts against x.

    Returns:
        Tensor of the shape of x.

    Raises:
        InputError: x holds NaN or inf, or t is negative or not finite.

    Examples:
        >>> foldopt.prox.soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2., -0., -1.])
    """
    t = _weight(t, x)
    return x.sign() * (x.abs() - t).clamp(min=0)


def l2_norm(x: Tensor, t: Tensor | float) -> Tensor:
    """Proximal operator of t |y|_2: x max(1 - t / |x|, 0), which shortens every vector by t.

    Args:
        x: vectors (..., n); the norm is taken along the last dimension.
        t: weight, at least 0: a number or a tensor that broadcasts against (...).

    Returns:
        Tensor of the shape of x.

    Raises:
        InputError: x holds NaN or inf, or t is negative or not finite.

    Examples:
        >>> foldopt.prox.l2_norm(torch.tensor([[3.0, 4.0]]), 2.5)
        tensor([[1.5000, 2.0000]])
    """
    t = _weight(t, x)
    norm = torch.linalg.vector_norm(x, dim=-1)
    moved = norm > t
    scale = torch.where(moved, 1 - t / torch.where(moved, norm, 1.0), 0.0)
    return scale[..., None] * x


def group_soft_threshold(x: Tensor, t: Tensor | float, groups: int) -> Tensor:
    """Proximal operator of t times the sum of the norms of equal, consecutive groups of entries.

    Args:
        x: vectors (B, n).
        t: weight, at least 0: a number or a tensor that broadcasts against (B, groups).
        groups: number of groups; it divides n.

    Returns:
        Tensor (B, n).

    Raises:
        InputError: x is not (B, n), groups does not divide n, x holds NaN or inf, or t is negative or not finite.

    Examples:
        >>> foldopt.prox.group_soft_threshold(torch.tensor([[3.0, 4.0, 0.3, 0.4]]), 2.5, groups=2)
        tensor([[1.5000, 2.0000, 0.0000, 0.0000]])
    """
    if x.dim() != 2 or x.shape[1] % groups:
        raise InputError(
            f"x has shape {tuple(x.shape)} and groups={groups}: expected (B, n) with n a multiple of groups."
        )
    return l2_norm(x.unflatten(1, (groups, -1)), t).flatten(1)


def entropy(x: Tensor, t: Tensor | float) -> Tensor:
    """Proximal operator of t sum y log y: the y > 0 with y + t (1 + log y) = x.

    In closed form y = t W(exp(x / t - 1) / t), where W is Lambert's function. W is computed by Newton's method on
    w + log w = z. Only the last two Newton steps are recorded for autograd. Each of them doubles the order up to which
    the derivatives are right, so they are exact up to the third.

    Args:
        x: tensor of any shape.
        t: weight, above 0: a number or a tensor that broadcasts against x.

    Returns:
        Tensor of the shape of x, all entries positive.

    Raises:
        InputError: x holds NaN or inf, or t is not above 0 or not finite.

    Source: Corless et al., On the Lambert W function (1996).

    Examples:
        >>> foldopt.prox.entropy(torch.tensor([1.0, 2.0]), 1.0)
        tensor([0.5671, 1.0000])
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
    """Return t as a tensor like x; raise InputError unless x is finite and t is finite and at least 0."""
    require_finite(x=x)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if not ((t >= 0) & (t < torch.inf)).all():
        raise InputError("t holds negative values, NaN or inf; the weight of a proximal operator is a number >= 0.")
    return t
