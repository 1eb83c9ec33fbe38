"""Model-predictive control.

A plan over 200 time steps is a sparse quadratic program. Its derivative in the state is the control law, and its
derivative in the model identifies the system from a plan.
"""

# %% [markdown]
# ## The problem
#
# A chain of six masses hangs between two walls, joined by springs and dampers; forces act on four of them.
# Model-predictive control plans 200 time steps ahead:
#
# > minimize ½ Σₜ (xₜᵀWxₜ + uₜᵀRuₜ) subject to xₜ₊₁ = Axₜ + Buₜ, |uₜ| ≤ 0.5, |xₜ| ≤ 4
#
# This is a sparse program of 200 · (12 + 4) = 3,200 variables. Its matrix of equalities is a torch sparse tensor, whose
# values depend on the stiffness and the damping of the chain, so that `foldopt.QPLayer` passes gradients to these two
# numbers.

# %%
import matplotlib.pyplot as plt
import numpy as np
import qpsolvers
import scipy.sparse
import torch

from foldopt import QPLayer

STATES, CONTROLS, MASSES = 12, 4, 6
HORIZON = 200  # decisions that are planned
STEP = 0.5  # seconds between two decisions
FORCE, REACH = 0.5, 4.0  # bounds of the forces and of the states
TRUE = torch.tensor([1.0, 0.2], dtype=torch.float64)  # stiffness and damping of the chain that is observed
GUESS = torch.tensor([1.5, 0.5], dtype=torch.float64)


def dynamics(chain):
    """Return A (12, 12) and B (12, 4) of x_{t+1} = A x_t + B u_t for (stiffness, damping), forces held for a step."""
    beside = torch.diag(torch.ones(MASSES - 1, dtype=torch.float64), 1)
    laplacian = 2 * torch.eye(MASSES) - beside - beside.T
    flow = torch.zeros(STATES + CONTROLS, STATES + CONTROLS, dtype=torch.float64)
    flow[:MASSES, MASSES:STATES] = torch.eye(MASSES)
    flow[MASSES + torch.tensor([0, 1, 3, 5]), STATES + torch.arange(CONTROLS)] = 1.0
    flow[MASSES:STATES, :MASSES] = -chain[0] * laplacian
    flow[MASSES:STATES, MASSES:STATES] = -chain[1] * laplacian
    sampled = torch.linalg.matrix_exp(STEP * flow)
    return sampled[:STATES, :STATES], sampled[:STATES, STATES:]


# %% [markdown]
# The program in z = (u₀, x₁, u₁, x₂, …) puts the blocks A, B and −I of each time step where they belong. The values of
# the sparse tensor carry the gradient; their places are constant.


# %%
def program(chain, start):
    """Return Q, p, A, b and upper (= -lower) of a QPLayer in z (16 horizon,), for (stiffness, damping) and x_0 (12,).

    A is a sparse tensor; its rows say B u_t + A x_t - x_{t+1} = 0; A x_0 is in b.
    """
    A, B = dynamics(chain)
    row, width = torch.arange(STATES), STATES + CONTROLS
    place, values = [], []
    for t in range(HORIZON):
        blocks = [(B, t * width), (-torch.eye(STATES, dtype=torch.float64), t * width + CONTROLS)]
        blocks += [(A, t * width - STATES)] if t else []
        for block, left in blocks:
            at = torch.cartesian_prod(t * STATES + row, left + torch.arange(block.shape[1]))
            place.append(at.T)
            values.append(block.flatten())
    shape = (HORIZON * STATES, HORIZON * width)
    rows = torch.sparse_coo_tensor(torch.cat(place, 1), torch.cat(values), shape, check_invariants=True).coalesce()
    right = torch.cat([-A @ start, start.new_zeros((HORIZON - 1) * STATES)])
    weights = torch.cat([torch.full((CONTROLS,), 0.1), torch.ones(STATES)]).to(start).repeat(HORIZON)
    upper = torch.cat([torch.full((CONTROLS,), FORCE), torch.full((STATES,), REACH)]).to(start).repeat(HORIZON)
    return scipy.sparse.diags(weights.numpy()), torch.zeros_like(weights), rows, right, upper


layer = QPLayer()


def plan(chain, start):
    """Return the optimal z (16 horizon,), differentiable in the chain and the start."""
    Q, p, A, b, upper = program(chain, start)
    return layer(Q, p, None, None, A, b, lower=-upper, upper=upper)[0]


def plan_by_piqp(chain, start):
    """Return the same z as an array, by PIQP alone, to 1e-12."""
    Q, p, A, b, upper = program(chain, start)
    A = scipy.sparse.csc_matrix((A.values().numpy(), A.indices().numpy()), A.shape)
    p, b, upper, exact = p.numpy(), b.numpy(), upper.numpy(), {"eps_abs": 1e-12, "eps_rel": 1e-12}
    return qpsolvers.solve_qp(Q.tocsc(), p, A=A, b=b, lb=-upper, ub=upper, solver="piqp", **exact)


# %% [markdown]
# ## The control law
#
# The solution of a quadratic program is piecewise affine in its parameters (Bemporad, Morari, Dua and Pistikopoulos,
# *The explicit linear quadratic regulator for constrained systems*, 2002). So the derivative of the first forces in the
# state is the control law of the neighbourhood: it must predict the optimal forces of a state nearby to all digits.
# PIQP checks that.

# %%
torch.manual_seed(0)
start = torch.cat([3 * torch.rand(MASSES) - 1.5, torch.zeros(MASSES)]).double()
here, nearby = start.clone().requires_grad_(), start + 1e-3 * torch.randn(STATES).double()
z = plan(TRUE, here)
law = torch.stack([torch.autograd.grad(force, here, retain_graph=True)[0] for force in z[:CONTROLS]])
z = z.detach()
wanted = torch.tensor(plan_by_piqp(TRUE, nearby)[:CONTROLS])
law_error = float((z[:CONTROLS] + law @ (nearby - start) - wanted).abs().max())
forces = z.reshape(HORIZON, -1)[:, :CONTROLS]
limits = int((forces.abs() > FORCE - 1e-9).sum())
print(f"{len(z)} variables, {limits} forces at their limit: {layer.last.verdict[0]}")
print(f"the control law predicts the optimal forces of a state nearby to 1e-9: {law_error < 1e-9}")

# %% [markdown]
# ```text
# 3200 variables, 10 forces at their limit: differentiable
# the control law predicts the optimal forces of a state nearby to 1e-9: True
# ```
#
# ## The system behind a plan
#
# Another controller was seen to make the plan z. What are the stiffness and the damping that it believes in? Minimize
# the squared distance of our plan to z over these two numbers, from a wrong guess.


# %%
def loss(chain):
    """Return the squared distance of the plan for (stiffness, damping) to the one that was observed."""
    return (plan(chain, start) - z).square().sum()


chain = GUESS.clone().requires_grad_()
(gradient,) = torch.autograd.grad(loss(chain), chain)
h = 1e-5
ends = [[plan_by_piqp(GUESS + side * h * e, start) for side in (1, -1)] for e in torch.eye(2).double()]
truth = torch.tensor([np.square(up - z.numpy()).sum() - np.square(down - z.numpy()).sum() for up, down in ends])
gradient_error = float((gradient - truth / (2 * h)).abs().max() / gradient.abs().max())
print("gradient in stiffness and damping:", *(f"{one:.4f}" for one in gradient))
print(f"it agrees with differences to 1e-7: {gradient_error < 1e-7}")

optimizer, tried = torch.optim.Adam([chain], lr=0.1), []
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
for _ in range(80):
    optimizer.zero_grad()
    loss(chain).backward()
    tried.append(chain.tolist())
    optimizer.step()
    schedule.step()
learned = chain.tolist()
print("learned {:.3f} and {:.3f}, true {:.3f} and {:.3f}".format(*learned, *TRUE))

# %% [markdown]
# ```text
# gradient in stiffness and damping: 5.2810 -1.6363
# it agrees with differences to 1e-7: True
# learned 1.000 and 0.200, true 1.000 and 0.200
# ```
#
# ![Forces of the plan; stiffness and damping over the steps of training](../docs/assets/examples/mpc.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
seconds = STEP * np.arange(31)
for mass, force in zip((1, 2, 4, 6), forces[:30].T, strict=True):
    left.stairs(force, seconds, baseline=None, linewidth=1.6, label=f"mass {mass}")
for limit in (-FORCE, FORCE):
    left.axhline(limit, color="0.4", linestyle="--", linewidth=1)
left.set(xlabel="time (s)", ylabel="force", ylim=(-0.6, 0.95), title="The first 15 seconds of the plan")
left.legend(ncols=2, loc="upper right")
for k, (name, values) in enumerate(zip(("stiffness", "damping"), np.array(tried).T, strict=True)):
    right.plot(values, color=f"C{k}", label=name)
    right.axhline(TRUE[k], color=f"C{k}", linestyle="--", linewidth=1)
right.set(xlabel="step of training", ylabel="learned value", title="Learned from the plan (true: dashed)")
right.legend()
plt.show()
