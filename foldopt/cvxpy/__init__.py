"""A CVXPY problem as a differentiable layer: `CvxpyLayer`. Importing this package does not import cvxpy."""

from foldopt.cvxpy._layer import CvxpyLayer

__all__ = ["CvxpyLayer"]
