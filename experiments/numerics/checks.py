"""The check of a batch that every problem makes before it solves."""

from __future__ import annotations

from torch import Tensor

from foldopt.errors import InputError


def require_finite(name: str, value: Tensor, remedy: str, rows: str = "samples") -> None:
    """Raise InputError for NaN or inf in `value`, (B, n), with the batch indices; remedy: what to do about it."""
    bad = (~value.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise InputError(f"{name} holds NaN or inf in {len(bad)} of {len(value)} {rows}, first {bad[:10]}; {remedy}.")
