"""Learn costs from a flow.

Traffic on 10,000 arcs is a linear program, whose solution does not move with its costs. With a ridge it does, and the
costs are learned from one day of observed traffic.
"""

# %% [markdown]
# ## The problem
#
# A city of 37 × 69 crossings has one arc per street and direction. Some crossings send, others receive. The cost of an
# arc is a weighted sum of its length, toll and risk, with weights that are unknown:
#
# > minimize cᵀx subject to Nx = b, 0 ≤ x ≤ capacity
#
# All data are integers, so the flow is at a vertex. Where it is unique, it does not move with c: its derivative is zero
# and teaches nothing. Where costs tie, it has no derivative, and the layer says so. A ridge ½r|x|² makes the flow
# unique and lets it move. The weights are learned through the ridge and judged by the linear program. `foldopt.QPLayer`
# takes the sparse incidence matrix N of 2,552 × 10,000 entries as it is.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import qpsolvers
import scipy.optimize
import scipy.sparse
import torch
from matplotlib.collections import LineCollection

from foldopt import QPLayer

HEIGHT, WIDTH = 37, 69  # crossings in each direction
RIDGE = 10.0
WEIGHTS = torch.tensor([3.0, 2.0, 5.0], dtype=torch.float64)  # of length, toll and risk
GUESS = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)


def streets(height, width, generator):
    """Return N (nodes - 1, arcs) without the last, redundant row, capacities (arcs,), features (arcs, 3): integers."""
    node = np.arange(height * width).reshape(height, width)
    both = [np.stack([node[:, :-1], node[:, 1:]], -1), np.stack([node[:-1], node[1:]], -1)]
    both = np.concatenate([part.reshape(-1, 2) for part in both])
    tail, head = np.concatenate([both, both[:, ::-1]]).T
    arcs, at = len(tail), np.tile(np.arange(len(tail)), 2)
    N = scipy.sparse.csr_matrix((np.repeat([1.0, -1.0], arcs), (np.append(tail, head), at)), (node.size, arcs))
    features = np.stack([generator.integers(1, 10, arcs), *generator.integers(0, 4, (2, arcs))], 1)
    capacity = generator.integers(4, 9, arcs)
    return N[:-1], torch.as_tensor(capacity).double(), torch.as_tensor(features).double()


def demand(nodes, generator):
    """Return b (nodes - 1,): one crossing in 25 sends 4 units, as many receive them."""
    b = np.zeros(nodes)
    senders, receivers = generator.permutation(nodes)[: 2 * (nodes // 25)].reshape(2, -1)
    b[senders], b[receivers] = 4, -4
    return torch.as_tensor(b[:-1])


def flow(layer, c, ridge, N, b, capacity):
    """Return the flow (arcs,) that minimizes c'x + ridge/2 |x|^2, differentiable in c."""
    Q = scipy.sparse.diags(np.full(len(c), ridge)) if ridge else scipy.sparse.csr_matrix((len(c), len(c)))
    return layer(Q, c, None, None, N, b, lower=torch.zeros_like(capacity), upper=capacity)[0]


# %% [markdown]
# HiGHS and PIQP solve the same programs without foldopt. They give the truth to compare with.


# %%
def flow_by_highs(c, N, b, capacity):
    """Return a flow (arcs,) of least cost c'x by HiGHS alone, at a vertex."""
    bounds = np.stack([np.zeros(len(c)), capacity], 1)
    return torch.as_tensor(scipy.optimize.linprog(c, A_eq=N, b_eq=b, bounds=bounds, method="highs-ds").x)


def flow_by_piqp(c, ridge, N, b, capacity):
    """Return the flow (arcs,) with the ridge by PIQP alone, to 1e-12."""
    Q, exact = scipy.sparse.diags(np.full(len(c), ridge), format="csc"), {"eps_abs": 1e-12, "eps_rel": 1e-12}
    c, b, upper = c.numpy(), b.numpy(), capacity.numpy()
    return torch.tensor(qpsolvers.solve_qp(Q, c, A=N.tocsc(), b=b, lb=0 * upper, ub=upper, solver="piqp", **exact))


# %% [markdown]
# ## What a linear program can tell of its costs
#
# We ask three programs for the gradient of some function of the flow: with the integer costs, with small numbers added
# that break all ties, and with the ridge.


# %%
def answers(cost, tie, ridge, city):
    """Return what the layer says of costs that tie, of costs with `tie` added, and of a ridge, and what HiGHS says."""
    found, g = {}, torch.cos(torch.arange(len(cost)).double() ** 2)  # a cotangent in no special position
    for name, c, r in (("integer", cost, 0.0), ("no ties", cost + tie, 0.0), ("ridge", cost, ridge)):
        layer, c = QPLayer(degenerate="zero"), c.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(flow(layer, c, r, *city) @ g, c)
        found[name] = {"verdict": layer.last.verdict[0], "gradient": float(gradient.abs().max())}
    ends = [flow_by_highs(cost + side * 1e-3 * tie, *city) for side in (1, -1)]
    found["costs"], found["differ"] = [float(cost @ x) for x in ends], int((ends[0] != ends[1]).sum())
    ends = [flow_by_highs(cost + tie + h * g, *city) for h in (0, 1e-6)]
    found["moved"] = float((ends[1] - ends[0]).abs().max())
    return found


generator = np.random.default_rng(0)
N, capacity, features = streets(HEIGHT, WIDTH, generator)
today, tomorrow = ((N, demand(HEIGHT * WIDTH, generator), capacity) for _ in range(2))
tie = torch.as_tensor(0.1 * generator.random(len(capacity)))
said = answers(features @ WEIGHTS, tie, RIDGE, today)
for name in ("integer", "no ties", "ridge"):
    print("{}: {verdict}, largest gradient {gradient:.2f}".format(name, **said[name]))
print(f"HiGHS, integer: two flows of the same cost {said['costs'][0]:.0f} differ on {said['differ']} arcs")
print(f"HiGHS, no ties: costs moved by 1e-6 move the flow by {said['moved']:.0f}")

# %% [markdown]
# ```text
# integer: not unique, largest gradient 0.00
# no ties: differentiable, largest gradient 0.00
# ridge: differentiable, largest gradient 0.13
# HiGHS, integer: two flows of the same cost 47972 differ on 14 arcs
# HiGHS, no ties: costs moved by 1e-6 move the flow by 0
# ```
#
# HiGHS confirms the verdicts: with ties there are two optimal flows, and without ties the flow stays where it is.
#
# ## Learn the weights
#
# One day of traffic is observed, the solution of the linear program for the true weights. We minimize the squared
# distance of the ridge's flow to it. First the gradient is compared with differences of PIQP.

# %%
observed, flow_by_layer = flow_by_highs(features @ WEIGHTS, *today), partial(flow, QPLayer())


def loss(weights, find=flow_by_layer):
    """Return the mean squared distance of the ridge's flow for weights (3,) to what was observed."""
    return (find(features @ weights, RIDGE, *today) - observed).square().mean()


weights = GUESS.clone().requires_grad_()
(gradient,) = torch.autograd.grad(loss(weights), weights)
h = 1e-5
ends = [[loss(GUESS + side * h * e, flow_by_piqp) for side in (1, -1)] for e in torch.eye(3).double()]
truth = torch.stack([(up - down) / (2 * h) for up, down in ends])
gradient_error = float((gradient - truth).abs().max() / truth.abs().max())
print("gradient in the weights of length, toll, risk:", *(f"{one:.5f}" for one in gradient))
print(f"it agrees with differences to 1e-5: {gradient_error < 1e-5}")

optimizer, tried = torch.optim.Adam([weights], lr=0.5), []
for _ in range(25):
    optimizer.zero_grad()
    loss(weights).backward()
    tried.append(weights.tolist())
    optimizer.step()

# %% [markdown]
# ```text
# gradient in the weights of length, toll, risk: -0.05295 -0.00681 -0.01555
# it agrees with differences to 1e-5: True
# ```
#
# The weights are judged by the linear program: how much dearer, at the true costs, are flows that are optimal for the
# learned ones? Only the ratios of the weights matter to it, and `tomorrow` has other senders and receivers. The ratios
# move towards the true ones; 25 steps do not reach them.

# %%
best = [features @ WEIGHTS @ flow_by_highs(features @ WEIGHTS, *city) for city in (today, tomorrow)]
dearer = {}
for name, w in (("before", GUESS), ("after", weights.detach())):
    own = [features @ WEIGHTS @ flow_by_highs(features @ w, *city) for city in (today, tomorrow)]
    dearer[name] = [float(100 * (a / b - 1)) for a, b in zip(own, best, strict=True)]
    print("{} training: flows {:.2f}% (today) and {:.2f}% (tomorrow) dearer than the best".format(name, *dearer[name]))

# %% [markdown]
# ```text
# before training: flows 0.92% (today) and 0.88% (tomorrow) dearer than the best
# after training: flows 0.24% (today) and 0.54% (tomorrow) dearer than the best
# ```
#
# ![Observed flow on the map; weights over the steps of training](../docs/assets/examples/min_cost_flow.png)

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=(5, 4))
incidence = scipy.sparse.vstack([N, -N.sum(0)]).tocsc()  # with the redundant row
tail, head = np.asarray(incidence.argmax(0))[0], np.asarray(incidence.argmin(0))[0]
crossings = np.stack(np.divmod(np.arange(HEIGHT * WIDTH), WIDTH)[::-1], 1)
used = observed.numpy() > 0
lines = np.stack([crossings[tail], crossings[head]], 1)[used]
left.add_collection(LineCollection(lines, linewidths=observed.numpy()[used] / 3))
for sign, marker, color, name in ((1, "^", "C2", "sends"), (-1, "v", "C1", "receives")):
    left.plot(*crossings[:-1][today[1] == 4 * sign].T, marker, color=color, markersize=4, label=name)
left.set(xlabel="crossing, west to east", ylabel="crossing, south to north", title="The observed flow", aspect="equal")
left.grid(visible=False)
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
for k, name in enumerate(("length", "toll")):
    right.plot([one[k] / one[2] for one in tried], color=f"C{k}", label=f"{name} / risk")
    right.axhline(float(WEIGHTS[k] / WEIGHTS[2]), color=f"C{k}", linestyle="--", linewidth=1)
right.set(xlabel="step of training", ylabel="ratio of weights", ylim=(0.3, 1.2), title="Learned (true: dashed)")
right.legend()
plt.show()
