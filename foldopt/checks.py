"""Checks of arguments. Their errors name the argument, its value, and what was expected."""

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
    """Return whether values that are not finite may pass: inside a layer's call, or under a transform of torch.func.

    A layer certifies every sample by itself. A sample that is not finite becomes NaN there, and must not stop the
    others.

    Returns:
        True or False.

    Examples:
        >>> foldopt.checks.nonfinite_allowed()
        False
    """
    return NONFINITE_ALLOWED.get() or transforming()


def require_finite(**tensors: Tensor | float) -> None:
    """Check that numbers and tensors are finite; nothing is checked where `nonfinite_allowed`.

    Args:
        **tensors: the values, by the names that the error uses.

    Raises:
        InputError: a value holds NaN or inf; its name, shape and first rows are given.

    Examples:
        >>> foldopt.checks.require_finite(x=torch.tensor([[1.0], [float("nan")]]))
        Traceback (most recent call last):
        foldopt.errors.InputError: x of shape (2, 1) holds NaN or inf, first in rows [1]; ...
    """
    if nonfinite_allowed():
        return
    for name, value in tensors.items():
        value = torch.as_tensor(value)
        if value.sum().isfinite():  # takes a tenth of the time of checking every entry
            continue
        finite = value.isfinite()
        if not finite.all():
            rows = (~finite).reshape(len(finite) if finite.dim() else 1, -1).any(1).nonzero()[:, 0].tolist()
            raise InputError(
                f"{name} of shape {tuple(finite.shape)} holds NaN or inf, first in rows {rows[:10]}; "
                "check the network or the data that made it."
            )


def require_whole(name: str, value: Any, least: int) -> None:
    """Check that an argument is a whole number of at least `least`.

    Args:
        name: name of the argument.
        value: its value.
        least: smallest value allowed.

    Raises:
        InputError: it is no int, or it is smaller.

    Examples:
        >>> foldopt.checks.require_whole("iterations", 0, 1)
        Traceback (most recent call last):
        foldopt.errors.InputError: iterations=0: expected a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value}: expected a whole number of at least {least}.")


def require_positive(name: str, value: Any) -> None:
    """Check that an argument is a finite number above 0.

    Args:
        name: name of the argument.
        value: its value.

    Raises:
        InputError: it is not.

    Examples:
        >>> foldopt.checks.require_positive("stepsize", -1.0)
        Traceback (most recent call last):
        foldopt.errors.InputError: stepsize=-1.0: expected a number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name}={value}: expected a number above 0.")


def require_type(name: str, value: Any, annotation: Any) -> None:
    """Check that an argument has the type that a signature states, if that is a plain type or a union of plain types.

    A whole number passes where a float is expected; NaN and inf do not. Other annotations are not checked.

    Args:
        name: name of the argument.
        value: its value.
        annotation: the type, such as ``float | None``.

    Raises:
        InputError: the value has another type, or is not finite.

    Examples:
        >>> foldopt.checks.require_type("rho", "1", float)
        Traceback (most recent call last):
        foldopt.errors.InputError: rho=1: expected a number.
    """
    kinds = typing.get_args(annotation) or (annotation,)
    if not all(kind in WORDS for kind in kinds):
        return
    is_number = float in kinds and isinstance(value, int | float) and not isinstance(value, bool)
    exact = type(value) in kinds
    if not (is_number or exact) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{name}={value}: expected {' or '.join(WORDS[kind] for kind in kinds)}.")
