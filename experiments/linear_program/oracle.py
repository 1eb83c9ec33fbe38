"""HiGHS as the oracle of one linear or integer program, whose costs change from call to call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.linear_program.polytope import Polytope
from foldopt.errors import MissingDependencyError, SolverError


class Highs:
    """Solves min c'x over a polytope with HiGHS (Huangfu and Hall, 2018); x is whole where the polytope says so.

    The model is built once; each solve of a linear program begins at the basis of the one before it.
    """

    def __init__(self, polytope: Polytope) -> None:
        try:
            import highspy
        except ImportError as error:
            raise MissingDependencyError(
                "task=linear_program needs HiGHS; install it with: pip install 'foldopt[qp]'"
            ) from error
        import scipy.sparse as sp

        self._solver = highspy._core._Highs()  # its subclass Highs prints a banner
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("parallel", "off")
        self._solver.setOptionValue("mip_rel_gap", 0.0)
        rows = sp.csc_matrix(np.concatenate([polytope.A.numpy(), polytope.G.numpy()]))
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = polytope.n, rows.shape[0]
        model.col_cost_ = np.zeros(polytope.n)
        model.col_lower_, model.col_upper_ = np.zeros(polytope.n), np.full(polytope.n, polytope.upper)
        b, h = polytope.b.numpy(), polytope.h.numpy()
        model.row_lower_, model.row_upper_ = np.concatenate([b, np.full(len(h), -np.inf)]), np.concatenate([b, h])
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.num_col_, model.a_matrix_.num_row_ = polytope.n, rows.shape[0]
        model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = rows.indptr, rows.indices, rows.data
        if polytope.whole:
            model.integrality_ = [highspy.HighsVarType.kInteger] * polytope.n
        self._solver.passModel(model)
        self._optimal: Any = highspy.HighsModelStatus.kOptimal
        self._columns, self._whole = np.arange(polytope.n, dtype=np.int32), polytope.whole

    def __call__(self, costs: Tensor) -> Tensor:
        """Return the solutions (B, n) for costs (B, n), float64 on the CPU.

        Raises SolverError where HiGHS does not prove optimality.
        """
        found = np.empty(costs.shape)
        for row, cost in enumerate(costs.detach().double().cpu().numpy()):
            self._solver.changeColsCost(len(cost), self._columns, cost)
            self._solver.run()
            status = self._solver.getModelStatus()
            if status != self._optimal:
                raise SolverError(
                    f"HiGHS ended with status {self._solver.modelStatusToString(status)!r} on sample {row} of the "
                    "batch; the program must be feasible and bounded for every cost."
                )
            found[row] = self._solver.getSolution().col_value
        return torch.from_numpy(found.round() if self._whole else found)
