"""Final regrets of the bilinear study, and their ratios to two-stage."""

from __future__ import annotations

import pandas as pd

PLACE = ["n_variables", "interaction"]


def final(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of each run's last epoch."""
    test = frame[frame["split"] == "test"]
    run = ["series", *PLACE, "seed"]
    return test[test["epoch"] == test.groupby(run)["epoch"].transform("max")]


def ratios(last: pd.DataFrame, n: int) -> pd.DataFrame:
    """Return the mean regret of every series and seed divided by that of two-stage on the same matrices Q.

    Columns: series, seed, ratio.
    """
    rows = last[last["n_variables"] == n]
    reference = rows[rows["series"] == "two_stage"].set_index(["interaction", "seed"])["regret"]
    found = []
    for (series, seed), part in rows.groupby(["series", "seed"]):
        base = reference.loc[[(q, seed) for q in part["interaction"]]]
        found.append({"series": series, "seed": seed, "ratio": part["regret"].mean() / base.mean()})
    return pd.DataFrame(found)
