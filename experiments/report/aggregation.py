"""From the metrics of many runs to numbers: mean and spread over seeds, paired tests, the best epoch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from experiments.sweep.studies import StudyRun


def last_test_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of the last epoch of each run, of metrics as `collect` returns them."""
    test = frame[frame["split"] == "test"]
    return test[test["epoch"] == test.groupby("run")["epoch"].transform("max")]


def aggregate(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return mean, sd (n - 1), n, ci95, low and high of `value` over the rows of each group.

    `ci95` is the half width of the 95% confidence interval of the mean by Student's t; sd and ci95 are NaN
    for a single row. `low` and `high` are the smallest and largest value.
    """
    grouped = frame.groupby(list(by), sort=True)[value]
    table = grouped.agg(mean="mean", sd="std", n="count", low="min", high="max").reset_index()
    quantile = stats.t.ppf(0.975, (table["n"] - 1).clip(lower=1))
    table["ci95"] = quantile * table["sd"] / table["n"] ** 0.5
    return table[[*by, "mean", "sd", "n", "ci95", "low", "high"]]


def seeds_said(planned: Sequence[StudyRun]) -> str:
    """Return how many seeds the series have, as "5 seeds (3 of qpth)" where some have fewer."""
    seeds: dict[str, set[int]] = {}
    for run in planned:
        seeds.setdefault(run.series, set()).add(run.seed)
    most = max(map(len, seeds.values()))
    fewer: dict[int, list[str]] = {}
    for series, of in seeds.items():
        if len(of) < most:
            fewer.setdefault(len(of), []).append(series)
    said = "; ".join(f"{count} of {', '.join(names)}" for count, names in fewer.items())
    return f"{most} seed{'s' * (most > 1)}" + (f" ({said})" if said else "")


def paired(
    frame: pd.DataFrame, by: Sequence[str], unit: str, value: str, comparisons: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """Compare series pairwise over the units that both have, within each group; rows of one unit are averaged first.

    frame: columns series, `unit`, `value` and those of `by`. comparisons: pairs (series, against).

    Returns the columns of `by`, series, against, pairs, mean and against_mean, difference (series less against), ci95
    (half width of its 95% confidence interval), p (two-sided paired t test) and p_adjusted, which bounds the rate of
    false discoveries among all rows whatever their dependence (Benjamini and Yekutieli, Ann. Statist. 29(4), 2001).
    Groups with fewer than two pairs are left out.
    """
    means = frame.groupby([*by, "series", unit])[value].mean().unstack("series")
    rows = []
    for place, part in means.groupby(level=list(by)):
        for series, against in comparisons:
            if not {series, against} <= set(part.columns):
                continue
            both = part[[series, against]].dropna()
            if len(both) < 2:
                continue
            difference = (both[series] - both[against]).to_numpy()
            spread, half = difference.std(ddof=1), 0.0
            p = float(not difference.any())  # without any spread
            if spread > 0:
                test = stats.ttest_1samp(difference, 0)
                p, half = float(test.pvalue), float(test.confidence_interval().high - difference.mean())
            rows.append(
                {
                    **dict(zip(by, place, strict=True)),
                    "series": series,
                    "against": against,
                    "pairs": len(both),
                    "mean": both[series].mean(),
                    "against_mean": both[against].mean(),
                    "difference": difference.mean(),
                    "ci95": half,
                    "p": p,
                }
            )
    table = pd.DataFrame(rows)
    if not table.empty:
        table["p_adjusted"] = stats.false_discovery_control(table["p"], method="by")
    return table


def at_best_validation(frame: pd.DataFrame, value: str = "regret_percent") -> pd.DataFrame:
    """Return each run's test row at the epoch (after training began) of its smallest validation `value`."""
    run = ["series", "degree", "model", "seed"]
    validation = frame[(frame["split"] == "val") & (frame["epoch"] > 0)]
    best = validation.loc[validation.groupby(run)[value].idxmin(), [*run, "epoch"]]
    return frame[frame["split"] == "test"].merge(best, on=[*run, "epoch"])
