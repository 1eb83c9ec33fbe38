"""A portfolio of 1,000 assets.

A forecast of returns is trained for the decision that it leads to, through a sparse program with a factor model of the
risk.
"""

# %% [markdown]
# ## The problem
#
# A portfolio x of 1,000 assets is chosen for forecast returns m. The risk comes from 20 factors F that all assets
# share, and from the noise D of each asset, a diagonal matrix:
#
# > maximize mᵀx − ½ρ xᵀ(FFᵀ + D)x subject to Σx = 1, 0 ≤ x ≤ 0.05
#
# The covariance has a million entries and is never formed. With 20 more variables y = Fᵀx the quadratic term is
# diagonal, and the rows Fᵀx − y = 0 are all that is added. `foldopt.QPLayer` takes the sparse matrices as they are.
#
# The true returns rise steeply with three features of an asset; the forecast is linear in them and so cannot be right.
# Least squares (two stages) is right on average over all assets. Training through the layer is right where the decision
# is made: at the few assets that are bought (Elmachtoub and Grigas, *Smart "predict, then optimize"*, 2022).

# %%
import matplotlib.pyplot as plt
import numpy as np
import qpsolvers
import scipy.sparse
import torch

from foldopt import QPLayer

ASSETS, FACTORS, DAYS = 1000, 20, 4
LARGEST = 0.05  # share of one asset
RISK = 5.0

generator = np.random.default_rng(0)
F = torch.as_tensor(generator.standard_normal((ASSETS, FACTORS)) / FACTORS**0.5)
noise = torch.as_tensor(generator.uniform(0.5, 1.5, ASSETS))  # the diagonal of D


def market(days):
    """Return features (days, assets, 4), the last of which is 1, and returns (days, assets)."""
    features = generator.standard_normal((days, ASSETS, 3))
    score = features @ np.array([1.0, -0.5, 0.3])
    returns = 0.2 * np.expm1(score) + 0.1 * generator.standard_normal((days, ASSETS))
    features = np.concatenate([features, np.ones((days, ASSETS, 1))], 2)
    return torch.as_tensor(features), torch.as_tensor(returns)


Q = scipy.sparse.diags(np.concatenate([RISK * noise, np.full(FACTORS, RISK)]))
total = np.concatenate([np.ones(ASSETS), np.zeros(FACTORS)])[None]
rows = scipy.sparse.vstack([scipy.sparse.hstack([F.T.numpy(), -scipy.sparse.identity(FACTORS)]), total]).tocsr()
right_side = torch.cat([torch.zeros(FACTORS), torch.ones(1)]).double()
free = torch.full((FACTORS,), torch.inf)
lower, upper = torch.cat([torch.zeros(ASSETS), -free]), torch.cat([torch.full((ASSETS,), LARGEST), free])
layer = QPLayer(degenerate="one_sided")


def portfolio(m):
    """Return the portfolios x (days, assets), differentiable in the returns m (days, assets)."""
    p = torch.cat([-m, m.new_zeros(len(m), FACTORS)], 1)
    return layer(Q, p, None, None, rows, right_side, lower=lower, upper=upper)[:, :ASSETS]


def value(x, m):
    """Return the mean over days of m'x - risk/2 x'(FF' + D)x."""
    risk = (x @ F).square().sum(1) + (noise * x.square()).sum(1)
    return ((m * x).sum(1) - RISK / 2 * risk).mean()


def regret(weights, features, returns, decide=portfolio):
    """Return the mean over days of what decisions on the forecast features @ weights lose."""
    return value(decide(returns), returns) - value(decide(features @ weights), returns)


# %% [markdown]
# ## Is the gradient right?
#
# PIQP solves the same program with the covariance formed, in dense arithmetic and to 1e-12. Differences of its
# portfolios along a direction are the truth for the gradient of the regret.


# %%
def portfolio_by_piqp(m):
    """Return the same portfolios by PIQP alone, with the covariance formed."""
    dense, one = RISK * (F @ F.T + noise.diag()).numpy(), np.ones(ASSETS)
    rest = {"A": one[None], "b": np.ones(1), "lb": 0 * one, "ub": LARGEST * one, "solver": "piqp"}
    exact = {"eps_abs": 1e-12, "eps_rel": 1e-12}
    return torch.stack([torch.tensor(qpsolvers.solve_qp(dense, -day, **rest, **exact)) for day in m.numpy()])


seen, unseen = market(DAYS), market(DAYS)
two_stage = torch.linalg.lstsq(seen[0].flatten(0, 1), seen[1].flatten()[:, None]).solution[:, 0]
error = float((portfolio(seen[0] @ two_stage) - portfolio_by_piqp(seen[0] @ two_stage)).abs().max())
weights = two_stage.clone().requires_grad_()
(gradient,) = torch.autograd.grad(regret(weights, *seen), weights)
direction, h = torch.tensor([0.6, -0.4, 0.5, 0.3], dtype=torch.float64), 1e-6
up, down = (-value(portfolio_by_piqp(seen[0] @ (two_stage + side * h * direction)), seen[1]) for side in (1, -1))
slope, truth = float(gradient @ direction), float((up - down) / (2 * h))
print(f"portfolios agree with PIQP to 1e-7: {error < 1e-7}")
print(f"slope of the regret in a direction {slope:.6f}, by differences {truth:.6f}")

# %% [markdown]
# ```text
# portfolios agree with PIQP to 1e-7: True
# slope of the regret in a direction -0.380357, by differences -0.380359
# ```
#
# ## Training
#
# Twenty-five steps of Adam on the regret, starting from least squares. On the way some day may lie at a kink, where an
# asset is just about to be bought; `degenerate="one_sided"` goes on with the derivative of one side. The table also has
# the squared error of the forecast, which gets worse.

# %%
optimizer = torch.optim.Adam([weights], lr=0.05)
for _ in range(25):
    optimizer.zero_grad()
    (-value(portfolio(seen[0] @ weights), seen[1])).backward()
    optimizer.step()
weights = weights.detach()
results = {}
for name, w in (("two stages", two_stage), ("trained", weights)):
    mse = float((seen[0] @ w - seen[1]).square().mean())
    results[name] = {"seen": float(regret(w, *seen)), "unseen": float(regret(w, *unseen)), "mse": mse}
    print("{:11} regret {seen:.4f} seen, {unseen:.4f} unseen; squared error {mse:.3f}".format(name, **results[name]))
best = float(value(portfolio(unseen[1]), unseen[1]))
print(f"value of the best portfolio, unseen: {best:.3f}")

# %% [markdown]
# ```text
# two stages  regret 0.1536 seen, 0.1603 unseen; squared error 0.171
# trained     regret 0.0191 seen, 0.0141 unseen; squared error 0.994
# value of the best portfolio, unseen: 2.980
# ```
#
# The regret falls to an eighth, on days that training has not seen too. The left picture shows how. The trained
# forecast is wrong for the crowd of ordinary assets, where that does not matter, and much nearer to the truth for the
# best ones, among which the portfolio chooses. Least squares is right in the crowd and wrong at the top.
#
# ![Forecast over true return of each asset; regret of both forecasts](../docs/assets/examples/factor_portfolio.png)

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
for w, mark, color, name in ((two_stage, "x", "C1", "least squares"), (weights, ".", "C0", "trained on regret")):
    left.plot(unseen[1][0], (unseen[0] @ w)[0], mark, color=color, alpha=0.6, label=name)
left.axline((0, 0), slope=1, color="0.1", linewidth=1)
left.set(xlabel="true return", ylabel="forecast", title="1,000 assets on an unseen day")
left.legend(loc="lower right")
for shift, color, part in ((-0.2, "C5", "seen"), (0.2, "C0", "unseen")):
    right.bar([shift, 1 + shift], [one[part] for one in results.values()], width=0.4, color=color, label=part)
right.set(xticks=(0, 1), xticklabels=("least squares", "regret"), xlabel="trained on", ylabel="regret", title="Regret")
right.grid(visible=False, axis="x")
right.legend()
plt.show()
