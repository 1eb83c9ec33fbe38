"""Claims on unfolding, folding and their costs (sections 4 and 5, appendices A, B and D)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.report.claims import CONDITIONAL, CONFIRMED, REFUTED, Claim, Finding, Results

WIDE = 100  # ratio of the largest to the smallest stepsize that counts as a large range


def _forward_stays(results: Results) -> Finding:
    table = results("figures/figure_3")
    part = table[(table["start"] == "solution") & (table["pass"] == "forward")]
    worst = part["high"].max()
    verdict = CONFIRMED if worst < 1e-12 else REFUTED
    return Finding(
        f"largest error {worst:.0e} over {part['iteration'].max()} iterations",
        verdict,
        "The solution is a fixed point of the step, up to rounding.",
    )


def _faster_from_solution(results: Results) -> Finding:
    table = results("figures/figure_3")
    backward = table[table["pass"] == "backward"]
    below = {
        start: int(part.loc[part["mean"] > 1e-6, "iteration"].max()) + 1 for start, part in backward.groupby("start")
    }
    verdict = CONFIRMED if below["solution"] < below["random"] else REFUTED
    return Finding(
        f"{below['solution']} against {below['random']} iterations to a median error of 1e-6",
        verdict,
        "The rates are the same, but the first steps from a random start have other Jacobians than at the solution.",
    )


def _theorem_1(results: Results) -> Finding:
    row = results("tables/figure_3").set_index("pass").loc["backward, from x*"]
    off = abs(row["rate"] / row["theory"] - 1)
    return Finding(
        f"rate {row['rate']:.3f} against −log ρ(Φ) = {row['theory']:.3f}",
        CONFIRMED if off < 0.15 else REFUTED,
        f"They differ by {off:.0%}; the rate is measured over a finite tail of the iteration.",
    )


def _krylov(results: Results) -> Finding:
    table = results("figures/bilinear_stepsize")
    solved = table[table["lfpi_solved"] == 1]
    ratio = solved["lfpi_products"] / solved["gmres_products"]
    diverged = table[table["lfpi_solved"] == 0]
    return Finding(
        f"LFPI takes {ratio.min():.0f} to {ratio.max():.0f} times the products of GMRES where it converges; GMRES "
        f"takes {diverged['gmres_products'].min()} to {diverged['gmres_products'].max()} where LFPI solves no sample",
        CONFIRMED if ratio.min() > 1 else REFUTED,
        "GMRES converges also where the spectral radius exceeds 1.",
    )


def _unrolling_costs(results: Results) -> Finding:
    table = results("figures/unrolling_cost")
    unrolled, folded = table[table["iterations"] >= 100], table[table["iterations"] == 0].iloc[0]
    seconds = unrolled["seconds_forward"] + unrolled["seconds_backward"]
    slopes = [
        np.polyfit(np.log(unrolled["iterations"]), np.log(values), 1)[0] for values in (unrolled["peak_bytes"], seconds)
    ]
    last = unrolled.iloc[-1]
    return Finding(
        f"memory grows as iterations to the power {slopes[0]:.2f}, time {slopes[1]:.2f}; at {last['iterations']:.0f} "
        f"iterations {last['peak_bytes'] / 1e6:.0f} MB against {folded['peak_bytes'] / 1e6:.0f} MB folded",
        CONFIRMED if min(slopes) > 0.8 else REFUTED,
        "Unrolling keeps every iteration for the backward pass, folding only one.",
    )


def _larger_stepsizes(results: Results) -> Finding:
    table = results("figures/bilinear_stepsize")
    solved = table[table["lfpi_solved"] == 1]
    falls = solved["lfpi_products"].is_monotonic_decreasing
    diverges = table.loc[table["stepsize"] > solved["stepsize"].max(), "lfpi_solved"].min() == 0
    return Finding(
        f"from {solved['lfpi_products'].iloc[0]} products at α = {solved['stepsize'].iloc[0]:.2g} to "
        f"{solved['lfpi_products'].iloc[-1]} at {solved['stepsize'].iloc[-1]:.2g}, then ρ(Φ) passes 1 and it diverges",
        CONFIRMED if falls and diverges else REFUTED,
        "Here α is relative to 1/L, and LFPI diverges from an α between 1 and 2 on.",
    )


def _any_stepsize(results: Results) -> Finding:
    table = results("figures/bilinear_stepsize")
    solved = table.loc[table["lfpi_solved"] == 1, "stepsize"]
    span = solved.max() / solved.min()
    return Finding(
        f"LFPI solves every sample over a factor of {span:.1f} in α, GMRES over a factor of "
        f"{table['stepsize'].max() / table['stepsize'].min():.0f}",
        CONFIRMED if span >= WIDE else CONDITIONAL if span >= 2 else REFUTED,
        "The range of LFPI is narrow on this problem. Wherever a solver converges, the gradient is the same.",
    )


def _stationary(results: Results) -> Finding:
    worst = results("figures/bilinear_stepsize")["residual"].max()
    return Finding(
        f"largest residual of the fixed point {worst:.0e} over all α",
        CONFIRMED if worst < 1e-8 else REFUTED,
        "The residual is rounding error and grows in proportion to α.",
    )


CLAIMS: Sequence[Claim] = (
    Claim(
        "§4, Figure 3",
        "Unfolding from the precomputed solution, the forward pass stays within tolerance of zero error while the "
        "backward pass converges.",
        ("make figure-3",),
        _forward_stays,
    ),
    Claim(
        "§4, Figure 3",
        "The backward pass converges slightly faster from the solution than from a random start.",
        ("make figure-3",),
        _faster_from_solution,
    ),
    Claim(
        "§5, Theorem 1",
        "The backward pass of unfolding is a linear fixed-point iteration; it converges at the rate −log ρ(Φ).",
        ("make figure-3",),
        _theorem_1,
    ),
    Claim(
        "App. B, §7",
        "Krylov methods solve for the gradient faster than LFPI, so than backpropagation through unfolded iterations.",
        ("make figure-4a",),
        _krylov,
    ),
    Claim(
        "App. A",
        "Unrolling many iterations is inefficient in time and memory.",
        ("make unrolling-cost",),
        _unrolling_costs,
    ),
    Claim(
        "App. D",
        "Larger stepsizes need fewer LFPI iterations, until the gradients explode.",
        ("make figure-4a",),
        _larger_stepsizes,
    ),
    Claim(
        "App. D",
        "A large range of stepsizes converges to the same gradients, so that no careful choice is needed.",
        ("make figure-4a",),
        _any_stepsize,
    ),
    Claim("App. D", "The fixed point stays where it is even for large stepsizes.", ("make figure-4a",), _stationary),
)
