"""Ratios of the final regrets of the bilinear study to those of two-stage."""

from __future__ import annotations

import pandas as pd


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
