"""Allocation of scarce resources under uncertain demand: their prices, and the capacities that are worth their cost.

Activities x >= 0 earn sum_j u_j sqrt(x_j). Activity j uses a_ij of resource i, known up to a standard deviation d_ij,
and resource i must suffice with a probability of 95%: a_i'x + 1.645 |diag(d_i) x| <= c_i, a second-order cone (Boyd and
Vandenberghe, Convex optimization, 2004, section 4.4.2). The dual value of a row is the price of its resource, and the
layer returns it beside x: it is the derivative of the earnings V(c) in the capacity c_i.

Capacity costs k_i a unit. The best c maximizes V(c) - k'c, where prices equal costs. Newton's method finds it with the
second derivative of V, which is the derivative of the prices, in a few steps; so an equilibrium of the market is found
through the layer (resource allocation is one of the models of Agrawal, Barratt and Boyd, Learning convex optimization
models, 2021). Truth: x and prices from SciPy's root of the optimality conditions, and central differences of these.
"""

import argparse

import cvxpy as cp
import numpy as np
import scipy.optimize
import torch

from foldopt import CvxpyLayer

QUANTILE = 1.645  # of the normal distribution, at 95%


class Allocation:
    """The best activities x (n,) and the prices (m,) for capacities c (m,)."""

    def __init__(self, use, deviation, value):
        self.use, self.deviation, self.value = use, deviation, value
        c, x = cp.Parameter(len(use)), cp.Variable(len(value))
        rows = [
            a @ x + QUANTILE * cp.norm(cp.multiply(d, x)) <= limit for a, d, limit in zip(use, deviation, c, strict=True)
        ]
        problem = cp.Problem(cp.Maximize(value @ cp.sqrt(x)), rows)
        self.layer = CvxpyLayer(problem, [c], [x], dual=rows)

    def __call__(self, c):
        """Return x (n,) and prices (m,), differentiable in c (m,)."""
        x, *prices = self.layer(c)
        return x, torch.stack(prices)

    def earnings(self, c):
        """Return V(c), a scalar."""
        return torch.as_tensor(self.value) @ self(c)[0].sqrt()

    def by_root(self, c, x, prices):
        """Return x and prices as arrays from the optimality conditions alone, starting at some x and prices."""
        n = len(x)

        def conditions(z):
            x, prices = z[:n], z[n:]
            spread = np.linalg.norm(self.deviation * x, axis=1)
            load = self.use + QUANTILE * self.deviation**2 * x / spread[:, None]
            return np.concatenate([self.value / (2 * np.sqrt(x)) - prices @ load, load @ x - c])

        z = scipy.optimize.root(conditions, np.concatenate([x, prices]), options={"xtol": 1e-14}).x
        return z[:n], z[n:]
