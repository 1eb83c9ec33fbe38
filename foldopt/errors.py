"""The errors foldopt raises. Each message names the argument, its value or shape, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DegenerateError",
    "DependentRowsError",
    "FixedPointError",
    "FoldoptError",
    "InfeasibleError",
    "InputError",
    "KinkError",
    "LimitError",
    "LinearSolveError",
    "MissingDependencyError",
    "NoMultipliersError",
    "NonconvexError",
    "NotSmoothError",
    "NotUniqueError",
    "SingularHessianError",
    "SolverError",
    "UnboundedError",
    "UndeclaredParameterError",
]


def __dir__() -> list[str]:
    return __all__


class FoldoptError(Exception):
    """Base of every error raised by foldopt."""


class InputError(FoldoptError, ValueError):
    """An argument has a wrong shape, dtype, device or value (NaN, inf, out of range)."""


class SolverError(FoldoptError, RuntimeError):
    """A forward solver failed on some samples; `indices` lists them (batch positions)."""

    def __init__(self, message: str, indices: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.indices = tuple(indices)


class InfeasibleError(SolverError):
    """No point satisfies the constraints of the samples in `indices`."""


class UnboundedError(SolverError):
    """The objective of the samples in `indices` has no finite optimum."""


class NonconvexError(SolverError):
    """The objective of the samples in `indices` is not convex."""


class LimitError(SolverError):
    """The solver ended without a solution, or a proof that there is none, for the samples in `indices`."""


class NotSmoothError(SolverError):
    """A function of the samples in `indices` has a gradient that jumps near the point where the solver ended."""


class NoMultipliersError(SolverError):
    """The samples in `indices` end at feasible points without multipliers: their active constraints are degenerate."""


class FixedPointError(SolverError):
    """The update step does not fix the solution that the solver returned, for the samples in `indices`."""


class LinearSolveError(SolverError):
    """The adjoint equation v = Phi^T v + g was not solved to tolerance for the samples in `indices`."""


class DegenerateError(SolverError):
    """The samples in `indices` are solved, but their solution has no derivative that is asked for."""


class KinkError(DegenerateError):
    """The solution has different derivatives on the two sides."""


class NotUniqueError(DegenerateError):
    """The program has several solutions, which the incoming gradient tells apart."""


class SingularHessianError(DegenerateError):
    """The Hessian of the Lagrangian is singular along the active constraints: the solution has no derivative."""


class DependentRowsError(DegenerateError):
    """Active rows depend on each other, so the derivative with respect to their right-hand sides is not unique."""


class UndeclaredParameterError(FoldoptError, RuntimeError):
    """The update step uses a tensor that requires grad but was not passed as a parameter."""


class MissingDependencyError(FoldoptError, ImportError):
    """An optional package is not installed; the message says which extra provides it."""
