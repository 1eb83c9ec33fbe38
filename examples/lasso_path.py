"""The path of the lasso.

The coefficients of a lasso are piecewise linear in the penalty. The path is walked from knot to knot on exact
derivatives, and the penalty is chosen by the gradient of a validation error.
"""

# %% [markdown]
# ## The problem
#
# The lasso selects features by a penalty s on the absolute values of the coefficients:
#
# > w(s) = argmin over w of ½|Xw − y|² + s Σ|wᵢ|
#
# In the variables (w⁺, w⁻, r), w = w⁺ − w⁻ and r = Xw − y, this is a sparse quadratic program for `foldopt.QPLayer`.
# Its solution is piecewise linear in s (Osborne, Presnell and Turlach, *A new approach to variable selection in least
# squares problems*, 2000). Between two *knots*, where a coefficient joins or leaves, w moves along a constant dw/ds. So
# one derivative inside a segment tells where the segment ends. At a knot two derivatives meet; there the layer says
# "kink".

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import torch

from foldopt import QPLayer

FEATURES, SAMPLES = 300, 100
generator = np.random.default_rng(0)
normal = generator.standard_normal
X, X_new = (
    scipy.sparse.random(SAMPLES, FEATURES, 0.1, "csr", random_state=generator, data_rvs=normal) for _ in range(2)
)
hidden = np.where(np.arange(FEATURES) < 5, normal(FEATURES), 0)
y, y_new = (part @ hidden + 0.2 * normal(SAMPLES) for part in (X, X_new))

Q = scipy.sparse.block_diag([scipy.sparse.csr_matrix((2 * FEATURES, 2 * FEATURES)), scipy.sparse.identity(SAMPLES)])
rows = scipy.sparse.hstack([X, -X, -scipy.sparse.identity(SAMPLES)]).tocsr()
penalized = torch.cat([torch.ones(2 * FEATURES), torch.zeros(SAMPLES)]).double()
lower = torch.cat([torch.zeros(2 * FEATURES), torch.full((SAMPLES,), -torch.inf)]).double()
layer = QPLayer(degenerate="one_sided")


def lasso(s):
    """Return w (features,), differentiable in the penalty s, a scalar tensor."""
    z = layer(Q, s * penalized, None, None, rows, torch.as_tensor(y), lower=lower)[0]
    return z[:FEATURES] - z[FEATURES : 2 * FEATURES]


# %% [markdown]
# ## Walk the path
#
# Forward mode gives w and dw/ds in one call. The next knot is where a coefficient becomes 0, or where the correlation
# of an unused feature with the residual grows to s. The truth for the slope is a closed form: dw/ds = −(XₐᵀXₐ)⁻¹
# sign(wₐ) on the coefficients a that are not 0.


# %%
def slope(s):
    """Return w and dw/ds (features,) as arrays, in forward mode."""
    s = torch.tensor(s, dtype=torch.float64)
    return tuple(part.numpy() for part in torch.func.jvp(lasso, (s,), (torch.ones_like(s),)))


def true_slope(w):
    """Return dw/ds (features,) at a solution w inside a segment, in closed form."""
    out, active = np.zeros(FEATURES), np.abs(w) > 1e-9
    columns = X[:, active].toarray()
    out[active] = -np.linalg.solve(columns.T @ columns, np.sign(w[active]))
    return out


def next_knot(s, w, dw):
    """Return the largest penalty below s at which a coefficient joins or leaves, if w (features,) moves along dw."""
    active, c, dc = np.abs(w) > 1e-9, X.T @ (y - X @ w), -X.T @ (X @ dw)
    joins = ((c - s * dc)[~active] / (side - dc[~active]) for side in (1, -1))
    ends = np.concatenate([s - w[active] / dw[active], *joins])
    return float(ends[(ends < s) & (ends > 0)].max(initial=0.0))


def walk(last):
    """Return the knots [(s, w)] down to one below `last`, and the largest gap between segments and error of dw/ds.

    Where the line of a segment misses the knot that it should begin at, it belongs to a later one: look nearer.
    """
    s = float(np.abs(X.T @ y).max())
    knots, gap, error = [(s, np.zeros(FEATURES))], 0.0, 0.0
    while s > last:
        for near in (1e-3, 1e-5, 1e-7):
            w, dw = slope(s - near * s)
            miss = np.abs(w + near * s * dw - knots[-1][1]).max()
            if miss < 1e-9:
                break
        gap, error = max(gap, miss), max(error, np.abs(dw - true_slope(w)).max())
        inside, s = s - near * s, next_knot(s - near * s, w, dw)
        knots.append((s, w + (s - inside) * dw))
    return knots, gap, error


knots, gap, slope_error = walk(0.02 * np.abs(X.T @ y).max())
print(f"{len(knots) - 1} segments, which meet to 1e-10: {gap < 1e-10}")
print(f"slopes agree with the closed form to 1e-10: {slope_error < 1e-10}")

# %% [markdown]
# ```text
# 38 segments, which meet to 1e-10: True
# slopes agree with the closed form to 1e-10: True
# ```
#
# ## What the layer says at a knot
#
# The derivative exists inside a segment and not at a knot. With the default `degenerate="raise"` the layer would raise
# `KinkError` there; this one takes the derivative of one side and reports.

# %%
(s, _), (t, _) = knots[len(knots) // 2 :][:2]
verdicts = {}
for place, at in (("at a knot", s), ("inside a segment", (s + t) / 2)):
    lasso(torch.tensor(at, dtype=torch.float64, requires_grad=True)).sum().backward()
    verdicts[place] = layer.last.verdict[0]
    print(f"{place}: {verdicts[place]}")

# %% [markdown]
# ```text
# at a knot: kink
# inside a segment: differentiable
# ```
#
# ## Choose the penalty
#
# Sixty steps of Adam on the validation error, in log s. With the whole path known, the best penalty can also be found
# exactly, segment by segment.


# %%
def best_on(knots):
    """Return (error, s) with the least mean squared validation error on the path."""
    found = []
    for (s, w), (t, v) in pairwise(knots):
        left, step = X_new @ w - y_new, X_new @ (v - w)
        share = np.clip(-left @ step / max(step @ step, 1e-300), 0, 1)
        found.append((np.square(left + share * step).mean(), s + share * (t - s)))
    return min(found)


log_s = torch.tensor(np.log(0.2 * knots[0][0]), requires_grad=True)
optimizer, tried = torch.optim.Adam([log_s], lr=0.05), []
for _ in range(60):
    optimizer.zero_grad()
    error = (torch.as_tensor(X_new.toarray()) @ lasso(log_s.exp()) - torch.as_tensor(y_new)).square().mean()
    error.backward()
    tried.append((log_s.exp().item(), error.item()))
    optimizer.step()
(where_found, found), (best, where) = tried[-1], best_on(knots)
print(f"validation error {found:.4f} at s = {where_found:.3f} by gradient, {best:.4f} at {where:.3f} on the path")

# %% [markdown]
# ```text
# validation error 0.0394 at s = 0.843 by gradient, 0.0393 at 0.867 on the path
# ```
#
# ![Coefficients and validation error over the penalty](../docs/assets/examples/lasso_path.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
penalties, path = np.array([s for s, _ in knots]), np.array([w for _, w in knots])
left.semilogx(penalties, path[:, 5:], color="0.75", linewidth=0.8)
left.semilogx(penalties, path[:, :5], linewidth=2)
left.set(xlabel="penalty s", ylabel="coefficient", title="Five true coefficients; the others in grey")
right.semilogx(penalties, np.square(path @ X_new.T.toarray() - y_new).mean(1), color="0.6", label="path")
right.semilogx(*zip(*tried[::5], strict=True), "o", color="C1", label="every fifth step of the search")
right.axvline(where, color="0.4", linestyle="--", linewidth=1, label="best on the path")
right.set(xlabel="penalty s", ylabel="validation error", title="The penalty chosen by its gradient")
right.set_ylim(0, 0.58)
right.legend(loc="upper right")
plt.show()

# %% [markdown]
# The penalty of a problem without a path is tuned by [a second fold](tune_penalty.py).
