"""Update steps U(x, c): differentiable code whose fixed point is the solution. Each is in a file of its own."""

from foldopt.updates.admm import ADMM
from foldopt.updates.dual_proximal_gradient import DualProximalGradient
from foldopt.updates.gradient import ProjectedGradient, ProximalGradient
from foldopt.updates.programs import SmoothProgram, SQPData, SQPProgram
from foldopt.updates.sparse_sqp import SparseSQP
from foldopt.updates.sqp import SQP

__all__ = [
    "ADMM",
    "SQP",
    "DualProximalGradient",
    "ProjectedGradient",
    "ProximalGradient",
    "SQPData",
    "SQPProgram",
    "SmoothProgram",
    "SparseSQP",
]
