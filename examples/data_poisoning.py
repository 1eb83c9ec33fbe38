"""Data poisoning of a classifier.

Every training point of a logistic regression is moved a little along the gradient of the test loss. The fit falls for
it, and the gradient tells beforehand how much.
"""

# %% [markdown]
# ## The problem
#
# A logistic regression on points of the plane is a program with two exponential cones per point:
#
# > θ(x) = argmin over (w, b) of 1/n Σᵢ log(1 + exp(−yᵢ(wᵀxᵢ + b))) + 0.1 |w|²
#
# Its weights are a function of the training points xᵢ. The gradient of the *test* loss in the *training* points tells
# an attacker where to push each of them, and a statistician which of them the fit depends on (Agrawal, Amos, Barratt,
# Boyd, Diamond and Kolter, *Differentiable convex optimization layers*, 2019, section 6.1; Biggio, Nelson and Laskov,
# *Poisoning attacks against support vector machines*, 2012).

# %%
from itertools import pairwise

import cvxpy as cp
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

from foldopt import CvxpyLayer

POINTS, RIDGE = 30, 0.1
STEP = 0.05  # length by which a point moves in one step of the attack; the classes are 3 apart
generator = torch.Generator().manual_seed(0)


def points(n):
    """Return x (n, 2) and labels y (n,) in {-1, 1} of two overlapping classes."""
    y = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    return torch.randn(n, 2, dtype=torch.float64, generator=generator) + 1.5 * y[:, None] * torch.tensor([1.0, 0.3]), y


(x, y), test = points(POINTS), points(1000)
moved, w, b = cp.Parameter((POINTS, 2)), cp.Variable(2), cp.Variable()
margins = cp.multiply(y.numpy(), moved @ w + b)
objective = cp.sum(cp.logistic(-margins)) / POINTS + RIDGE * cp.sum_squares(w)
layer = CvxpyLayer(cp.Problem(cp.Minimize(objective)), [moved], [w, b])


def fit(x):
    """Return theta (3,) = (w_1, w_2, b) for training points x (n, 2)."""
    w, b = layer(x)
    return torch.cat([w, b[None]])


def loss(theta, x, y):
    """Return the mean logistic loss of theta (3,)."""
    return softplus(-y * (x @ theta[:2] + theta[2])).mean()


def gradient(x):
    """Return the gradient (n, 2) of the test loss in the training points."""
    return torch.func.grad(lambda x: loss(fit(x), *test))(x)


# %% [markdown]
# ## Is the gradient right?
#
# Newton's method on the objective finds the same weights without a cone. Differences of it, coordinate by coordinate of
# all points, are the truth for the gradient.


# %%
def fit_by_newton(x):
    """Return the same theta (3,) by ten steps of Newton's method from 0."""
    theta = torch.zeros(3, dtype=torch.float64)

    def objective(theta):
        return loss(theta, x, y) + RIDGE * theta[:2].square().sum()

    for _ in range(10):
        theta -= torch.linalg.solve(torch.func.hessian(objective)(theta), torch.func.grad(objective)(theta))
    return theta


fit_error = float((fit(x) - fit_by_newton(x)).abs().max())
h, units = 1e-5, torch.eye(2 * POINTS, dtype=torch.float64).reshape(-1, POINTS, 2)
ends = [[loss(fit_by_newton(x + side * h * e), *test) for side in (1, -1)] for e in units]
truth = torch.stack([(up - down) / (2 * h) for up, down in ends]).reshape(POINTS, 2)
gradient_error = float((gradient(x) - truth).abs().max() / truth.abs().max())
print(f"the weights agree with Newton's method to 1e-12: {fit_error < 1e-12}")
print(f"the gradient agrees with differences to 1e-7: {gradient_error < 1e-7}")

# %% [markdown]
# ```text
# the weights agree with Newton's method to 1e-12: True
# the gradient agrees with differences to 1e-7: True
# ```
#
# ## The attack
#
# Twenty times, every point moves by the same small length along its gradient. As a control, other points move by that
# length in random directions.

# %%
attacked, control = x, x
losses, beside, predicted = [float(loss(fit(x), *test))], [float(loss(fit(x), *test))], []
for _ in range(20):
    direction = gradient(attacked)
    push = STEP * direction / direction.norm(dim=1, keepdim=True)
    attacked = attacked + push
    aside = torch.randn(POINTS, 2, dtype=torch.float64, generator=generator)
    control = control + STEP * aside / aside.norm(dim=1, keepdim=True)
    predicted.append(float((direction * push).sum()))
    losses.append(float(loss(fit(attacked), *test)))
    beside.append(float(loss(fit(control), *test)))
rises = [after - before for before, after in pairwise(losses)]
print(f"the first step raises the loss by {rises[0]:.5f}; the gradient predicted {predicted[0]:.5f}")
print(f"test loss {losses[0]:.4f}; after the attack {losses[-1]:.4f}, after random moves {beside[-1]:.4f}")

# %% [markdown]
# ```text
# the first step raises the loss by 0.00321; the gradient predicted 0.00312
# test loss 0.2810; after the attack 0.3840, after random moves 0.2838
# ```
#
# Points near the boundary move into the other class, and those far from it move away from it. Together they turn the
# boundary. Random moves of the same size hardly matter.
#
# ![Moves of the points; test loss over the steps](../docs/assets/examples/data_poisoning.png)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4))
for label, color, marker in ((1, "C0", "o"), (-1, "C1", "s")):
    own, ends = x[y == label], (attacked - x)[y == label]
    left.quiver(*own.T, *ends.T, angles="xy", scale_units="xy", scale=1, color=color, width=0.006)
    left.plot(*own.T, marker, color=color, label=f"class {label}".replace("-", "−"))
for (w1, w2, b), style, name in ((fit(x), "-", "boundary before"), (fit(attacked), "--", "boundary after")):
    left.axline((0, float(-b / w2)), slope=float(-w1 / w2), color="0.1", linestyle=style, label=name)
left.set(xlabel="first feature", ylabel="second feature", xlim=(-5, 5), ylim=(-3, 3))
left.set_title("How the points move")
left.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), columnspacing=1)
right.plot(losses, label="along the gradient")
right.plot(beside, "--", label="in random directions")
right.set(xlabel="step of the attack", ylabel="test loss", title="What it does", xticks=range(0, 21, 5))
right.legend()
plt.show()
