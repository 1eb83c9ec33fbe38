"""Regression whose outputs are known to be nondecreasing, learned through the projection on such vectors.

The outputs of every sample are nondecreasing, y_1 <= ... <= y_m, as the quantiles of a forecast are. The model is a
linear map followed by isotonic regression: P(x'W), where P(c) minimizes |z - c|^2 over z_1 <= ... <= z_m. W is trained
end to end, as in the monotonic output regression of Agrawal, Barratt and Boyd, Learning convex optimization models
(2021). It is compared with least squares, which fits x'W to y without P, and with P applied to that fit afterwards.

The derivative of P takes the mean over each block of entries that P makes equal. Truth: the pool-adjacent-violators
algorithm (Ayer, Brunk, Ewing, Reid and Silverman, An empirical distribution function for sampling with incomplete
information, 1955) for the projection, and central differences of it for the gradient.
"""

import argparse

import cvxpy as cp
import torch

from foldopt import CvxpyLayer

NOISE = 1.0  # standard deviation, before the projection


def isotonic_layer(m):
    """Return P on vectors of m entries as a layer of c (B, m)."""
    c, z = cp.Parameter(m), cp.Variable(m)
    return CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(z - c)), [cp.diff(z) >= 0]), [c], [z])


def pool_adjacent_violators(c):
    """Return P(c) of c (B, m): blocks of neighbours are merged into their mean while these means decrease."""
    rows = []
    for row in c.tolist():
        blocks = []
        for value in row:
            blocks.append((value, 1))
            while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
                (a, left), (b, right) = blocks.pop(-2), blocks.pop()
                blocks.append(((a * left + b * right) / (left + right), left + right))
        rows.append([value for value, count in blocks for _ in range(count)])
    return torch.tensor(rows, dtype=c.dtype)


def samples(count, W, generator):
    """Return x (count, n) and y (count, m) = P(W x + noise), for W (n, m)."""
    x = torch.randn(count, len(W), dtype=torch.float64, generator=generator)
    noise = NOISE * torch.randn(count, W.shape[1], dtype=torch.float64, generator=generator)
    return x, pool_adjacent_violators(x @ W + noise)


def main(outputs=10, inputs=20, steps=60):
    """Print what the example finds and return the numbers in a dict."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(inputs, outputs, dtype=torch.float64, generator=generator)
    (x, y), (x_new, y_new) = samples(100, hidden, generator), samples(1000, hidden, generator)
    layer = isotonic_layer(outputs)

    def project(c):
        return layer(c)[0]

    def loss(W, project=project):
        return (project(x @ W) - y).square().mean()

    least_squares = torch.linalg.lstsq(x, y).solution
    c = x @ least_squares
    error = float((project(c) - pool_adjacent_violators(c)).abs().max())
    W = least_squares.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(W), W)
    h, units = 1e-6, torch.eye(W.numel(), dtype=torch.float64).reshape(-1, *W.shape)
    ends = [[loss(least_squares + side * h * e, pool_adjacent_violators) for side in (1, -1)] for e in units]
    truth = torch.stack([(up - down) / (2 * h) for up, down in ends]).reshape(W.shape)
    gradient_error = float((gradient - truth).abs().max() / truth.abs().max())
    print(f"projections agree with pooling to {error:.0e}, the gradient of the loss to {gradient_error:.0e}")

    optimizer = torch.optim.Adam([W], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(W).backward()
        optimizer.step()
    trained, result = W.detach(), {"error": error, "gradient_error": gradient_error}
    for name, weights, shape in (
        ("least squares", least_squares, torch.clone),
        ("least squares, then P", least_squares, pool_adjacent_violators),
        ("trained through P", trained, pool_adjacent_violators),
        ("the hidden W, with P", hidden, pool_adjacent_violators),
    ):
        seen, unseen = (float((shape(a @ weights) - b).square().mean()) for a, b in ((x, y), (x_new, y_new)))
        result[name] = {"seen": seen, "unseen": unseen}
        print(f"{name}: mean squared error {seen:.3f} seen, {unseen:.3f} unseen")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=int, default=10, help="entries of y")
    main(parser.parse_args().outputs)
