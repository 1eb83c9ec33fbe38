"""Statistics of the metrics of many runs: mean and spread over seeds, paired tests, the best epoch."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from scipy import stats

from experiments.sweep.studies import StudyRun


def last_test_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the test rows of each run's last epoch; frame: metrics from `experiments.sweep.metrics.collect`."""
    test = frame[frame["split"] == "test"]
    return test[test["epoch"] == test.groupby("run")["epoch"].transform("max")]


def aggregate(frame: pd.DataFrame, by: Sequence[str], value: str) -> pd.DataFrame:
    """Return statistics of `value` over the rows of each group of `by`.

    Returns:
        One row per group with the columns of `by`; mean; sd, the standard deviation with n - 1; n; ci95, the half width
        of the 95% confidence interval of the mean by Student's t; low and high, the smallest and the largest value. sd
        and ci95 are NaN for a single row.
    """
    grouped = frame.groupby(list(by), sort=True)[value]
    table = grouped.agg(mean="mean", sd="std", n="count", low="min", high="max").reset_index()
    quantile = stats.t.ppf(0.975, (table["n"] - 1).clip(lower=1))
    table["ci95"] = quantile * table["sd"] / table["n"] ** 0.5
    return table[[*by, "mean", "sd", "n", "ci95", "low", "high"]]


def seeds_said(planned: Sequence[StudyRun]) -> str:
    """Return the number of seeds as text, such as "5 seeds (3 of qpth)" if the series qpth has fewer."""
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
    """Compare pairs of series in each group by a paired t test over the units that both have.

    Rows of the same unit are averaged first. Groups with fewer than two pairs are left out.

    Args:
        frame: Rows with the columns series, `unit`, `value` and those of `by`.
        by: Columns that make the groups.
        unit: Column whose values are paired, such as the seed.
        value: Column that is compared.
        comparisons: Pairs (series, against).

    Returns:
        One row per group and comparison with the columns of `by`; series; against; pairs, their number; mean and
        against_mean; difference of the means, series minus against; ci95, the half width of its 95% confidence
        interval; p of the two-sided test; p_adjusted, which controls the false discovery rate over all rows under any
        dependence (Benjamini and Yekutieli, Ann. Statist. 29(4), 2001).
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
            p = float(not difference.any())  # if all differences are equal: 1 if they are zero, else 0
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
    """Return each run's test row at the epoch above 0 with the smallest validation `value`."""
    validation = frame[(frame["split"] == "val") & (frame["epoch"] > 0)]
    best = validation.loc[validation.groupby("run")[value].idxmin(), ["run", "epoch"]]
    return frame[frame["split"] == "test"].merge(best, on=["run", "epoch"])
