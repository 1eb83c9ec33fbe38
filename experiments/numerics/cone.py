"""Import of cvxpy and check of the scaling, for the problems' cvxpy forms."""

from __future__ import annotations

from types import ModuleType

from foldopt.errors import InputError, MissingDependencyError

SCALINGS = ("paper", "normalized")


def cvxpy_for(scaling: str) -> ModuleType:
    """Import and return cvxpy. Raises InputError for an unknown scaling, MissingDependencyError without cvxpy."""
    if scaling not in SCALINGS:
        raise InputError(f"scaling={scaling!r} is unknown; choose one of {SCALINGS}.")
    try:
        import cvxpy
    except ImportError as error:
        raise MissingDependencyError(
            "cvxpy is not installed; install it with: pip install 'foldopt[cvxpylayers]'"
        ) from error
    return cvxpy
