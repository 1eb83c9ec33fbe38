"""Is this layer right? `check` reports on a folded layer; traces show how its backward pass converges."""

from foldopt.diagnostics._check import GradientCheck, Report, check
from foldopt.diagnostics._convergence import (
    BackwardTrace,
    StepsizeRow,
    agreement,
    backward_trace,
    spectral_radius,
    stepsize_study,
)

__all__ = [
    "BackwardTrace",
    "GradientCheck",
    "Report",
    "StepsizeRow",
    "agreement",
    "backward_trace",
    "check",
    "spectral_radius",
    "stepsize_study",
]


def __dir__() -> list[str]:
    return __all__
