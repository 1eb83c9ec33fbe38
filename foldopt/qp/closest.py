"""The closest feasible program: the least shift of its right-hand sides that gives an infeasible one a solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldopt.step import Tensors

Layer = Callable[..., Tensor]


def shifted(params: Tensors, norm: str, make: Callable[..., Any]) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """Return the params with h and b shifted where a sample is infeasible, and the shifts (B, m) >= 0 and (B, k).

    params: Q, p, G, h, A, b, lower, upper as `foldopt.qp.layer.arguments` returns them. norm: "l1", the least sum of
    violations, or "l2", the least sum of squares. make: makes a `QPLayer`. The shifts are solutions of a quadratic
    program themselves and differentiable; bounds of the variables are kept, and a sample that these alone contradict
    stays infeasible. Bambade, Schramm, El Kazdadi, Caron, Taylor and Carpentier, Leveraging augmented-Lagrangian
    techniques for differentiating over infeasible quadratic programs in machine learning (2024), as proxsuite's layer.
    """
    _, p, G, h, A, b, lower, upper = params
    n, m, k = p.shape[-1], h.shape[-1], b.shape[-1]
    probe = make(on_failure="nan")
    with torch.no_grad():
        B = len(probe(*params[:6], lower=_given(lower), upper=_given(upper)))
    bad = torch.tensor([s == "infeasible" for s in probe.last.status], device=p.device).nonzero()[:, 0]
    none = p.new_zeros(B, m), p.new_zeros(B, k)
    if not len(bad) or not m + k:
        return params, none
    G, h, A, b, lower, upper = (
        t[bad] if t.dim() == dim and len(t) == B else t
        for t, dim in ((G, 3), (h, 2), (A, 3), (b, 2), (lower, 2), (upper, 2))
    )
    s, t = _least(n, m, k, len(bad), norm, (G, h, A, b, lower, upper), make)
    s, t = (whole.index_put((bad,), part) for whole, part in zip(none, (s, t), strict=True))
    Q, p, G, h, A, b, lower, upper = params
    return (Q, p, G, h + s if m else h, A, b + t if k else b, lower, upper), (s, t)


def _given(bound: Tensor) -> Tensor | None:
    return bound if bound.numel() else None


def _least(n: int, m: int, k: int, B: int, norm: str, rows: Tensors, make: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Return the least shifts s >= 0 of h and t of b; for "l1" t is the difference of two that are not negative."""
    G, h, A, b, lower, upper = rows
    signs = (1,) if norm == "l2" else (1, -1)
    free = len(signs) * k
    total = n + m + free

    def widened(M: Tensor, right: list[Tensor]) -> Tensor:
        return torch.cat([M, *(part.expand(*M.shape[:-2], *part.shape) for part in right)], -1)

    zero = G.new_zeros
    G = widened(G, [-torch.eye(m, dtype=G.dtype, device=G.device), zero(m, free)])
    A = widened(A, [zero(k, m), *(-sign * torch.eye(k, dtype=A.dtype, device=A.device) for sign in signs)])
    least = torch.cat([zero(m), torch.full((free,), -torch.inf if norm == "l2" else 0.0).to(G)])
    low, high = (
        torch.cat([bound if bound.numel() else zero(n) + end, new.expand(*bound.shape[:-1], m + free)], -1)
        for bound, end, new in ((lower, -torch.inf, least), (upper, torch.inf, zero(m + free) + torch.inf))
    )
    weight = torch.cat([zero(n), zero(m + free) + 1])
    Q, p = (torch.diag(weight), zero(total)) if norm == "l2" else (zero(total, total), weight)
    layer = make(degenerate="least_norm", on_failure="nan")
    z = layer(Q, p.expand(B, total), G, h, A, b, lower=low, upper=high)
    found = [part.nan_to_num() for part in z[:, n:].split([m, *[k] * len(signs)], 1)]
    return found[0], found[1] if norm == "l2" else found[1] - found[2]
