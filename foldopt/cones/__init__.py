"""Closed convex cones: projections with first and second derivatives in closed form, and a batched interior point.

`ProductCone` is the cone K of a conic program min x'Px/2 + q'x, Ax + s = b, s in K. Its factors are `Zero`, `Free`,
`Nonnegative`, `SecondOrder`, `Semidefinite`, `Exponential` and `Power`, and the `Dual` of each. `solve_cone_program`
solves batches of programs with equalities, inequalities and second-order cones.
"""

from foldopt.cones._base import Cone, Dual
from foldopt.cones._elementwise import Free, Nonnegative, Zero
from foldopt.cones._exponential import Exponential
from foldopt.cones._interior_point import ConeSolution, solve_cone_program
from foldopt.cones._power import Power
from foldopt.cones._product import BlockDiagonal, ProductCone
from foldopt.cones._second_order import SecondOrder
from foldopt.cones._semidefinite import Semidefinite, smat, svec

__all__ = [
    "BlockDiagonal",
    "Cone",
    "ConeSolution",
    "Dual",
    "Exponential",
    "Free",
    "Nonnegative",
    "Power",
    "ProductCone",
    "SecondOrder",
    "Semidefinite",
    "Zero",
    "smat",
    "solve_cone_program",
    "svec",
]
