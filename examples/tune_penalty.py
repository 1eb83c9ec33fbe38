"""Tune a hyperparameter by a second fold.

The best penalty of a logistic regression is itself a solution, so it can be folded too. The second fold tells which
validation samples decide how much to regularize.
"""

# %% [markdown]
# ## The problem
#
# The weights of a logistic regression solve a problem that has a penalty λ in it. The penalty solves a second problem,
# in which the weights occur:
#
# > w(λ) = argmin over w of mean log(1 + exp(−yᵢ xᵢᵀw)) + ½λ|w|² on the training data
# >
# > λ* = argmin over λ of V(λ) = Σⱼ cⱼ log(1 + exp(−yⱼ xⱼᵀw(λ))) on the validation data, with weights cⱼ = 1/n
#
# This is a bilevel problem. Folding the first line gives dV/dλ, with which any root finder solves V′(λ) = 0. Folding
# the second line as well makes λ* a differentiable function of everything in it. Here we ask for its derivatives in the
# weights cⱼ of the validation samples: which samples decide how much we regularize?

# %%
import matplotlib.pyplot as plt
import scipy.optimize
import torch
from torch.nn.functional import softplus

import foldopt

generator = torch.Generator().manual_seed(1)
truth = torch.cat([torch.tensor([1.5, -1.0, 0.5]), torch.zeros(7)]).double()


def samples(count):
    """Return features times labels, y x, (count, 10): all that the loss needs."""
    x = torch.randn(count, 10, dtype=torch.float64, generator=generator)
    y = (x @ truth + torch.randn(count, dtype=torch.float64, generator=generator)).sign()
    return x * y[:, None]


train, validation = samples(40), samples(30)

# %% [markdown]
# ## The first fold
#
# A root finder of SciPy is the black box; the step is one of gradient descent. The parameter is u = log λ, so that the
# penalty stays positive. States of a layer have a batch dimension: w is (1, 10) and u is (1,).


# %%
def training_slope(w, u):
    """Return the gradient of the training problem at w (1, 10) for u = log(penalty) (1,)."""
    pull = -torch.sigmoid(-w @ train.T) @ train / len(train)
    return pull + u.exp()[:, None] * w


def fitted(u):
    """Return w (1, 10) for u (1,), by SciPy's root finder on the optimality condition."""

    def slope(w):
        return training_slope(torch.from_numpy(w)[None], u)[0].numpy()

    return torch.from_numpy(scipy.optimize.root(slope, [0.0] * 10, tol=1e-14).x)[None]


weights = foldopt.fold(solve=fitted, update=lambda w, u: w - 0.5 * training_slope(w, u))


def validation_loss(u, c):
    """Return V (1,) for u (1,) and the weights c (30,) of the validation samples."""
    return softplus(-weights(u) @ validation.T) @ c


# %% [markdown]
# ## The second fold
#
# The inner layer gives V′, and a bracketing root finder of SciPy the best u. The step of the outer layer is gradient
# descent on V: it contains the inner layer. Its derivative needs the second derivative of that layer, which folded
# layers have.


# %%
def slope_of_validation(u, c):
    """Return dV/du (1,), itself differentiable in u and c."""
    return torch.func.grad(lambda u: validation_loss(u, c).sum())(u)


def best_penalty(c):
    """Return the u (1,) with V'(u) = 0, for c (1, 30)."""

    def slope(u):
        return slope_of_validation(torch.tensor([u], dtype=torch.float64), c[0]).item()

    return torch.tensor([scipy.optimize.brentq(slope, -9, 2, xtol=1e-13)], dtype=torch.float64)


tuned = foldopt.fold(solve=best_penalty, update=lambda u, c: u - slope_of_validation(u, c[0]))
even = torch.full((1, len(validation)), 1 / len(validation), dtype=torch.float64)
log_penalty = tuned(even)
influence = torch.func.jacrev(tuned)(even)[0, 0]

h, direction = 1e-4, torch.randn(even.shape, dtype=torch.float64, generator=generator)
moved = [best_penalty(even + side * h * direction).item() for side in (1, -1)]
print(f"best penalty {log_penalty.exp().item():.4f}")
print(f"derivative of its logarithm in a direction: {influence @ direction[0]:.6f}")
print(f"by differences of the root finder:          {(moved[0] - moved[1]) / (2 * h):.6f}")

# %% [markdown]
# ```text
# best penalty 0.0464
# derivative of its logarithm in a direction: 27.042152
# by differences of the root finder:          27.042150
# ```
#
# ## Which samples decide?
#
# Leaving a sample out sets its weight cⱼ to 0. The derivative predicts how far the best penalty then moves, for all
# samples at the price of one. Solving the bilevel problem anew for each sample shows how good the prediction is.

# %%
predicted = -influence / len(validation)
left_out = even * (1 - torch.eye(len(validation), dtype=torch.float64))
actual = torch.cat([best_penalty(one[None]) for one in left_out]) - log_penalty
print(f"correlation of predicted and actual moves: {torch.corrcoef(torch.stack([predicted, actual]))[0, 1]:.3f}")
strongest = int(actual.abs().argmax())
print(f"without its most influential sample the best penalty is {(log_penalty + actual[strongest]).exp().item():.4f}")

# %% [markdown]
# ```text
# correlation of predicted and actual moves: 0.992
# without its most influential sample the best penalty is 0.0235
# ```
#
# ![Validation loss; predicted and actual moves of the best penalty](../docs/assets/examples/tune_penalty.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
grid = torch.linspace(-6, 0.5, 40, dtype=torch.float64)
for weight, best, label in (
    (even[0], log_penalty, "all samples"),
    (left_out[strongest], log_penalty + actual[strongest], "without one sample"),
):
    losses = [(validation_loss(u[None], weight) / weight.sum()).item() for u in grid]
    (line,) = left.semilogx(grid.exp(), losses, label=label)
    left.plot(best.exp(), validation_loss(best, weight) / weight.sum(), "o", color=line.get_color())
left.set(xlabel="penalty λ", ylabel="validation loss", title="The best penalty depends on the data")
left.legend()
right.axline((0, 0), slope=1, color="0.6", linewidth=1)
right.plot(predicted, actual, "o")
right.set(xlabel="predicted by the second fold", ylabel="after solving anew", title="Move of log λ without a sample")
plt.show()

# %% [markdown]
# A layer inside the step of another layer is *nested folding*. The paper's f-PGDb is of this kind; the tutorial [Nested
# folding](../docs/tutorials/nested.md) shows it. For a penalty whose path is piecewise linear, see [the
# lasso](lasso_path.py).
