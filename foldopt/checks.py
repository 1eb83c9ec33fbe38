"""Checks of scalar arguments, with errors that name them."""

from __future__ import annotations

from typing import Any

from foldopt.errors import InputError


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise InputError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value}: expected a whole number of at least {least}.")


def require_positive(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name}={value}: expected a number above 0.")
