"""The reasons for which foldopt refuses a solution or a derivative, by the errors that it raises."""

from __future__ import annotations

from foldopt.errors import (
    DependentRowsError,
    InfeasibleError,
    KinkError,
    LimitError,
    NonconvexError,
    NotUniqueError,
    UnboundedError,
)

DEGENERATE: dict[type[Exception], str] = {
    KinkError: "kink",
    NotUniqueError: "not unique",
    DependentRowsError: "dependent rows",
}
REASONS = DEGENERATE | {
    InfeasibleError: "infeasible",
    UnboundedError: "unbounded",
    NonconvexError: "nonconvex",
    LimitError: "limit reached",
}


def reason(error: Exception, reasons: dict[type[Exception], str] = REASONS) -> str:
    """Return the reason that stands for an error, "" if `reasons` has none."""
    return next((text for kind, text in reasons.items() if isinstance(error, kind)), "")
