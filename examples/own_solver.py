"""Fold your own solver.

A bisection in plain NumPy finds how traffic spreads over four roads. Ten lines make it a layer, and tolls are trained
through it.
"""

# %% [markdown]
# ## The problem
#
# Four roads lead from a suburb to the city. Road i takes tᵢ(xᵢ) minutes when xᵢ thousand cars per hour use it:
#
# > tᵢ(xᵢ) = fᵢ (1 + 0.15 (xᵢ / kᵢ)⁴)
#
# with fᵢ the minutes on the empty road and kᵢ its capacity (the function of the US Bureau of Public Roads). Drivers
# choose the road that is fastest for themselves. In equilibrium all roads in use cost the same, and those not in use
# cost more. A toll τᵢ counts like minutes. Beckmann (1956) showed that the equilibrium solves a convex program:
#
# > minimize Σᵢ ∫₀^xᵢ (tᵢ(s) + τᵢ) ds subject to Σᵢ xᵢ = demand, x ≥ 0
#
# The solver below knows nothing of gradients, of batches on a GPU, or of PyTorch. Given a common cost, the flow of
# every road is known in closed form; bisection finds the cost at which the flows add up to the demand.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import foldopt

EMPTY = np.array([10.0, 12.0, 15.0, 20.0])  # minutes
CAPACITY = np.array([2.0, 3.0, 4.0, 6.0])  # thousand cars per hour


def equilibrium(demand, toll, capacity=CAPACITY):
    """Return the flows (B, 4) for a demand (B,) and tolls (4,) in minutes, as NumPy computes them."""
    low, high = np.zeros(len(demand)), np.full(len(demand), 1e4)
    for _ in range(100):
        cost = (low + high) / 2
        flow = capacity * (np.maximum((cost[:, None] - toll.numpy()) / EMPTY - 1, 0) / 0.15) ** 0.25
        enough = flow.sum(1) > demand.numpy()
        low, high = np.where(enough, low, cost), np.where(enough, cost, high)
    return torch.from_numpy(flow)


# %% [markdown]
# ## The layer
#
# Folding needs one step of any iteration that has the equilibrium as its fixed point. Projected gradient descent on
# Beckmann's program is one: go down the gradient, which is the travel time plus the toll, and project on the flows that
# meet the demand. The step is never iterated, so a fast iteration is not needed, and the stepsize 0.01 has no influence
# on the derivative.

# %%
empty, capacity = torch.from_numpy(EMPTY), torch.from_numpy(CAPACITY)


def minutes(x):
    """Return the travel times of flows x (B, 4)."""
    return empty * (1 + 0.15 * (x / capacity) ** 4)


def step(x, demand, toll):
    """Return the flows after one step of projected gradient descent."""
    return foldopt.projections.simplex(x - 0.01 * (minutes(x) + toll), demand)


roads = foldopt.fold(solve=equilibrium, update=step)

# %% [markdown]
# `foldopt.check` compares the derivative of every argument with differences of the bisection. It finds no problem.

# %%
demand = torch.linspace(1, 20, 191, dtype=torch.float64)
toll = torch.zeros(4, dtype=torch.float64)
report = foldopt.check(roads, demand, toll)
print("problems:", report.problems)

# %% [markdown]
# ```text
# problems: []
# ```
#
# ## Where does the next car go?
#
# The derivative of the flows in the demand says on which road an additional car ends up. At a demand of 18,000 cars per
# hour:

# %%
busy = torch.tensor([18.0], dtype=torch.float64)
flow = roads(busy, toll)
share = torch.func.jacrev(lambda demand: roads(demand, toll)[0])(busy)[:, 0]
print("flows", flow[0].round(decimals=3).tolist(), "minutes", minutes(flow)[0].round(decimals=2).tolist())
print("of one more car", share.round(decimals=3).tolist())

# %% [markdown]
# ```text
# flows [3.32, 4.534, 5.193, 4.952] minutes [21.39, 21.39, 21.39, 21.39]
# of one more car [0.057, 0.094, 0.158, 0.692]
# ```
#
# All roads take the same time, as they must, and most of the new cars take the slowest but widest one.
#
# ## Tolls that help
#
# Drivers look only at their own time. Tolls can lead to flows that are better for all: minimize the total time Σ xᵢ
# tᵢ(xᵢ) over the tolls, by gradient descent through the equilibrium.
#
# The answer is known, so that we can judge the result. The best flows are an equilibrium for the *marginal* times tᵢ +
# xᵢ tᵢ′ = fᵢ (1 + 5 · 0.15 (xᵢ / kᵢ)⁴). These have the form of travel times on roads of the capacities kᵢ / 5^¼, for
# which the bisection finds the equilibrium.

# %%
toll = torch.zeros(4, dtype=torch.float64, requires_grad=True)
optimizer = torch.optim.Adam([toll], lr=0.3)
totals = []
for _ in range(150):
    optimizer.zero_grad()
    flow = roads(busy, toll)
    total = (flow * minutes(flow)).sum()
    total.backward()
    optimizer.step()
    totals.append(total.item())

free = torch.zeros(4, dtype=torch.float64)
best_flow = equilibrium(busy, free, CAPACITY / 5**0.25)
best = (best_flow * minutes(best_flow)).sum().item()
print(f"minutes per car: {totals[0] / 18:.3f} without tolls, {totals[-1] / 18:.3f} with, {best / 18:.3f} at best")

# %% [markdown]
# ```text
# minutes per car: 21.393 without tolls, 20.116 with, 20.116 at best
# ```
#
# On the left are the flows that the bisection finds. The short lines are the folded derivatives, drawn as tangents.
# Where a road comes into use there is a kink; between the kinks the tangents fit. On the right the tolls approach the
# optimum.
#
# ![Flows over demand with tangents; travel time over steps of training](../docs/assets/examples/own_solver.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
for name, flows in zip(EMPTY, equilibrium(demand, free).T, strict=True):
    left.plot(demand, flows, label=f"{name:.0f}")
at = torch.tensor([4.5, 9.0, 11.0, 14.5, 18.0], dtype=torch.float64)
slopes = torch.func.jacrev(lambda demand: roads(demand, free).sum(0))(at).T
for demanded, flow, slope in zip(at, equilibrium(at, free), slopes, strict=True):
    ends = torch.tensor([[-0.6], [0.6]], dtype=torch.float64)
    left.plot(demanded + ends, flow + ends * slope, color="0.1", linewidth=2.5)
left.set(xlabel="demand (thousand cars per hour)", ylabel="flow (thousand cars per hour)", ylim=(-0.3, 8))
left.set_title("Flows in equilibrium")
left.legend(title="minutes on the empty road", ncols=4, columnspacing=1, handlelength=1.2, loc="upper left")
right.axhline(best / 18, color="0.4", linestyle="--")
right.text(150, best / 18, "best possible", ha="right", va="bottom", color="0.3")
right.plot([total / 18 for total in totals])
right.set(xlabel="step of training", ylabel="travel time (minutes per car)", title="Tolls trained through the layer")
plt.show()

# %% [markdown]
# The shorter introduction to folding is the tutorial [Fold your own solver](../docs/tutorials/own-solver.md). What the
# check prints for a layer that is wrong is the subject of [another example](diagnose_layer.py).
