"""Checks of arguments, with errors that name them."""

from __future__ import annotations

import math
import types
import typing
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from foldopt._compat import transforming
from foldopt.errors import InputError

__all__ = [
    "NONFINITE_ALLOWED",
    "WORDS",
    "nonfinite_allowed",
    "require_finite",
    "require_positive",
    "require_type",
    "require_whole",
]

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
NONFINITE_ALLOWED = ContextVar("nonfinite_allowed", default=False)


def nonfinite_allowed() -> bool:
    """Return whether a layer, or a transform of torch.func, is calling; failed samples then come out as NaN.

    The caller certifies every sample: one that is not finite is no reason to stop the others.
    """
    return NONFINITE_ALLOWED.get() or transforming()


def require_finite(**tensors: Tensor | float) -> None:
    """Raise InputError if one of `tensors` holds NaN or inf, naming it and its rows; not where `nonfinite_allowed`."""
    if nonfinite_allowed():
        return
    for name, value in tensors.items():
        value = torch.as_tensor(value)
        if value.sum().isfinite():  # a tenth of the time of looking at every entry
            continue
        finite = value.isfinite()
        if not finite.all():
            rows = (~finite).reshape(len(finite) if finite.dim() else 1, -1).any(1).nonzero()[:, 0].tolist()
            raise InputError(
                f"{name} of shape {tuple(finite.shape)} holds NaN or inf, first in rows {rows[:10]}; "
                "check the network or the data that made it."
            )


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise InputError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value}: expected a whole number of at least {least}.")


def require_positive(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name}={value}: expected a number above 0.")


def require_type(name: str, value: Any, annotation: Any) -> None:
    """Raise InputError unless `value` is of the plain type, or one of the union, that a signature asks for.

    A whole number will do where a number is expected; NaN and inf do not. Other annotations are let pass.
    """
    kinds = typing.get_args(annotation) or (annotation,)
    if not all(kind in WORDS for kind in kinds):
        return
    is_number = float in kinds and isinstance(value, int | float) and not isinstance(value, bool)
    exact = type(value) in kinds
    if not (is_number or exact) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name}={value}: expected {' or '.join(WORDS[kind] for kind in kinds)}.")
