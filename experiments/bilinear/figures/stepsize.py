"""Cost of the backward pass by stepsize of projected gradient, on the smoothed bilinear program (paper App. D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from data.bilinear import generate, interaction
from experiments.bilinear.problem import BilinearProblem
from experiments.bilinear.smoothing import GradientStep, Quadratic
from experiments.report import style
from experiments.report.outputs import StudyOutputs
from foldopt import fold
from foldopt.diagnostics import stepsize_study

KAPPA, N, BATCH = 0.75, 20, 32
STEPS: Sequence[float] = np.geomspace(0.02, 20, 25).tolist()
LINES = (
    ("lfpi_products", "LFPI", "#D55E00"),
    ("anderson_products", "Anderson", "#56B4E9"),
    ("gmres_products", "GMRES", "#000000"),
)


def make(outputs: StudyOutputs) -> None:
    """Write figures/bilinear_stepsize.png, .pdf and .csv; the true coefficients are measured, so no runs are needed."""
    table = measure()
    outputs.artifacts.csv("figures/bilinear_stepsize", table)
    outputs.artifacts.figure("bilinear_stepsize", draw(table, outputs.command))


def measure(steps: Sequence[float] = STEPS) -> pd.DataFrame:
    """Return a row of `stepsize_study` for each stepsize, in units of 1 / sigma; products are the batch's maximum."""
    problem = BilinearProblem(interaction(0, N), 1, 2, KAPPA)
    smoothing = cast(Quadratic, problem.smoothing)
    c, d = generate(0, BATCH, 1, 1, 2 * N).targets["train"].chunk(2, 1)

    def layer(stepsize: float) -> torch.nn.Module:
        step = GradientStep(problem.Q, problem.totals, smoothing, stepsize / problem.sigma)
        return fold(lambda c, d: problem.solve("exact", c, d), step)

    return pd.DataFrame(stepsize_study(layer, steps, c, d))


def draw(table: pd.DataFrame, command: str) -> Figure:
    """Draw the number of products with Phi, and rho(Phi), against the stepsize."""
    caption = (
        f"Smoothed bilinear program, n = {N}, κ = {KAPPA}, {BATCH} instances, relative tolerance 1e-10. LFPI is "
        f"shown where it solves every\ninstance in 1000 products; a direct solve needs none. Made by: {command}"
    )
    with style.panels(caption, 1, 2, figsize=(7.4, 2.7)) as (figure, (left, right)):
        for column, label, color in LINES:
            shown = table if column != "lfpi_products" else table[table["lfpi_solved"] == 1]
            left.plot(shown["stepsize"], shown[column], color=color, marker="o", markersize=3, label=label)
        left.set_ylabel("Products with Φ, most of the batch")
        left.legend(frameon=False)
        right.plot(table["stepsize"], table["spectral_radius"], color="#000000", marker="o", markersize=3)
        right.axhline(1, color="0.4", linewidth=0.8, linestyle=(0, (4, 2)))
        right.set_ylabel("ρ(Φ), largest of the batch")
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel("Stepsize α, in units of 1/σ")
            panel.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    return figure
