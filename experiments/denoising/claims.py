"""Claims on the learned denoiser (section 6, G.1)."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report.claims import CONDITIONAL, CONFIRMED, REFUTED, Claim, Finding, Results


def _denoiser_learns(results: Results) -> Finding:
    table = results("figures/figure_4b")
    ends = table.groupby(["series", "weight"])["mean"].agg(["first", "last"]).reset_index()
    free = ends[~ends["series"].str.contains("_")]
    better = free["last"] < free["first"]
    shaped = ends[ends["series"].str.endswith("_filter")]
    return Finding(
        f"all of D learned: the test error falls in {better.sum()} of {len(free)} settings of data and λ; with D a "
        f"filter in {(shaped['last'] < shaped['first']).sum()} of {len(shaped)}",
        CONFIRMED if better.all() else CONDITIONAL if better.any() else REFUTED,
        "The 9900 entries of D overfit 9000 signals, and rows that do not sum to zero penalize the level of the "
        "signal. A D with few parameters improves at every λ.",
    )


def _denoiser_is_fast(results: Results) -> Finding:
    forward = results("tables/denoising_cost").pivot_table(
        index=["reading", "weight"], columns="backend", values="seconds_forward"
    )
    double, single = (forward[name] / forward["fold"] for name in ("qpth", "qpth_float32"))
    return Finding(
        f"x*(D) {double.min():.0f} to {double.max():.0f} times as fast as qpth, {single.min():.0f} to "
        f"{single.max():.0f} times as qpth in float32",
        CONFIRMED if double.max() >= 40 else REFUTED,
        "With an exact active-set solver in front, one thread, batches of 32.",
    )


def _denoiser_like_qpth(results: Results) -> Finding:
    table = results("figures/figure_6")
    last = table[table["epoch"] == table["epoch"].max()].pivot_table(index="weight", columns="series", values="mean")
    tests = results("tables/figure_6_paired")
    apart, p = ((last["fold"] - last["qpth"]).abs() / last["fold"]).max(), tests["p_adjusted"].min()
    return Finding(
        f"mean final test errors differ by at most {apart:.2%}; least adjusted p of a paired test {p:.1g}",
        CONFIRMED if apart < 0.02 else REFUTED,
        "No difference is statistically significant at any λ."
        if p >= 0.05
        else "Some are significant, though as small.",
    )


CLAIMS: Sequence[Claim] = (
    Claim(
        "§6, Figure 4(b)",
        "f-FDPG learns a better denoiser than the classical one that it starts from, for various λ.",
        ("make figure-4b",),
        _denoiser_learns,
    ),
    Claim("§6", "f-FDPG computes x*(D) up to 40 times faster than qpth.", ("make denoising-cost",), _denoiser_is_fast),
    Claim(
        "§6, G.1, Figure 6",
        "qpth and f-FDPG learn comparable denoisers, with small differences from solver tolerance.",
        ("make figure-6",),
        _denoiser_like_qpth,
    ),
)
