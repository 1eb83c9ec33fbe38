"""ReLU, sigmoid, softmax and sparsemax as convex problems, compared with their closed forms to second order.

Each activation of c is the solution of a small problem. ReLU: min |x - c|^2 over x >= 0. Sigmoid: max c'x plus the
entropies of x and of 1 - x. Softmax: max c'x plus the entropy of x, over 1'x = 1. Sparsemax: min |x - c|^2 over the
simplex (Martins and Astudillo, From softmax to sparsemax, 2016). Optimization problems as layers that generalize such
activations: Amos and Kolter, OptNet (2017); Agrawal et al., Differentiable convex optimization layers (2019). Truth:
the closed forms and their derivatives, in float64.

ReLU has a kink at 0. There the layer raises `KinkError`; with degenerate="one_sided" it returns the slope of one side.
"""

import argparse

import cvxpy as cp
import torch
from torch.func import hessian, jacrev

from foldopt import CvxpyLayer
from foldopt.errors import KinkError


def layers(n, **options):
    """Return the four problems in n variables as layers of c (n,), by name."""
    c, x = cp.Parameter(n), cp.Variable(n)
    near, entropy = cp.sum_squares(x - c) / 2, cp.sum(cp.entr(x))
    problems = {
        "relu": cp.Problem(cp.Minimize(near), [x >= 0]),
        "sigmoid": cp.Problem(cp.Maximize(c @ x + entropy + cp.sum(cp.entr(1 - x)))),
        "softmax": cp.Problem(cp.Maximize(c @ x + entropy), [cp.sum(x) == 1]),
        "sparsemax": cp.Problem(cp.Minimize(near), [cp.sum(x) == 1, x >= 0]),
    }
    return {name: CvxpyLayer(problem, [c], [x], **options) for name, problem in problems.items()}


def closed_forms(c, w):
    """Return x (n,), dx/dc (n, n) and the second derivative of w'x (n, n), by name, at a c (n,) without a kink."""
    s, p, zero = c.sigmoid(), c.softmax(0), c.new_zeros(len(c), len(c))
    slope, jacobian = s * (1 - s), p.diag() - p.outer(p)
    pull = jacobian @ w
    positive = (c > 0).to(c)
    ordered = c.sort(descending=True).values
    levels = (ordered.cumsum(0) - 1) / torch.arange(1, len(c) + 1)  # what is subtracted if the first k are kept
    level = levels[(ordered > levels).sum() - 1]
    kept = (c > level).to(c)
    return {
        "relu": (c * positive, positive.diag(), zero),
        "sigmoid": (s, slope.diag(), (w * slope * (1 - 2 * s)).diag()),
        "softmax": (p, jacobian, pull.diag() - pull.outer(p) - p.outer(pull)),
        "sparsemax": (kept * (c - level), kept.diag() - kept.outer(kept) / kept.sum(), zero),
    }


def at_a_kink():
    """Return what ReLU answers at c = (-1, 0, 2): whether it raises, the slopes on one side, and the verdict."""
    c = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    try:
        layers(3)["relu"](c)[0].sum().backward()
    except KinkError as error:
        print(f"relu at c = {c.tolist()}: KinkError: {error}")
        raises = True
    else:
        raises = False
    layer = layers(3, degenerate="one_sided")["relu"]
    (slopes,) = torch.autograd.grad(layer(c)[0].sum(), c)
    print(f'relu with degenerate="one_sided": slopes {slopes.tolist()}, verdict "{layer.last.verdict[0]}"')
    return {"raises": raises, "slopes": slopes.tolist(), "verdict": layer.last.verdict[0]}


def main(n=8):
    """Print what the example finds and return the numbers in a dict."""
    generator = torch.Generator().manual_seed(0)
    c, w = 1.5 * torch.randn(2, n, dtype=torch.float64, generator=generator)
    truth, result = closed_forms(c, w), {}
    for name, layer in layers(n).items():
        found = (
            layer(c)[0],
            jacrev(lambda c, layer=layer: layer(c)[0])(c),
            hessian(lambda c, layer=layer: w @ layer(c)[0])(c),
        )
        result[name] = [float((a - b).abs().max()) for a, b in zip(found, truth[name], strict=True)]
        print("{}: errors of x {:.0e}, dx/dc {:.0e}, second derivative {:.0e}".format(name, *result[name]))
    return result | {"kink": at_a_kink(), "c": c}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=8, help="entries of c")
    main(parser.parse_args().size)
