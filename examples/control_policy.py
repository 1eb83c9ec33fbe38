"""A control policy that looks one step ahead, and a value function learned by running it.

The system x+ = A x + B u + w with random w is to be kept near 0 at a small cost x'x + u'u per step, with |u_i| <= 0.1.
Approximate dynamic programming takes the u that minimizes u'u + z'Pz, z = A x + B u, where z'Pz estimates the cost to
come. Without bounds the best P solves a Riccati equation. With bounds it is unknown; it is learned by gradient descent
on the simulated cost, through all decisions of the closed loop (Agrawal, Barratt, Boyd and Stellato, Learning convex
optimization control policies, 2020). P is a positive semidefinite parameter of the program, P = L L' with L free.

Truth: the simulated cost with decisions found by enumeration of the faces of the box, and central differences of it.
"""

import argparse
import itertools

import cvxpy as cp
import numpy as np
import scipy.linalg
import torch

from foldopt import CvxpyLayer

STATES, CONTROLS = 4, 2
LIMIT = 0.1  # of each entry of u
NOISE = 0.3  # standard deviation of the entries of w


def system(generator):
    """Return A (4, 4), of spectral radius 1, and B (4, 2)."""
    A, B = generator.standard_normal((STATES, STATES)), generator.standard_normal((STATES, CONTROLS))
    return torch.as_tensor(A / np.abs(np.linalg.eigvals(A)).max()), torch.as_tensor(B)


def policy_layer(B):
    """Return the decisions u (batch, 2) as a layer of A x (batch, 4) and P (4, 4)."""
    drift, P = cp.Parameter(STATES), cp.Parameter((STATES, STATES), PSD=True)
    u, z = cp.Variable(CONTROLS), cp.Variable(STATES)
    cost = cp.sum_squares(u) + cp.quad_form(z, P)
    problem = cp.Problem(cp.Minimize(cost), [z == drift + B.numpy() @ u, u <= LIMIT, u >= -LIMIT])
    layer = CvxpyLayer(problem, [drift, P], [u])
    return lambda drift, P: layer(drift, P)[0]


def policy_by_faces(B):
    """Return the same function in closed form: the best of the minimizers over the faces of the box, clipped to it."""
    faces = list(itertools.product((-1.0, 0.0, 1.0), repeat=CONTROLS))  # 0: the control is between its bounds

    def decide(drift, P):
        H, q, found = torch.eye(CONTROLS) + B.T @ P @ B, drift @ P @ B, []
        for face in faces:
            u, free = LIMIT * torch.tensor(face, dtype=H.dtype), torch.tensor(face) == 0
            best = -torch.linalg.solve(H[free][:, free], (q + u @ H)[:, free].T).T
            found.append(u.repeat(len(q), 1).masked_scatter(free.expand(len(q), -1), best.clamp(-LIMIT, LIMIT)))
        found = torch.stack(found)
        value = ((found @ H) * found / 2 + q * found).sum(2)
        return found[value.argmin(0), torch.arange(len(q))]

    return decide


def simulated_cost(decide, L, A, B, noise):
    """Return the mean cost per step from x = 0 under noise (steps, batch, 4), and the share of u at a bound."""
    x, cost, bounded = torch.zeros_like(noise[0]), 0.0, 0.0
    for w in noise:
        u = decide(x @ A.T, L @ L.T)
        cost = cost + (x.square().sum(1) + u.square().sum(1)).mean() / len(noise)
        bounded += float((u.abs() > LIMIT - 1e-9).double().mean()) / len(noise)
        x = x @ A.T + u @ B.T + w
    return cost, bounded


def main(horizon=25, batch=16, steps=25):
    """Print what the example finds and return the numbers in a dict."""
    generator = np.random.default_rng(3)
    A, B = system(generator)
    noise, later = (NOISE * torch.as_tensor(generator.standard_normal((horizon, k * batch, STATES))) for k in (1, 8))
    decide, exact = policy_layer(B), policy_by_faces(B)
    riccati = scipy.linalg.solve_discrete_are(A.numpy(), B.numpy(), np.eye(STATES), np.eye(CONTROLS))
    start = torch.as_tensor(np.linalg.cholesky(riccati))

    L = start.clone().requires_grad_()
    cost, bounded = simulated_cost(decide, L, A, B, noise)
    (gradient,) = torch.autograd.grad(cost, L)
    error = abs(float(cost.detach() - simulated_cost(exact, start, A, B, noise)[0]))
    direction, h = torch.as_tensor(generator.standard_normal(L.shape)), 1e-6
    up, down = (simulated_cost(exact, start + side * h * direction, A, B, noise)[0] for side in (1, -1))
    slope, truth = float((gradient * direction).sum()), float((up - down) / (2 * h))
    print(f"{horizon} steps, {batch} runs, {100 * bounded:.0f}% of the controls at a bound; cost right to {error:.0e}")
    print(f"slope of the cost in a random direction {slope:.8f}, by differences {truth:.8f}")

    optimizer, costs = torch.optim.Adam([L], lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        cost, _ = simulated_cost(decide, L, A, B, noise)
        cost.backward()
        optimizer.step()
        costs.append(cost.item())
    before, after = (float(simulated_cost(exact, one, A, B, later)[0]) for one in (start, L.detach()))
    print(f"cost per step {costs[0]:.4f} with the Riccati matrix, {costs[-1]:.4f} learned")
    print(f"under new noise {before:.4f} with the Riccati matrix, {after:.4f} learned")
    result = {"error": error, "slope": slope, "truth": truth, "bounded": bounded}
    return result | {"costs": costs, "before": before, "after": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--horizon", type=int, default=25, help="decisions of a run")
    main(parser.parse_args().horizon)
