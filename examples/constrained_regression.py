"""Regression with monotone outputs.

Quantiles of a forecast never cross. A linear model is trained through the projection on nondecreasing vectors, and
predicts better than one that is projected afterwards.
"""

# %% [markdown]
# ## The problem
#
# The m outputs of every sample are known to be nondecreasing, y₁ ≤ … ≤ yₘ, as the quantiles of a forecast are. The
# model is a linear map followed by isotonic regression:
#
# > ŷ = P(xᵀW) with P(c) = argmin over z of |z − c|² subject to z₁ ≤ … ≤ zₘ
#
# The usual way is to fit xᵀW to y by least squares and to apply P afterwards. Here W is trained *through* P, as in the
# monotonic output regression of Agrawal, Barratt and Boyd, *Learning convex optimization models* (2021). P is a
# quadratic program, which `foldopt.CvxpyLayer` takes as it is written in CVXPY.

# %%
import cvxpy as cp
import matplotlib.pyplot as plt
import torch

from foldopt import CvxpyLayer

INPUTS, OUTPUTS = 20, 10
NOISE = 1.0  # standard deviation, before the projection

c, z = cp.Parameter(OUTPUTS), cp.Variable(OUTPUTS)
layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(z - c)), [cp.diff(z) >= 0]), [c], [z])

# %% [markdown]
# The projection also has an algorithm of its own, *pool adjacent violators* (Ayer, Brunk, Ewing, Reid and Silverman,
# 1955): neighbours that decrease are merged into their mean. It gives us the truth to compare with, and the data: y =
# P(xᵀW + noise) for a hidden W.


# %%
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


generator = torch.Generator().manual_seed(0)
hidden = torch.randn(INPUTS, OUTPUTS, dtype=torch.float64, generator=generator)
(x, y), (x_new, y_new) = samples(100, hidden, generator), samples(1000, hidden, generator)

# %% [markdown]
# ## Is the gradient right?
#
# The derivative of P takes the mean over each block of entries that P makes equal. Central differences of the pooling
# algorithm, entry by entry of W, know nothing of the layer.


# %%
def loss(W, project=lambda c: layer(c)[0]):
    """Return the mean squared error on the training samples of W (n, m) followed by a projection."""
    return (project(x @ W) - y).square().mean()


least_squares = torch.linalg.lstsq(x, y).solution
error = float((layer(x @ least_squares)[0] - pool_adjacent_violators(x @ least_squares)).abs().max())
W = least_squares.clone().requires_grad_()
(gradient,) = torch.autograd.grad(loss(W), W)
h, units = 1e-6, torch.eye(W.numel(), dtype=torch.float64).reshape(-1, *W.shape)
ends = [[loss(least_squares + side * h * e, pool_adjacent_violators) for side in (1, -1)] for e in units]
differences = torch.stack([(up - down) / (2 * h) for up, down in ends]).reshape(W.shape)
gradient_error = float((gradient - differences).abs().max() / differences.abs().max())
print(f"projections agree with pooling to 1e-12: {error < 1e-12}")
print(f"the gradient agrees with differences to 1e-7: {gradient_error < 1e-7}")

# %% [markdown]
# ```text
# projections agree with pooling to 1e-12: True
# the gradient agrees with differences to 1e-7: True
# ```
#
# ## Training
#
# Sixty steps of Adam from the least-squares fit. The hidden W, with P, is the best that any method could find.

# %%
optimizer = torch.optim.Adam([W], lr=0.1)
for _ in range(60):
    optimizer.zero_grad()
    loss(W).backward()
    optimizer.step()

errors = {}
for name, weights, shape in (
    ("least squares", least_squares, torch.clone),
    ("least squares, then P", least_squares, pool_adjacent_violators),
    ("trained through P", W.detach(), pool_adjacent_violators),
    ("hidden W, with P", hidden, pool_adjacent_violators),
):
    errors[name] = [float((shape(a @ weights) - b).square().mean()) for a, b in ((x, y), (x_new, y_new))]
    print("{:22} mean squared error {:.3f} seen, {:.3f} unseen".format(name, *errors[name]))

# %% [markdown]
# ```text
# least squares          mean squared error 2.394 seen, 3.412 unseen
# least squares, then P  mean squared error 1.512 seen, 1.886 unseen
# trained through P      mean squared error 0.173 seen, 0.577 unseen
# hidden W, with P       mean squared error 0.318 seen, 0.283 unseen
# ```
#
# The outputs are no linear function of the inputs, because P is not linear. Least squares fits a linear function to
# them and projects too late. The model that is trained through P looks for the linear map *before* the projection, and
# has a third of the error on samples that it has not seen.
#
# ![Errors of the four methods; the outputs of one sample](../docs/assets/examples/constrained_regression.png)

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
for shift, color, part in ((-0.2, "C5", "seen"), (0.2, "C0", "unseen")):
    heights = [pair[part == "unseen"] for pair in errors.values()]
    left.barh([k + shift for k in range(4)], heights, height=0.4, color=color, label=part)
left.set(yticks=range(4), yticklabels=errors, xlabel="mean squared error", title="Errors by method")
left.invert_yaxis()
left.legend(loc="lower right")
entries = range(1, OUTPUTS + 1)
right.plot(entries, (x_new @ least_squares)[0], "x--", color="C1", label="least squares")
right.plot(entries, pool_adjacent_violators(x_new @ W.detach())[0], "s-", color="C0", label="trained through P")
right.plot(entries, y_new[0], "o-", color="0.1", label="true")
right.set(xlabel="output", ylabel="value", title="One unseen sample", xticks=range(1, 11, 3))
right.set_ylim(-1, 5.5)
right.legend(loc="upper left")
plt.show()
