"""Model-predictive control with a horizon of 200: how the plan depends on the state, and a system learned from a plan.

A chain of six masses between two walls, joined by springs and dampers; forces act on four of them. The plan minimizes
1/2 sum of x'Wx + u'Ru over the horizon, subject to the sampled dynamics x_{t+1} = A x_t + B u_t and bounds on both: a
sparse program of 200 * (12 + 4) = 3,200 variables. Its matrix of equalities is a torch sparse tensor, whose values
depend on the stiffness and the damping of the chain, so that gradients reach these two numbers.

The derivative of the first force in the state is the control law of the neighbourhood: the solution of a quadratic
program is piecewise affine (Bemporad, Morari, Dua and Pistikopoulos, The explicit linear quadratic regulator for
constrained systems, 2002). The chain is learned from what another controller was seen to do.
"""

import argparse

import numpy as np
import qpsolvers
import scipy.sparse
import torch

from foldopt import QPLayer

STATES, CONTROLS, MASSES = 12, 4, 6
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


def program(chain, start, horizon):
    """Return Q, p, A, b and upper (= -lower) of a QPLayer in z = (u_0, x_1, u_1, x_2, ...), (16 horizon,).

    chain: (2,). start: x_0, (12,). A is a sparse tensor; its rows say B u_t + A x_t - x_{t+1} = 0; A x_0 is in b.
    """
    A, B = dynamics(chain)
    row, width = torch.arange(STATES), STATES + CONTROLS
    place, values = [], []
    for t in range(horizon):
        blocks = [(B, t * width), (-torch.eye(STATES, dtype=torch.float64), t * width + CONTROLS)]
        blocks += [(A, t * width - STATES)] if t else []
        for block, left in blocks:
            at = torch.cartesian_prod(t * STATES + row, left + torch.arange(block.shape[1]))
            place.append(at.T)
            values.append(block.flatten())
    shape = (horizon * STATES, horizon * width)
    rows = torch.sparse_coo_tensor(torch.cat(place, 1), torch.cat(values), shape, check_invariants=True).coalesce()
    right = torch.cat([-A @ start, start.new_zeros((horizon - 1) * STATES)])
    weights = torch.cat([torch.full((CONTROLS,), 0.1), torch.ones(STATES)]).to(start).repeat(horizon)
    upper = torch.cat([torch.full((CONTROLS,), FORCE), torch.full((STATES,), REACH)]).to(start).repeat(horizon)
    return scipy.sparse.diags(weights.numpy()), torch.zeros_like(weights), rows, right, upper


def plan(layer, chain, start, horizon):
    """Return the optimal z (16 horizon,), differentiable in the chain and the start."""
    Q, p, A, b, upper = program(chain, start, horizon)
    return layer(Q, p, None, None, A, b, lower=-upper, upper=upper)[0]


def plan_by_piqp(chain, start, horizon):
    """Return the same z as an array, by PIQP alone, to 1e-12."""
    Q, p, A, b, upper = program(chain, start, horizon)
    A = scipy.sparse.csc_matrix((A.values().numpy(), A.indices().numpy()), A.shape)
    p, b, upper, exact = p.numpy(), b.numpy(), upper.numpy(), {"eps_abs": 1e-12, "eps_rel": 1e-12}
    return qpsolvers.solve_qp(Q.tocsc(), p, A=A, b=b, lb=-upper, ub=upper, solver="piqp", **exact)


def main(horizon=200, steps=80):
    """Print what the example finds and return the numbers in a dict."""
    torch.manual_seed(0)
    start = torch.cat([3 * torch.rand(MASSES) - 1.5, torch.zeros(MASSES)]).double()
    layer = QPLayer()
    here, nearby = start.clone().requires_grad_(), start + 1e-3 * torch.randn(STATES).double()
    z = plan(layer, TRUE, here, horizon)
    law = torch.stack([torch.autograd.grad(force, here, retain_graph=True)[0] for force in z[:CONTROLS]])
    z = z.detach()
    wanted = torch.tensor(plan_by_piqp(TRUE, nearby, horizon)[:CONTROLS])
    law_error = float((z[:CONTROLS] + law @ (nearby - start) - wanted).abs().max())
    limits = int((z.reshape(horizon, -1)[:, :CONTROLS].abs() > FORCE - 1e-9).sum())
    print(f"{len(z)} variables, {limits} forces at their limit: {layer.last.verdict[0]}")
    print(f"control law du_0/dx_0: predicts the optimal forces of a state nearby to {law_error:.0e}")

    def loss(chain):
        return (plan(layer, chain, start, horizon) - z).square().sum()

    chain = GUESS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(chain), chain)
    h = 1e-5
    ends = [[plan_by_piqp(GUESS + side * h * e, start, horizon) for side in (1, -1)] for e in torch.eye(2).double()]
    truth = torch.tensor([np.square(up - z.numpy()).sum() - np.square(down - z.numpy()).sum() for up, down in ends])
    gradient_error = float((gradient - truth / (2 * h)).abs().max() / gradient.abs().max())
    print(f"gradient in (stiffness, damping) {gradient.tolist()}, error to differences {gradient_error:.0e}")

    optimizer = torch.optim.Adam([chain], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(chain).backward()
        optimizer.step()
        schedule.step()
    learned = chain.detach().tolist()
    print(f"learned {learned}, true {TRUE.tolist()}, guess {GUESS.tolist()}")
    return {"law_error": law_error, "gradient_error": gradient_error, "limits": limits, "learned": learned}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--horizon", type=int, default=200, help="decisions that are planned")
    main(parser.parse_args().horizon)
