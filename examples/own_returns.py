"""Your own returns.

Five real stocks over 32 years, from a CSV file to the regret on months that no model has seen: the harness trains two
stages and folding on three folds that walk forward in time.
"""

# %% [markdown]
# ## The problem
#
# At the beginning of each month we choose a portfolio x without knowing the returns c of the month:
#
# > maximize cᵀx over x ≥ 0, 1ᵀx = 1, xᵀVx ≤ γ
#
# where γ is 1.2 times the variance of equal weights. The returns are predicted from those of the month before, of the
# stocks and of two indices. The prices are the file Stocks.csv that matplotlib ships (Yahoo Finance, 1990 to 2022).
# Nobody could know in 1990 that these five stocks would still be there in 2022: the numbers compare methods and are no
# advice.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.cbook import get_sample_data

ROOT = Path(__file__).resolve().parents[1]
STOCKS, INDICES = ["IBM", "AAPL", "MSFT", "XRX", "ADBE"], ["^GSPC", "^IXIC"]
METHODS = {"two_stage": "two stages", "fold": "folding"}
FOLDS, EPOCHS = 3, 20

prices = pd.read_csv(get_sample_data("Stocks.csv", asfileobj=False), comment="#", index_col="Date")
months = prices.index.str.endswith("-01")  # the other rows have no prices
returns = prices.loc[months, STOCKS + INDICES].pct_change().dropna()
print(f"{len(returns)} months from {returns.index[0]} to {returns.index[-1]}")

# %% [markdown]
# ```text
# 389 months from 1990-02-01 to 2022-06-01
# ```
#
# ## Training
#
# `run.py` takes the file as `task.csv=`. Each fold tests on 39 months in the last 30 % of them, stops where the 58
# months before those say, and trains on all earlier ones. One model is trained for the squared error (two stages), one
# through the decision (folding). `task.fold=0,1,2` and `backend=two_stage,fold` with `-m` are six runs.

# %%
regret = {"equal weights": [], **{name: [] for name in METHODS.values()}}
with tempfile.TemporaryDirectory() as folder:
    returns.to_csv(Path(folder, "returns.csv"))
    task = ["task=portfolio", f"task.csv={folder}/returns.csv", f"task.features={INDICES}", f"task.folds={FOLDS}"]
    sweep = ["-m", f"task.fold={','.join(map(str, range(FOLDS)))}", f"backend={','.join(METHODS)}"]
    settings = ["model=linear", "train.lr=0.003", f"train.epochs={EPOCHS}", "device=cpu"]
    place = [f"paths.runs={folder}/runs", "tracking.mode=disabled", "progress=false"]
    command = [sys.executable, ROOT / "run.py", *sweep, *task, *settings, *place]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found = {}
    for run in Path(folder, "runs").glob("portfolio/*"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        final = json.loads((run / "summary.json").read_text())["final"]
        epochs = pd.read_csv(run / "metrics.csv").query("split == 'val'")
        found[config["backend"]["name"], config["task"]["fold"]] = final["test_at_best_val"], epochs

# %% [markdown]
# ## Are the best portfolios right?
#
# The regret is what is lost against the best portfolio in hindsight. CVXPY finds the best portfolios too, with the
# covariance by the formula of Ledoit and Wolf, *A well-conditioned estimator for large-dimensional covariance matrices*
# (2004).


# %%
def ledoit_wolf(X):
    """Return the shrunk covariance of the rows of X (months, n)."""
    X = X - X.mean(0)
    S = X.T @ X / len(X)
    scale = np.trace(S) / len(S) * np.eye(len(S))
    distance = np.square(S - scale).sum()
    weight = min(1, sum(np.square(np.outer(x, x) - S).sum() for x in X) / len(X) ** 2 / distance)
    return weight * scale + (1 - weight) * S


def hindsight(stocks, fold):
    """Return the returns of the test months (months, n), and the best returns that a portfolio can have in them."""
    samples = stocks[1:]  # the first month has no month before it
    test, val = round(0.3 * len(samples) / FOLDS), round(0.15 * len(samples))
    begin = len(samples) - (FOLDS - fold) * test
    V = ledoit_wolf(samples[: begin - val])
    x, c = cp.Variable(len(V)), cp.Parameter(len(V))
    limits = [x >= 0, cp.sum(x) == 1, cp.quad_form(x, V / V.mean()) <= 1.2]
    program = cp.Problem(cp.Maximize(c @ x), limits)
    outcomes, best = samples[begin : begin + test], []
    for month in outcomes:
        c.value = month
        best.append(program.solve(solver=cp.CLARABEL))
    return outcomes, np.array(best)


errors = []
for fold in range(FOLDS):
    outcomes, best = hindsight(returns[STOCKS].to_numpy(), fold)
    regret["equal weights"].append(float(np.mean(best - outcomes.mean(1))))
    for method, name in METHODS.items():
        metrics, _ = found[method, fold]
        regret[name].append(metrics["regret"])
        errors.append(abs(100 * metrics["regret"] / metrics["regret_percent"] / np.abs(best).mean() - 1))
error = max(errors)
for name, values in regret.items():
    print(f"{name}: {', '.join(f'{100 * value:.2f}' for value in values)} % a month lost to hindsight")
print(f"best values agree with CVXPY to 1e-6: {error < 1e-6}")

# %% [markdown]
# ```text
# equal weights: 3.85, 3.93, 5.02 % a month lost to hindsight
# two stages: 3.14, 4.13, 4.73 % a month lost to hindsight
# folding: 2.68, 4.10, 4.92 % a month lost to hindsight
# best values agree with CVXPY to 1e-6: True
# ```
#
# The differences between methods are smaller than those between folds: monthly returns are hardly predictable, and one
# seed of three folds does not order the methods. [Your own returns](../docs/harness/your-data.md) describes the file
# and every key.
#
# ![Regret in each fold, and on the months for validation through training](../docs/assets/examples/own_returns.png)

# %%
figure, (left, right) = plt.subplots(1, 2)
for k, (name, values) in enumerate(regret.items()):
    left.plot(range(FOLDS), 100 * np.array(values), "o-", color=f"C{k}", label=name)
left.set(xlabel="fold", ylabel="regret, % a month", title="Test months", xticks=range(FOLDS))
left.legend(loc="lower right")
for k, (method, name) in enumerate(METHODS.items(), start=1):
    _, epochs = found[method, FOLDS - 1]
    right.plot(epochs["epoch"], 100 * epochs["regret"], color=f"C{k}", label=name)
right.set(xlabel="epoch", ylabel="regret, % a month", title=f"Months for validation, fold {FOLDS - 1}")
right.set_xticks(range(0, EPOCHS + 1, 5))
right.set_ylim(bottom=3.2)
right.legend(loc="lower left")
plt.show()
