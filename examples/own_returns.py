"""Portfolios of five real stocks.

The monthly returns of 32 years go from a CSV file through `run.py`: two methods are trained and tested on three blocks
of later months. CVXPY finds the best portfolios in hindsight.
"""

# %% [markdown]
# ## The data
#
# matplotlib ships the file Stocks.csv with prices of a few American stocks and indices from 1990 to 2022 (Yahoo
# Finance). We take five stocks to invest in. The two indices only help to predict. Nobody could know in 1990 that these
# five stocks would still be traded in 2022. The numbers below compare methods; they are no advice.

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
FOLDS = 3

prices = pd.read_csv(get_sample_data("Stocks.csv", asfileobj=False), comment="#", index_col="Date")
months = prices.index.str.endswith("-01")  # the other rows have no prices
returns = prices.loc[months, STOCKS + INDICES].pct_change().dropna()
print(f"{len(returns)} months from {returns.index[0]} to {returns.index[-1]}")

# %% [markdown]
# ```text
# 389 months from 1990-02-01 to 2022-06-01
# ```
#
# ## Two methods on three folds
#
# At the beginning of each month, the portfolio for predicted returns ĉ is the solution of
#
# > maximize ĉᵀx subject to x ≥ 0, Σx = 1 and xᵀVx ≤ 1.2 v
#
# where V is the covariance of the training months and v the variance of equal weights. A linear model predicts the
# returns of a month from the returns of the stocks and of the indices in the month before. The backend `two_stage`
# trains it on its squared error, and `fold` on the regret: what its portfolio lost against the best one in hindsight.
#
# The last 30 % of the months are cut into three test blocks of 39 months. The 58 months before a block choose the
# epoch, and all earlier ones are for training. The command below is one sweep of six runs. [Your own
# returns](../docs/harness/your-data.md) explains each key.


# %%
def train(file, runs):
    """Train each method on each fold with run.py, and return its test metrics by (method, fold)."""
    task = ["task=portfolio", f"task.csv={file}", f"task.features={INDICES}", f"task.folds={FOLDS}"]
    sweep = ["-m", f"task.fold={','.join(map(str, range(FOLDS)))}", f"backend={','.join(METHODS)}"]
    training = ["model=linear", "train.lr=0.003", "train.epochs=20", "device=cpu"]
    place = [f"paths.runs={runs}", "tracking.mode=disabled", "progress=false"]
    subprocess.run([sys.executable, ROOT / "run.py", *sweep, *task, *training, *place], check=True, capture_output=True)
    found = {}
    for run in runs.glob("portfolio/*"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        final = json.loads((run / "summary.json").read_text())["final"]
        found[config["backend"]["name"], config["task"]["fold"]] = final["test_at_best_val"]
    return found


with tempfile.TemporaryDirectory() as folder:
    returns.to_csv(Path(folder, "returns.csv"))
    found = train(Path(folder, "returns.csv"), Path(folder, "runs"))

# %% [markdown]
# ## The best portfolios in hindsight
#
# To check the harness, we repeat the parts that define the regret without it: the blocks, the covariance by the formula
# of Ledoit and Wolf (2004), and the best portfolio of each test month by CVXPY. Equal weights are a third method, which
# needs no model.


# %%
def ledoit_wolf(X):
    """Return the shrunk covariance of the rows of X (months, n)."""
    X = X - X.mean(0)
    S = X.T @ X / len(X)
    scale = np.trace(S) / len(S) * np.eye(len(S))
    distance = np.square(S - scale).sum()
    weight = min(1, sum(np.square(np.outer(x, x) - S).sum() for x in X) / len(X) ** 2 / distance)
    return weight * scale + (1 - weight) * S


samples = returns[STOCKS].to_numpy()[1:]  # the first month has no month before it
block, validation = round(0.3 * len(samples) / FOLDS), round(0.15 * len(samples))
begins = [len(samples) - (FOLDS - fold) * block for fold in range(FOLDS)]


def hindsight(begin):
    """Return the returns (months, n) of the test block that begins there, and the best value of each month."""
    V = ledoit_wolf(samples[: begin - validation])
    x, c = cp.Variable(len(V)), cp.Parameter(len(V))
    limits = [x >= 0, cp.sum(x) == 1, cp.quad_form(x, V / V.mean()) <= 1.2]
    program = cp.Problem(cp.Maximize(c @ x), limits)
    outcomes, best = samples[begin : begin + block], []
    for month in outcomes:
        c.value = month
        best.append(program.solve(solver=cp.CLARABEL))
    return outcomes, np.array(best)


regret, errors = {name: [] for name in ("equal weights", *METHODS.values())}, []
for fold, begin in enumerate(begins):
    outcomes, best = hindsight(begin)
    regret["equal weights"].append(float(np.mean(best - outcomes.mean(1))))
    for method, name in METHODS.items():
        metrics = found[method, fold]
        regret[name].append(metrics["regret"])
        errors.append(abs(100 * metrics["regret"] / metrics["regret_percent"] / np.abs(best).mean() - 1))
for name, values in regret.items():
    print(f"{name}: {', '.join(f'{100 * value:.2f}' for value in values)} % a month lost to hindsight")
error = max(errors)
print(f"best values agree with CVXPY to 1e-6: {error < 1e-6}")

# %% [markdown]
# ```text
# equal weights: 3.85, 3.93, 5.02 % a month lost to hindsight
# two stages: 3.14, 4.13, 4.73 % a month lost to hindsight
# folding: 2.68, 4.10, 4.92 % a month lost to hindsight
# best values agree with CVXPY to 1e-6: True
# ```
#
# Folding loses less than two stages on the first block, about as much on the second, and more on the third. These
# differences are smaller than those between the blocks. So one seed on three blocks does not tell which method is
# better. Monthly returns are hardly predictable: on the second block both models are worse than equal weights.
#
# ![Growth of the five stocks with the test blocks; regret of three methods](../docs/assets/examples/own_returns.png)

# %%
figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
dates = pd.to_datetime(returns.index)
growth = (1 + returns[STOCKS]).cumprod()
for stock in STOCKS:
    left.plot(dates, growth[stock], linewidth=1.2, label=stock)
for fold, begin in enumerate(begins):
    first, last = dates[1 + begin], dates[block + begin]
    left.axvspan(first, last, ymax=0.75, color=str(0.94 - 0.06 * (fold % 2)), zorder=0)
    left.text(first + (last - first) / 2, 0.25, fold, ha="center")
left.set(yscale="log", ylim=(0.15, 2e4), xlabel="year", ylabel="value of 1 invested in 1990")
decades = ["1990", "2000", "2010", "2020"]
left.set_xticks(pd.to_datetime(decades), decades)
left.set_title("Growth, and the test blocks 0 to 2")
left.legend(ncols=3, loc="upper left")
for number, (name, values) in enumerate(regret.items()):
    places = np.arange(FOLDS) + 0.27 * (number - 1)
    right.bar(places, 100 * np.array(values), width=0.25, color=("0.6", "C1", "C0")[number], label=name)
right.set(xticks=range(FOLDS), xlabel="test block", ylabel="regret (% per month)", title="Lost to hindsight")
right.set_ylim(0, 8)
right.grid(visible=False, axis="x")
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# With your own file, look first at the column `zero_gradient_fraction` of a run. Where it is large, the risk limit is
# too loose for training through the decision, and a smaller `task.risk` helps. The section *Risk* of [Your own
# returns](../docs/harness/your-data.md) says why.
