"""Batched solvers of the adjoint equation v = Phi^T v + g (paper eqs. 25-26).

A linear solver is a frozen dataclass called as ``solver(vjp, g, phi=None) -> (v, info)`` where

- ``vjp`` maps v of shape (B, N) to Phi^T v of shape (B, N), row by row independent,
- ``g`` of shape (B, N) is the incoming cotangent,
- ``phi``, if given, is the matrix itself, a `Phi`: made and factored when asked for, and kept for other right-hand
  sides at the same point. ``phi.closed_form`` tells whether making it costs no products; a closed form may be sparse.

Every sample stops on its own: `LinearSolveInfo` holds, per sample, the number of products with Phi^T it took, the
relative residual ||g + Phi^T v - v|| / ||g|| *measured at the returned v*, and whether that is below tolerance.
No solver raises on a sample that fails; the policy is the caller's (`foldopt.fold(on_failure=...)`).
"""

from foldopt.linear_solve._base import LinearSolveInfo, LinearSolver
from foldopt.linear_solve._choice import SOLVERS, Auto, linear_solver
from foldopt.linear_solve._dense import Direct, LeastSquares
from foldopt.linear_solve._iteration import LFPI, Anderson
from foldopt.linear_solve._krylov import GMRES, BiCGSTAB
from foldopt.linear_solve._phi import Phi
from foldopt.linear_solve._warm_start import WarmStart

__all__ = [
    "GMRES",
    "LFPI",
    "SOLVERS",
    "Anderson",
    "Auto",
    "BiCGSTAB",
    "Direct",
    "LeastSquares",
    "LinearSolveInfo",
    "LinearSolver",
    "Phi",
    "WarmStart",
    "linear_solver",
]
