"""Your own returns: five real stocks over 32 years, from a CSV file to the regret on months that no model has seen.

max c'x over x >= 0, 1'x = 1, x'Vx <= 1.2 times the variance of equal weights. The returns c of the next month are
predicted from those of this month, of the stocks and of two indices. One model is trained for the squared error (two
stages), one through the decision (folding). Three folds walk forward through the last 30 % of the months; each tests on
39 months, stops where the 58 months before them say, and trains on all earlier ones.

The prices are the file Stocks.csv that matplotlib ships (Yahoo Finance, 1990 to 2022). Nobody could know in 1990 that
these five stocks would still be there in 2022: the numbers compare methods and are no advice.

Truth: the best portfolios in hindsight by CVXPY, with the covariance by the formula of Ledoit and Wolf (2004).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cvxpy as cp
import numpy as np
import pandas as pd
import yaml
from matplotlib.cbook import get_sample_data

ROOT = Path(__file__).resolve().parents[1]
STOCKS, INDICES = ["IBM", "AAPL", "MSFT", "XRX", "ADBE"], ["^GSPC", "^IXIC"]
METHODS = {"two_stage": "two stages", "fold": "folding"}


def monthly_returns():
    """Return by which fraction each price changed in each month, (months, stocks and indices)."""
    prices = pd.read_csv(get_sample_data("Stocks.csv", asfileobj=False), comment="#", index_col="Date")
    months = prices.index.str.endswith("-01")  # the other rows have no prices
    return prices.loc[months, STOCKS + INDICES].pct_change().dropna()


def train(file, runs, folds, epochs):
    """Train each method on each fold with run.py, and return its test metrics by (method, fold)."""
    task = ["task=portfolio", f"task.csv={file}", f"task.features={INDICES}", f"task.folds={folds}"]
    sweep = ["-m", f"task.fold={','.join(map(str, range(folds)))}", f"backend={','.join(METHODS)}"]
    training = ["model=linear", "train.lr=0.003", f"train.epochs={epochs}", "device=cpu"]
    place = [f"paths.runs={runs}", "tracking.mode=disabled", "progress=false"]
    subprocess.run([sys.executable, ROOT / "run.py", *sweep, *task, *training, *place], check=True, capture_output=True)
    found = {}
    for run in Path(runs).glob("portfolio/*"):
        config = yaml.safe_load((run / "config.yaml").read_text())
        final = json.loads((run / "summary.json").read_text())["final"]
        found[config["backend"]["name"], config["task"]["fold"]] = final["test_at_best_val"]
    return found


def ledoit_wolf(X):
    """Return the shrunk covariance of the rows of X (months, n)."""
    X = X - X.mean(0)
    S = X.T @ X / len(X)
    scale = np.trace(S) / len(S) * np.eye(len(S))
    distance = np.square(S - scale).sum()
    weight = min(1, sum(np.square(np.outer(x, x) - S).sum() for x in X) / len(X) ** 2 / distance)
    return weight * scale + (1 - weight) * S


def hindsight(stocks, folds, fold):
    """Return the returns of the test months (months, n), and the best returns that a portfolio can have in them."""
    samples = stocks[1:]  # the first month has no month before it
    test, val = round(0.3 * len(samples) / folds), round(0.15 * len(samples))
    begin = len(samples) - (folds - fold) * test
    V = ledoit_wolf(samples[: begin - val])
    x, c = cp.Variable(len(V)), cp.Parameter(len(V))
    limits = [x >= 0, cp.sum(x) == 1, cp.quad_form(x, V / V.mean()) <= 1.2]
    program = cp.Problem(cp.Maximize(c @ x), limits)
    outcomes, best = samples[begin : begin + test], []
    for month in outcomes:
        c.value = month
        best.append(program.solve(solver=cp.CLARABEL))
    return outcomes, np.array(best)


def main(folds=3, epochs=20):
    """Print what the example finds and return the numbers in a dict."""
    returns = monthly_returns()
    print(f"{len(returns)} months from {returns.index[0]} to {returns.index[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        returns.to_csv(Path(folder, "returns.csv"))
        found = train(Path(folder, "returns.csv"), Path(folder, "runs"), folds, epochs)

    regret, errors = {name: [] for name in ("equal weights", *METHODS.values())}, []
    for fold in range(folds):
        outcomes, best = hindsight(returns[STOCKS].to_numpy(), folds, fold)
        regret["equal weights"].append(float(np.mean(best - outcomes.mean(1))))
        for method, name in METHODS.items():
            metrics = found[method, fold]
            regret[name].append(metrics["regret"])
            errors.append(abs(100 * metrics["regret"] / metrics["regret_percent"] / np.abs(best).mean() - 1))
    for name, values in regret.items():
        print(f"{name}: {', '.join(f'{100 * value:.2f}' for value in values)} % a month lost to hindsight")
    print(f"best values agree with CVXPY to {max(errors):.0e}")
    return {"returns": returns, "regret": regret, "error": max(errors)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folds", type=int, default=3, help="test blocks in the last 30 %% of the months")
    main(parser.parse_args().folds)
