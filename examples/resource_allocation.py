"""Allocation of scarce resources under uncertain demand: their prices, and the capacities that are worth their cost.

Activities x >= 0 earn sum_j u_j sqrt(x_j). Activity j uses a_ij of resource i, known up to a standard deviation d_ij,
and resource i must suffice with a probability of 95%: a_i'x + 1.645 |diag(d_i) x| <= c_i, a second-order cone (Boyd and
Vandenberghe, Convex optimization, 2004, section 4.4.2). The dual value of a row is the price of its resource, and the
layer returns it beside x: it is the derivative of the earnings V(c) in the capacity c_i.

A unit of capacity costs k_i. The best c maximizes V(c) - k'c: there prices equal costs. Newton's method finds it in a
few steps from the second derivative of V, which is the derivative of the prices. Resource allocation is one of the
models of Agrawal, Barratt and Boyd, Learning convex optimization models (2021).

Truth: x and prices from SciPy's root of the optimality conditions, and central differences of these prices.
"""

import argparse

import cvxpy as cp
import numpy as np
import scipy.optimize
import torch
from torch.func import hessian, jacrev

from foldopt import CvxpyLayer

QUANTILE = 1.645  # of the normal distribution, at 95%


class Allocation:
    """The best activities x (n,) and the prices (m,) for capacities c (m,)."""

    def __init__(self, use, deviation, value):
        self.use, self.deviation, self.value = use, deviation, value
        c, x = cp.Parameter(len(use)), cp.Variable(len(value))
        rows = [
            a @ x + QUANTILE * cp.norm(cp.multiply(d, x)) <= limit
            for a, d, limit in zip(use, deviation, c, strict=True)
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


def main(activities=6, resources=3, steps=6):
    """Print what the example finds and return the numbers in a dict."""
    generator = np.random.default_rng(0)
    mainly = np.arange(activities) % resources == np.arange(resources)[:, None]  # each activity needs one most
    use = np.where(mainly, 1, 0.2) * generator.uniform(0.8, 1.2, mainly.shape)
    deviation, value = use * generator.uniform(0.1, 0.4, mainly.shape), generator.uniform(1, 2, activities)
    allocation = Allocation(use, deviation, value)
    c = torch.as_tensor(generator.uniform(1, 2, resources))
    x, prices = allocation(c)
    exact_x, exact_prices = allocation.by_root(c.numpy(), x.numpy(), prices.numpy())
    error = float(max(np.abs(x.numpy() - exact_x).max(), np.abs(prices.numpy() - exact_prices).max()))
    print(f"x and prices agree with SciPy's root to {error:.0e}; prices {prices.tolist()}")

    gradient, curvature = jacrev(allocation.earnings)(c), hessian(allocation.earnings)(c)
    envelope = float((gradient - prices).abs().max())
    h, truth = 1e-5, []
    for e in np.eye(resources):
        up, down = (allocation.by_root(c.numpy() + side * h * e, exact_x, exact_prices)[1] for side in (1, -1))
        truth.append((up - down) / (2 * h))
    hessian_error = float(np.abs(curvature.numpy() - truth).max() / np.abs(truth).max())
    print(f"dV/dc is the prices to {envelope:.0e}; d2V/dc2 the differences of the prices to {hessian_error:.0e}")

    best = torch.as_tensor(generator.uniform(1, 2, resources))
    cost, gaps = allocation(best)[1], []
    for _ in range(steps):
        gap = jacrev(allocation.earnings)(c) - cost
        gaps.append(float(gap.abs().max()))
        print(f"capacities {[round(one, 6) for one in c.tolist()]}: prices differ from costs by {gaps[-1]:.0e}")
        c = c - torch.linalg.solve(hessian(allocation.earnings)(c), gap)
    distance = float((c - best).abs().max())
    print(f"Newton's method ends {distance:.0e} from the best capacities")
    return {"error": error, "envelope": envelope, "hessian_error": hessian_error, "gaps": gaps, "distance": distance}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--activities", type=int, default=6, help="at least 3, one for each resource")
    main(parser.parse_args().activities)
