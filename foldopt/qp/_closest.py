"""The closest feasible program: moves the right-hand sides of an infeasible program by as little as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foldopt.qp._operations import Matrix, assembled, diagonal, identity, joined, zeros
from foldopt.qp.matrix import Pattern, SparseMatrix
from foldopt.step import Tensors

Patterns = tuple[Pattern | None, Pattern | None, Pattern | None]  # of Q, G and A; None: dense


def shifted_to_feasible(
    params: Tensors, patterns: Patterns, norm: str, make: Callable[..., Any]
) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """Return the params with h and b shifted in infeasible samples, and the shifts (B, m) >= 0 and (B, k).

    The shifts solve a quadratic program of their own and are differentiable. Bounds of the variables are not shifted: a
    sample whose bounds contradict each other stays infeasible.

    Args:
        params: Q, p, G, h, A, b, lower, upper as `foldopt.qp._arguments.arguments` returns them; in place of sparse
            matrices their values.
        patterns: the sparsity patterns of Q, G and A, None for dense ones.
        norm: "l1" for the least sum of violations, "l2" for the least sum of their squares.
        make: makes a `QPLayer`.

    Returns:
        The shifted params, and the shifts of h and of b.

    Source: Bambade, Schramm, El Kazdadi, Caron, Taylor and Carpentier, Leveraging augmented-Lagrangian techniques for
    differentiating over infeasible quadratic programs in machine learning (2024), as in proxsuite's layer.
    """
    Q, p, G, h, A, b, lower, upper = params
    matrices = [joined(pattern, M) for pattern, M in zip(patterns, (Q, G, A), strict=True)]
    n, m, k = p.shape[-1], h.shape[-1], b.shape[-1]
    probe = make(on_failure="nan")
    with torch.no_grad():
        own, rows, equations = matrices
        B = len(probe(own, p, rows, h, equations, b, lower=_given(lower), upper=_given(upper)))
    bad = torch.tensor([s == "infeasible" for s in probe.last.status], device=p.device).nonzero()[:, 0]
    none = p.new_zeros(B, m), p.new_zeros(B, k)
    if not len(bad) or not m + k:
        return params, none
    h, b, lower, upper = (v[bad] if v.dim() == 2 and len(v) == B else v for v in (h, b, lower, upper))
    some = _batch(rows, bad, B), _batch(equations, bad, B)
    s, t = _least(n, m, k, len(bad), norm, some, (h, b, lower, upper), make)
    s, t = (whole.index_put((bad,), part) for whole, part in zip(none, (s, t), strict=True))
    Q, p, G, h, A, b, lower, upper = params
    return (Q, p, G, h + s if m else h, A, b + t if k else b, lower, upper), (s, t)


def _given(bound: Tensor) -> Tensor | None:
    return bound if bound.numel() else None


def _batch(M: Matrix, samples: Tensor, B: int) -> Matrix:
    """Return some samples of a matrix, (len(samples), m, n); (1, m, n) if the whole batch of B shares it."""
    if isinstance(M, SparseMatrix):
        values = M.values if M.values.dim() == 2 else M.values[None]
        return SparseMatrix(M.pattern, values[samples] if len(values) == B else values)
    M = M if M.dim() == 3 else M[None]
    return M[samples] if len(M) == B else M


def _argument(M: Matrix) -> Matrix:
    """Return M in the form in which a layer takes it: a batch of one becomes a shared matrix."""
    if len(M) > 1:
        return M
    return SparseMatrix(M.pattern, M.values[0]) if isinstance(M, SparseMatrix) else M[0]


def _least(
    n: int, m: int, k: int, B: int, norm: str, rows: tuple[Matrix, Matrix], right: Tensors, make: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Return the least shifts s >= 0 of h and t of b; with "l1" t is the difference of two nonnegative variables."""
    (G, A), (h, b, lower, upper) = rows, right
    signs = (1,) if norm == "l2" else (1, -1)
    free = len(signs) * k
    total = n + m + free
    zero = h.new_zeros
    G = assembled([[G, identity(G, m, -1.0), zeros(G, m, free)]])
    A = assembled([[A, zeros(A, k, m), *(identity(A, k, -float(sign)) for sign in signs)]])
    least = torch.cat([zero(m), torch.full((free,), -torch.inf if norm == "l2" else 0.0).to(h)])
    low, high = (
        torch.cat([bound if bound.numel() else zero(n) + end, new.expand(*bound.shape[:-1], m + free)], -1)
        for bound, end, new in ((lower, -torch.inf, least), (upper, torch.inf, zero(m + free) + torch.inf))
    )
    weight = torch.cat([zero(1, n), zero(1, m + free) + 1], 1)
    Q, p = (diagonal(G, weight), zero(total)) if norm == "l2" else (zeros(G, total, total), weight[0])
    layer = make(degenerate="least_norm", on_failure="nan")
    Q, G, A = (_argument(M) for M in (Q, G, A))
    z = layer(Q, p.expand(B, total), G, h, A, b, lower=low, upper=high)
    found = [part.nan_to_num() for part in z[:, n:].split([m, *[k] * len(signs)], 1)]
    return found[0], found[1] if norm == "l2" else found[1] - found[2]
