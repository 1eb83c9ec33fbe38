"""Data poisoning: how every training point of a classifier moves its test loss.

A logistic regression on points of the plane, min 1/n sum_i log(1 + exp(-y_i (w'x_i + b))) + ridge |w|^2, is a program
with two exponential cones per point. Its weights (w, b) are a function of the training points x_i; the gradient of the
test loss in these tells an attacker where to push each of them, and a statistician which of them the fit depends on
(Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers, 2019, section 6.1; Biggio,
Nelson and Laskov, Poisoning attacks against support vector machines, 2012). The attack moves every point by the same
small length along its gradient, again and again. As a control, the points move by that length in random directions.

Truth: the weights by Newton's method on the objective, and central differences of these for the gradient.
"""

import argparse

import cvxpy as cp
import torch
from torch.nn.functional import softplus

from foldopt import CvxpyLayer

RIDGE = 0.1
STEP = 0.05  # length by which a point moves in one step of the attack; the classes are 3 apart


def points(n, generator):
    """Return x (n, 2) and labels y (n,) in {-1, 1} of two overlapping classes."""
    y = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    return torch.randn(n, 2, dtype=torch.float64, generator=generator) + 1.5 * y[:, None] * torch.tensor([1.0, 0.3]), y


def loss(theta, x, y):
    """Return the mean logistic loss of theta = (w_1, w_2, b)."""
    return softplus(-y * (x @ theta[:2] + theta[2])).mean()


def fit_layer(y):
    """Return the regression as a function of the training points x (n, 2); it answers theta (3,)."""
    x, w, b = cp.Parameter((len(y), 2)), cp.Variable(2), cp.Variable()
    margins = cp.multiply(y.numpy(), x @ w + b)
    objective = cp.sum(cp.logistic(-margins)) / len(y) + RIDGE * cp.sum_squares(w)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(objective)), [x], [w, b])

    def fit(x):
        w, b = layer(x)
        return torch.cat([w, b[None]])

    return fit


def fit_by_newton(x, y):
    """Return the same theta (3,) by ten steps of Newton's method from 0."""
    theta = torch.zeros(3, dtype=torch.float64)

    def objective(theta):
        return loss(theta, x, y) + RIDGE * theta[:2].square().sum()

    for _ in range(10):
        theta -= torch.linalg.solve(torch.func.hessian(objective)(theta), torch.func.grad(objective)(theta))
    return theta


def main(n=30, steps=20):
    """Print what the example finds and return the numbers in a dict."""
    generator = torch.Generator().manual_seed(0)
    (x, y), test = points(n, generator), points(1000, generator)
    fit = fit_layer(y)
    fit_error = float((fit(x) - fit_by_newton(x, y)).abs().max())

    def gradient(x):
        moved = x.clone().requires_grad_()
        return torch.autograd.grad(loss(fit(moved), *test), moved)[0]

    found, h = gradient(x), 1e-5
    units = torch.eye(2 * n, dtype=torch.float64).reshape(2 * n, n, 2)
    ends = [[loss(fit_by_newton(x + side * h * e, y), *test) for side in (1, -1)] for e in units]
    truth = torch.stack([(up - down) / (2 * h) for up, down in ends]).reshape(n, 2)
    gradient_error = float((found - truth).abs().max() / truth.abs().max())
    print(f"{n} points: weights agree with Newton's method to {fit_error:.0e}, the gradient to {gradient_error:.0e}")
    strongest = int(found.norm(dim=1).argmax())
    print(f"strongest point: {x[strongest].tolist()}, label {int(y[strongest])}, gradient {found[strongest].tolist()}")

    clean, attacked, control = float(loss(fit(x), *test)), x, x
    rises, predicted = [], []
    for _ in range(steps):
        direction, before = gradient(attacked), loss(fit(attacked), *test)
        push = STEP * direction / direction.norm(dim=1, keepdim=True)
        attacked = attacked + push
        predicted.append(float((direction * push).sum()))
        rises.append(float(loss(fit(attacked), *test) - before))
        aside = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        control = control + STEP * aside / aside.norm(dim=1, keepdim=True)
    poisoned, beside = (float(loss(fit(moved), *test)) for moved in (attacked, control))
    print(f"first step: the loss rises by {rises[0]:.5f}, by {predicted[0]:.5f} according to the gradient")
    print(f"test loss {clean:.4f}; after {steps} steps along the gradient {poisoned:.4f}, at random {beside:.4f}")
    result = {"fit_error": fit_error, "gradient_error": gradient_error, "rises": rises, "predicted": predicted}
    return result | {"clean": clean, "poisoned": poisoned, "control": beside}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=30, help="of the training set")
    main(parser.parse_args().points)
