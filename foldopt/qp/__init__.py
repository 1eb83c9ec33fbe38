"""Quadratic programs: sparse matrices as arguments of `foldopt.QPLayer`, and the multipliers that it returns.

The layer and its engine are in the modules whose names begin with an underscore; start reading at `_engine.solve`.
"""

from foldopt.qp._duals import Duals
from foldopt.qp.matrix import Pattern, SparseMatrix

__all__ = ["Duals", "Pattern", "SparseMatrix"]
