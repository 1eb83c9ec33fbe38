"""The check for finite parameters that every problem makes before it solves."""

from __future__ import annotations

from torch import Tensor

from foldopt.errors import InputError


def require_finite(name: str, value: Tensor, remedy: str, rows: str = "samples") -> None:
    """Raise InputError if `value` (B, n) holds NaN or inf.

    Args:
        name: Name of the parameter, for the message.
        value: The parameter.
        remedy: What the user can do about it, for the message.
        rows: What a row stands for, for the message.
    """
    bad = (~value.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise InputError(f"{name} holds NaN or inf in {len(bad)} of {len(value)} {rows}, first {bad[:10]}; {remedy}.")
