"""Prices of scarce resources.

Activities compete for resources under uncertain demand. The layer returns the prices of the resources, and Newton's
method on their derivatives finds the capacities that are worth their cost.
"""

# %% [markdown]
# ## The problem
#
# Activities x ≥ 0 earn Σⱼ vⱼ√xⱼ. Activity j uses aᵢⱼ of resource i, known up to a standard deviation dᵢⱼ, and the
# capacity cᵢ must suffice with a probability of 95%. That is a second-order cone (Boyd and Vandenberghe, *Convex
# optimization*, 2004, section 4.4.2):
#
# > V(c) = maximum of Σⱼ vⱼ√xⱼ subject to aᵢᵀx + 1.645 |diag(dᵢ) x| ≤ cᵢ for each resource i
#
# The multiplier of a row is the *price* of its resource: what one more unit of it would earn, dV/dcᵢ.
# `foldopt.CvxpyLayer` returns prices beside x with `dual=`.
#
# A unit of capacity costs kᵢ. The best capacities maximize V(c) − kᵀc: there prices equal costs. Newton's method finds
# them in a few steps from the second derivative of V, which is the derivative of the prices. Resource allocation is one
# of the models of Agrawal, Barratt and Boyd, *Learning convex optimization models* (2021).

# %%
import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch
from torch.func import hessian, jacrev

from foldopt import CvxpyLayer

ACTIVITIES, RESOURCES = 6, 3
QUANTILE = 1.645  # of the normal distribution, at 95%

generator = np.random.default_rng(0)
mainly = np.arange(ACTIVITIES) % RESOURCES == np.arange(RESOURCES)[:, None]  # each activity needs one resource most
use = np.where(mainly, 1, 0.2) * generator.uniform(0.8, 1.2, mainly.shape)
deviation, worth = use * generator.uniform(0.1, 0.4, mainly.shape), generator.uniform(1, 2, ACTIVITIES)

capacity, x = cp.Parameter(RESOURCES), cp.Variable(ACTIVITIES)
rows = [
    a @ x + QUANTILE * cp.norm(cp.multiply(d, x)) <= limit for a, d, limit in zip(use, deviation, capacity, strict=True)
]
layer = CvxpyLayer(cp.Problem(cp.Maximize(worth @ cp.sqrt(x)), rows), [capacity], [x], dual=rows)


def allocation(c):
    """Return the activities (6,) and the prices (3,) for capacities c (3,)."""
    x, *prices = layer(c)
    return x, torch.stack(prices)


def earnings(c):
    """Return V(c), a scalar."""
    return torch.as_tensor(worth) @ allocation(c)[0].sqrt()


# %% [markdown]
# ## Are prices and derivatives right?
#
# SciPy's root finder solves the optimality conditions alone. The gradient of V must be the prices (the envelope
# theorem), and its Hessian the differences of SciPy's prices.


# %%
def by_root(c, x, prices):
    """Return x and prices as arrays from the optimality conditions alone, starting at some x and prices."""

    def conditions(z):
        x, prices = z[:ACTIVITIES], z[ACTIVITIES:]
        spread = np.linalg.norm(deviation * x, axis=1)
        load = use + QUANTILE * deviation**2 * x / spread[:, None]
        return np.concatenate([worth / (2 * np.sqrt(x)) - prices @ load, load @ x - c])

    z = scipy.optimize.root(conditions, np.concatenate([x, prices]), options={"xtol": 1e-14}).x
    return z[:ACTIVITIES], z[ACTIVITIES:]


c = torch.as_tensor(generator.uniform(1, 2, RESOURCES))
x, prices = allocation(c)
exact_x, exact_prices = by_root(c.numpy(), x.numpy(), prices.numpy())
error = float(max(np.abs(x.numpy() - exact_x).max(), np.abs(prices.numpy() - exact_prices).max()))
envelope = float((jacrev(earnings)(c) - prices).abs().max())
h, differences = 1e-5, []
for e in np.eye(RESOURCES):
    up, down = (by_root(c.numpy() + side * h * e, exact_x, exact_prices)[1] for side in (1, -1))
    differences.append((up - down) / (2 * h))
hessian_error = float(np.abs(hessian(earnings)(c).numpy() - differences).max() / np.abs(differences).max())
print("prices of the resources:", *(f"{price:.4f}" for price in prices))
print(f"x and prices agree with SciPy's root to 1e-12: {error < 1e-12}")
print(f"the gradient of V is the prices to 1e-12: {envelope < 1e-12}")
print(f"the Hessian of V agrees with differences to 1e-7: {hessian_error < 1e-7}")

# %% [markdown]
# ```text
# prices of the resources: 0.4284 0.9588 0.8214
# x and prices agree with SciPy's root to 1e-12: True
# the gradient of V is the prices to 1e-12: True
# the Hessian of V agrees with differences to 1e-7: True
# ```
#
# ## The best capacities
#
# We choose capacities, take their prices as costs, and let Newton's method find them back.

# %%
best = torch.as_tensor(generator.uniform(1, 2, RESOURCES))
cost, gaps, path = allocation(best)[1], [], []
for _ in range(6):
    price = jacrev(earnings)(c)
    gaps.append(float((price - cost).abs().max()))
    path.append(price)
    print(f"capacities {c[0]:.5f} {c[1]:.5f} {c[2]:.5f}: prices differ from costs by {gaps[-1]:.0e}")
    c = c - torch.linalg.solve(hessian(earnings)(c), price - cost)
distance = float((c - best).abs().max())
print(f"the capacities are the best ones to 1e-9: {distance < 1e-9}")

# %% [markdown]
# ```text
# capacities 1.59430 1.33791 1.39162: prices differ from costs by 3e-01
# capacities 1.83039 1.14190 1.57793: prices differ from costs by 9e-02
# capacities 1.88797 1.22054 1.62159: prices differ from costs by 8e-03
# capacities 1.89026 1.22711 1.62318: prices differ from costs by 7e-05
# capacities 1.89027 1.22716 1.62319: prices differ from costs by 4e-09
# capacities 1.89027 1.22716 1.62319: prices differ from costs by 1e-15
# the capacities are the best ones to 1e-9: True
# ```
#
# The number of right digits doubles in every step, as it must with exact second derivatives.
#
# ![Prices and their differences to the costs over the steps](../docs/assets/examples/resource_allocation.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
for k, (one, target) in enumerate(zip(torch.stack(path).T, cost, strict=True)):
    left.plot(one, "o-", color=f"C{k}", label=f"resource {k + 1}")
    left.axhline(float(target), color=f"C{k}", linestyle="--", linewidth=1)
left.set(xlabel="step of Newton's method", ylabel="price", title="Prices approach costs (dashed)")
left.legend(loc="center right", bbox_to_anchor=(1, 0.64))
right.semilogy(gaps, "o-")
right.set(xlabel="step of Newton's method", ylabel="largest |price − cost|", title="Quadratic convergence")
plt.show()
