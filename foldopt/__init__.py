"""foldopt: differentiate any black-box solver through one update step at its fixed point.

``fold(solve, update)`` makes a differentiable layer of a solver and one step of an iteration that has the solver's
solution as its fixed point. Ready layers come with their step: `QPLayer` (convex quadratic programs), `CvxpyLayer`
(CVXPY problems), `NLPLayer` and `f_sqp` (smooth programs, convex or not), `f_pgd_a`, `f_pgd_b` and `f_fdpg`.

To build others, `updates` has the steps, `projections` and `prox` their parts, and `linear_solve` the solvers of the
backward equation. ``check(layer, *params)`` reports whether a layer is right, and `verdicts` explains why a solution
may lack a derivative. `unroll` and `unfold` are the baselines; like `fold` they make a `FixedPointLayer`, with an
`Implicit` or `Unrolled` object that tells how it is differentiated.

Shapes: B is the size of the batch, n the number of variables, N the number of entries of a state. Examples in the
docstrings assume ``import torch, foldopt``. Equation numbers are those of the paper.

Source: Kotary, Dinh and Fioretto, Backpropagation of Unrolled Solvers with Folded Optimization (2023).

Examples:
    >>> layer = foldopt.QPLayer()  # min 1/2 x'Qx + p'x subject to Gx <= h
    >>> h = torch.ones(2, requires_grad=True)
    >>> x = layer(torch.eye(2), torch.tensor([[-2.0, -0.5]]), G=torch.eye(2), h=h)
    >>> x.sum().backward()
    >>> h.grad
    tensor([1., 0.])
"""

from foldopt import diagnostics, errors, linear_solve, projections, prox, updates, verdicts
from foldopt._certificates import FoldInfo
from foldopt._fold import Implicit, fold, unfold, unroll
from foldopt._implicit import fixed_point_jvp, fixed_point_vjp
from foldopt._layer import FixedPointLayer
from foldopt._sparsity import Sparsity
from foldopt._unrolled import Unrolled
from foldopt.cvxpy import CvxpyLayer
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
