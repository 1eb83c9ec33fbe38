"""Activations as optimization problems.

ReLU, sigmoid, softmax and sparsemax are solutions of small convex programs. As layers they agree with their closed
forms to second order, and ReLU shows what happens at a kink.
"""

# %% [markdown]
# ## The problem
#
# Each of four activations of a vector c is the solution of a program:
#
# | activation | program |
# |---|---|
# | ReLU | minimize ½\|x − c\|² over x ≥ 0 |
# | sigmoid | maximize cᵀx − Σ xᵢ log xᵢ − Σ (1 − xᵢ) log(1 − xᵢ) |
# | softmax | maximize cᵀx − Σ xᵢ log xᵢ over Σ xᵢ = 1 |
# | sparsemax | minimize ½\|x − c\|² over Σ xᵢ = 1, x ≥ 0 |
#
# Sparsemax is from Martins and Astudillo, *From softmax to sparsemax* (2016). Optimization problems as layers that
# generalize such activations are from Amos and Kolter, *OptNet* (2017), and Agrawal et al., *Differentiable convex
# optimization layers* (2019). Nobody needs a solver for a ReLU. But the closed forms are known with all their
# derivatives, and that makes activations a good test: of `foldopt.CvxpyLayer` here, and of any other layer.

# %%
import cvxpy as cp
import matplotlib.pyplot as plt
import torch
from torch.func import hessian, jacrev

from foldopt import CvxpyLayer
from foldopt.errors import KinkError


def layers(n, **options):
    """Return the four programs in n variables as layers of c (n,) or (B, n), by name."""
    c, x = cp.Parameter(n), cp.Variable(n)
    near, entropy = cp.sum_squares(x - c) / 2, cp.sum(cp.entr(x))
    problems = {
        "relu": cp.Problem(cp.Minimize(near), [x >= 0]),
        "sigmoid": cp.Problem(cp.Maximize(c @ x + entropy + cp.sum(cp.entr(1 - x)))),
        "softmax": cp.Problem(cp.Maximize(c @ x + entropy), [cp.sum(x) == 1]),
        "sparsemax": cp.Problem(cp.Minimize(near), [cp.sum(x) == 1, x >= 0]),
    }
    return {name: CvxpyLayer(problem, [c], [x], **options) for name, problem in problems.items()}


# %% [markdown]
# ## Closed forms
#
# The activations, their Jacobians, and the second derivative of a weighted sum wᵀx, written by hand.


# %%
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


c, w = 1.5 * torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
truth, errors = closed_forms(c, w), {}
for name, layer in layers(8).items():
    found = (
        layer(c)[0],
        jacrev(lambda c, layer=layer: layer(c)[0])(c),
        hessian(lambda c, layer=layer: w @ layer(c)[0])(c),
    )
    errors[name] = [float((a - b).abs().max()) for a, b in zip(found, truth[name], strict=True)]
    print(f"{name}: x, dx/dc and the second derivative are right to 1e-12: {max(errors[name]) < 1e-12}")

# %% [markdown]
# ```text
# relu: x, dx/dc and the second derivative are right to 1e-12: True
# sigmoid: x, dx/dc and the second derivative are right to 1e-12: True
# softmax: x, dx/dc and the second derivative are right to 1e-12: True
# sparsemax: x, dx/dc and the second derivative are right to 1e-12: True
# ```
#
# ## At a kink
#
# ReLU has no derivative at 0. PyTorch's own `relu` returns 0 there without a word. The layer raises an error; with
# `degenerate="one_sided"` it returns the slope of one side, and its verdict says so.

# %%
at_kink = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
try:
    layers(3)["relu"](at_kink)[0].sum().backward()
except KinkError as error:
    raised = str(error)
    print("KinkError:", raised.split(":")[0])
one_sided = layers(3, degenerate="one_sided")["relu"]
(slopes,) = torch.autograd.grad(one_sided(at_kink)[0].sum(), at_kink)
print("slopes of one side:", slopes.tolist(), "verdict:", one_sided.last.verdict[0])

# %% [markdown]
# ```text
# KinkError: the solution has a kink
# slopes of one side: [0.0, 1.0, 1.0] verdict: kink
# ```
#
# The picture draws the first of two entries, at c = (t, 1), and its derivative in t, both as the layers return them.
# Sparsemax reaches 0 and 1 exactly, softmax never does.
#
# ![The four activations and their derivatives](../docs/assets/examples/optnet_layers.png)

# %%
t = torch.linspace(-2, 4, 80, dtype=torch.float64)  # without the kinks at 0 and 2
inputs, direction = torch.stack([t, torch.ones(80)], 1), torch.tensor([[1.0, 0.0]] * 80, dtype=torch.float64)
figure, panels = plt.subplots(1, 4, figsize=(8, 2.8), sharex=True)
for panel, (name, layer) in zip(panels, layers(2).items(), strict=True):
    values, slopes_of = torch.func.jvp(lambda c, layer=layer: layer(c)[0], (inputs,), (direction,))
    panel.plot(t, values[:, 0], label="value")
    panel.plot(t, slopes_of[:, 0], "--", label="derivative")
    panel.set(xlabel="t", title=name, xticks=(-2, 0, 2, 4))
panels[0].set_ylabel("first entry of x")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()
