"""A control policy learned through its decisions.

A controller that looks one step ahead needs to know the cost of what comes later. That value function is learned by
running the controller and differentiating the closed loop.
"""

# %% [markdown]
# ## The problem
#
# The system x₊ = Ax + Bu + w with random w is to be kept near 0 at a small cost |x|² + |u|² per step. The controls are
# bounded, |uᵢ| ≤ 0.1. Approximate dynamic programming decides by a small quadratic program in each state:
#
# > u(x) = argmin over |uᵢ| ≤ 0.1 of |u|² + zᵀPz with z = Ax + Bu
#
# where zᵀPz estimates the cost to come. Without bounds the best P solves a Riccati equation. With bounds it is unknown.
# We learn it by gradient descent on the simulated cost, through all decisions of the closed loop (Agrawal, Barratt,
# Boyd and Stellato, *Learning convex optimization control policies*, 2020). P = LLᵀ is a positive semidefinite
# parameter of the program, which `foldopt.CvxpyLayer` takes as it is; L is free.

# %%
import itertools

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
import torch

from foldopt import CvxpyLayer

STATES, CONTROLS = 4, 2
LIMIT = 0.1  # of each entry of u
NOISE = 0.3  # standard deviation of the entries of w

generator = np.random.default_rng(3)
A, B = generator.standard_normal((STATES, STATES)), generator.standard_normal((STATES, CONTROLS))
A, B = torch.as_tensor(A / np.abs(np.linalg.eigvals(A)).max()), torch.as_tensor(B)  # spectral radius of A: 1

drift, P = cp.Parameter(STATES), cp.Parameter((STATES, STATES), PSD=True)
u, z = cp.Variable(CONTROLS), cp.Variable(STATES)
cost = cp.sum_squares(u) + cp.quad_form(z, P)
problem = cp.Problem(cp.Minimize(cost), [z == drift + B.numpy() @ u, u <= LIMIT, u >= -LIMIT])
layer = CvxpyLayer(problem, [drift, P], [u])


def policy(drift, P):
    """Return the decisions u (batch, 2) for A x (batch, 4) and P (4, 4)."""
    return layer(drift, P)[0]


def simulated_cost(decide, L, noise):
    """Return the mean cost per step from x = 0 under noise (steps, batch, 4), and the controls (steps, batch, 2)."""
    x, cost, controls = torch.zeros_like(noise[0]), 0.0, []
    for w in noise:
        u = decide(x @ A.T, L @ L.T)
        cost = cost + (x.square().sum(1) + u.square().sum(1)).mean() / len(noise)
        controls.append(u.detach())
        x = x @ A.T + u @ B.T + w
    return cost, torch.stack(controls)


# %% [markdown]
# ## Is the gradient right?
#
# With two controls the program can also be solved by looking at the nine faces of the box, one after the other.
# Differences of the cost simulated with *these* decisions are the truth for the gradient of 25 decisions in a row.


# %%
def policy_by_faces(drift, P):
    """Return the same decisions: the best of the minimizers over the faces of the box, clipped to it."""
    H, q, found = torch.eye(CONTROLS) + B.T @ P @ B, drift @ P @ B, []
    for face in itertools.product((-1.0, 0.0, 1.0), repeat=CONTROLS):  # 0: the control is between its bounds
        u, free = LIMIT * torch.tensor(face, dtype=H.dtype), torch.tensor(face) == 0
        best = -torch.linalg.solve(H[free][:, free], (q + u @ H)[:, free].T).T
        found.append(u.repeat(len(q), 1).masked_scatter(free.expand(len(q), -1), best.clamp(-LIMIT, LIMIT)))
    found = torch.stack(found)
    value = ((found @ H) * found / 2 + q * found).sum(2)
    return found[value.argmin(0), torch.arange(len(q))]


noise, later = (NOISE * torch.as_tensor(generator.standard_normal((25, batch, STATES))) for batch in (16, 128))
riccati = scipy.linalg.solve_discrete_are(A.numpy(), B.numpy(), np.eye(STATES), np.eye(CONTROLS))
start = torch.as_tensor(np.linalg.cholesky(riccati))
L = start.clone().requires_grad_()
cost, controls = simulated_cost(policy, L, noise)
bounded = float((controls.abs() > LIMIT - 1e-9).double().mean())
error = abs(float(cost.detach() - simulated_cost(policy_by_faces, start, noise)[0]))
(gradient,) = torch.autograd.grad(cost, L)
direction, h = torch.as_tensor(generator.standard_normal(L.shape)), 1e-6
up, down = (simulated_cost(policy_by_faces, start + side * h * direction, noise)[0] for side in (1, -1))
slope, truth = float((gradient * direction).sum()), float((up - down) / (2 * h))
print(f"{100 * bounded:.0f}% of the controls are at a bound")
print(f"slope of the cost in a random direction {slope:.6f}, by differences {truth:.6f}")

# %% [markdown]
# ```text
# 76% of the controls are at a bound
# slope of the cost in a random direction 1.460250, by differences 1.460250
# ```
#
# ## Training
#
# Twenty-five steps of Adam, starting from the Riccati matrix. The last line compares both policies under noise that
# training has not seen, with the decisions found by enumeration.

# %%
optimizer, costs = torch.optim.Adam([L], lr=0.1), []
for _ in range(25):
    optimizer.zero_grad()
    cost, _ = simulated_cost(policy, L, noise)
    cost.backward()
    optimizer.step()
    costs.append(cost.item())
(before, plain), (after, learned) = (simulated_cost(policy_by_faces, one, later) for one in (start, L.detach()))
print(f"cost per step {costs[0]:.3f} with the Riccati matrix, {costs[-1]:.3f} learned")
print(f"under new noise {before:.3f} with the Riccati matrix, {after:.3f} learned")

# %% [markdown]
# ```text
# cost per step 1.731 with the Riccati matrix, 1.574 learned
# under new noise 2.381 with the Riccati matrix, 2.098 learned
# ```
#
# ![Cost over steps of training; controls of both policies in one run](../docs/assets/examples/control_policy.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
left.axhline(costs[0], color="0.4", linestyle="--")
left.text(24, costs[0], "Riccati matrix", ha="right", va="bottom", color="0.3")
left.plot(costs)
left.set(xlabel="step of training", ylabel="mean cost per step", title="Training through 25 decisions")
left.set_ylim(1.55, 1.76)
for one, color, style, name in ((plain, "C1", "--", "Riccati matrix"), (learned, "C0", "-", "learned")):
    right.step(range(25), one[:, 0, 0], color=color, linestyle=style, where="post", label=name)
right.set(xlabel="time step", ylabel="first control", ylim=(-0.12, 0.16), title="One run under new noise")
right.legend(ncols=2, loc="upper left")
plt.show()
