"""Batched solvers of the backward equation v = Phi^T v + g (paper, eqs. 25 and 26).

A linear solver is a frozen dataclass, called as ``solver(vjp, g, phi=None) -> (v, info)``:

- ``vjp`` maps v (B, N) to Phi^T v (B, N), every sample by itself;
- ``g`` (B, N) is the incoming cotangent;
- ``phi`` is the matrix itself, a `Phi`: computed and factored on first use and kept for further right-hand sides at the
  same point. ``phi.closed_form`` tells whether computing it needs no products. A closed form may be sparse.

Every sample stops by itself. `LinearSolveInfo` holds for each of them the number of products with Phi^T, the relative
residual ||g + Phi^T v - v|| / ||g|| *measured at the returned v*, and whether it is within tolerance. No solver raises
an error for a sample that fails; the layer applies its policy (``foldopt.fold(on_failure=...)``).
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
