"""foldopt: differentiate any black-box solver through one update step at its fixed point.

``fold(solve, update)`` makes a differentiable layer of a solver and one step of any iteration that its solution is a
fixed point of. `QPLayer` (convex quadratic programs), `NLPLayer` (any smooth program, convex or not), `f_sqp`,
`f_pgd_a`, `f_pgd_b` and `f_fdpg` come with their step; `updates`, `projections` and `prox` are the parts to make others
of, and `linear_solve` solves for the cotangent. `verdicts` says of each sample whether its derivative exists, and why
not; ``check(layer, *params)`` reports whether a layer is right. `unroll` and `unfold` are the baselines. All three are
`FixedPointLayer`, with an `Implicit` or `Unrolled` that says how it is differentiated. See
"Backpropagation of Unrolled Solvers with Folded Optimization" (Kotary, Dinh and Fioretto, 2023); equation numbers in
the docstrings are the paper's.
"""

from foldopt import diagnostics, errors, linear_solve, projections, prox, updates, verdicts
from foldopt._certificates import FoldInfo
from foldopt._fold import Implicit, fold, unfold, unroll
from foldopt._implicit import fixed_point_jvp, fixed_point_vjp
from foldopt._layer import FixedPointLayer
from foldopt._sparsity import Sparsity
from foldopt._unrolled import Unrolled
from foldopt.cvxpy.layer import CvxpyLayer
from foldopt.diagnostics import check
from foldopt.layers import NLPLayer, f_fdpg, f_pgd_a, f_pgd_b, f_sqp
from foldopt.qp._layer import QPLayer
from foldopt.updates import ADMM, SQP, DualProximalGradient, ProjectedGradient, ProximalGradient, SmoothProgram
from foldopt.updates.external import ExternalFunction

__version__ = "0.1.0"

__all__ = [
    "ADMM",
    "SQP",
    "CvxpyLayer",
    "DualProximalGradient",
    "ExternalFunction",
    "FixedPointLayer",
    "FoldInfo",
    "Implicit",
    "NLPLayer",
    "ProjectedGradient",
    "ProximalGradient",
    "QPLayer",
    "SmoothProgram",
    "Sparsity",
    "Unrolled",
    "check",
    "diagnostics",
    "errors",
    "f_fdpg",
    "f_pgd_a",
    "f_pgd_b",
    "f_sqp",
    "fixed_point_jvp",
    "fixed_point_vjp",
    "fold",
    "linear_solve",
    "projections",
    "prox",
    "unfold",
    "unroll",
    "updates",
    "verdicts",
]
