"""Min-cost flow on 10,000 arcs: what a linear program can tell of its costs, and how costs are learned from a flow.

A city of 37 x 69 crossings with one arc per street and direction; some crossings send, others receive. The cost of an
arc is a weighted sum of its length, toll and risk, with weights that are unknown: min c'x, Nx = b, 0 <= x <= capacity.
All data are integers, so the flow is at a vertex. Where it is unique it does not move with c: its derivative is zero
and teaches nothing. Where costs tie there is none, and the layer says so. A ridge (r/2)|x|^2 makes the flow unique and
lets it move. Weights are learned through it and judged by the linear program.
"""

import argparse
from functools import partial

import numpy as np
import qpsolvers
import scipy.optimize
import scipy.sparse
import torch

from foldopt import QPLayer

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


def flow_by_highs(c, N, b, capacity):
    """Return a flow (arcs,) of least cost c'x by HiGHS alone, at a vertex."""
    bounds = np.stack([np.zeros(len(c)), capacity], 1)
    return torch.as_tensor(scipy.optimize.linprog(c, A_eq=N, b_eq=b, bounds=bounds, method="highs-ds").x)


def flow_by_piqp(c, ridge, N, b, capacity):
    """Return the flow (arcs,) with the ridge by PIQP alone, to 1e-12."""
    Q, exact = scipy.sparse.diags(np.full(len(c), ridge), format="csc"), {"eps_abs": 1e-12, "eps_rel": 1e-12}
    c, b, upper = c.numpy(), b.numpy(), capacity.numpy()
    return torch.tensor(qpsolvers.solve_qp(Q, c, A=N.tocsc(), b=b, lb=0 * upper, ub=upper, solver="piqp", **exact))


def answers(cost, tie, ridge, city):
    """Return what the layer says of costs that tie, of costs with `tie` added, and of a ridge, and what HiGHS says."""
    found, g = {}, torch.cos(torch.arange(len(cost)).double() ** 2)  # a cotangent in no special position
    for name, c, r in (("integer", cost, 0.0), ("no ties", cost + tie, 0.0), ("ridge", cost, ridge)):
        layer, c = QPLayer(degenerate="zero"), c.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(flow(layer, c, r, *city) @ g, c)
        found[name] = {"verdict": layer.last.verdict[0], "gradient": float(gradient.abs().max())}
        print(f"{name}, {len(c)} arcs: {layer.last.verdict[0]}, largest gradient {gradient.abs().max():.0e}")
    ends = [flow_by_highs(cost + side * 1e-3 * tie, *city) for side in (1, -1)]
    found["costs"], found["differ"] = [float(cost @ x) for x in ends], int((ends[0] != ends[1]).sum())
    print(f"HiGHS, integer: two flows of costs {found['costs']} differ on {found['differ']} arcs")
    ends = [flow_by_highs(cost + tie + h * g, *city) for h in (0, 1e-6)]
    found["moved"] = float((ends[1] - ends[0]).abs().max())
    print(f"HiGHS, no ties: costs moved by 1e-6 move the flow by {found['moved']:.0e}")
    return found


def main(height=37, width=69, ridge=10.0, steps=25):
    """Print what the example finds and return the numbers in a dict."""
    generator = np.random.default_rng(0)
    N, capacity, features = streets(height, width, generator)
    today, tomorrow = ((N, demand(height * width, generator), capacity) for _ in range(2))
    result = answers(features @ WEIGHTS, torch.as_tensor(0.1 * generator.random(len(capacity))), ridge, today)

    observed, layer = flow_by_highs(features @ WEIGHTS, *today), QPLayer()

    def loss(w, find):
        return (find(features @ w, ridge, *today) - observed).square().mean()

    weights = GUESS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights, partial(flow, layer)), weights)
    h = 1e-5
    ends = [[loss(GUESS + side * h * e, flow_by_piqp) for side in (1, -1)] for e in torch.eye(3).double()]
    truth = torch.stack([(up - down) / (2 * h) for up, down in ends])
    result["gradient_error"] = float((gradient - truth).abs().max() / truth.abs().max())
    print(f"ridge: gradient of the loss {gradient.tolist()}, error to differences {result['gradient_error']:.0e}")

    optimizer = torch.optim.Adam([weights], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(weights, partial(flow, layer)).backward()
        optimizer.step()
    best = [features @ WEIGHTS @ flow_by_highs(features @ WEIGHTS, *city) for city in (today, tomorrow)]
    for name, w in (("before", GUESS), ("after", weights.detach())):
        own = [features @ WEIGHTS @ flow_by_highs(features @ w, *city) for city in (today, tomorrow)]
        result[name] = [float(100 * (a / b - 1)) for a, b in zip(own, best, strict=True)]
        print("{}: flows {:.2f}% (today) and {:.2f}% (tomorrow) dearer than the best".format(name, *result[name]))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(37, 69), help="crossings in each direction")
    main(*parser.parse_args().size)
