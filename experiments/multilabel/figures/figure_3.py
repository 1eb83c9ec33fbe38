"""Figure 3: forward and backward errors of unrolled projected gradient, from the solution and from a random start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from experiments.multilabel.problem import TopKStep, solve_topk
from experiments.report import style
from experiments.report.measurements import measured_once
from experiments.report.outputs import Measurement
from experiments.report.style import Line
from foldopt import fold
from foldopt.diagnostics import backward_trace, spectral_radius
from foldopt.step import record

LINES = {
    ("solution", "forward"): ("forward, from x*", Line(style.COLORS[2], "-")),
    ("solution", "backward"): ("backward, from x*", Line(style.COLORS[2], "--")),
    ("random", "forward"): ("forward, from a random start", Line(style.COLORS[4], "-")),
    ("random", "backward"): ("backward, from a random start", Line(style.COLORS[4], "--")),
}
THRESHOLDS = (1e-2, 1e-4, 1e-6)
SMALLEST = 1e-16  # errors below are drawn here


@dataclass(frozen=True)
class Settings:
    """The problems: k of n logits of norm 1 are selected; floor is the lower limit of x in the step's logarithm."""

    instances: int = 24
    iterations: int = 60
    n: int = 100
    k: int = 5
    stepsize: float = 0.025
    floor: float = 1e-3
    seed: int = 0


PROFILES = {"smoke": Settings(instances=2), "default": Settings(), "paper": Settings(instances=256)}


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per instance, start, pass and iteration with the relative error in the L1 norm, and rho(Phi).

    The cotangent is the gradient of the study's loss -log x_y for a random y.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    step = TopKStep(settings.k, settings.stepsize, settings.floor)
    layer = fold(lambda c: solve_topk(c, settings.k).log_x.exp(), step, tol=1e-9)
    rows = []
    for instance in range(settings.instances):
        c = F.normalize(torch.randn(1, settings.n, generator=generator, dtype=torch.float64), dim=1)
        afar = torch.rand(1, settings.n, generator=generator, dtype=torch.float64)
        x = layer(c)
        y = int(torch.randint(settings.n, (), generator=generator))
        cotangent = -F.one_hot(torch.tensor([y]), settings.n) / x
        rho = _spectral_radius(step, x, c)
        for name, start in (("solution", None), ("random", afar)):
            trace = backward_trace(layer, c, iterations=settings.iterations, start=start, cotangent=cotangent)
            for which, errors in (("forward", trace.forward), ("backward", trace.backward)):
                rows += [
                    {"instance": instance, "start": name, "pass": which, "iteration": k, "error": float(e), "rho": rho}
                    for k, e in enumerate(errors, 1)
                ]
    return pd.DataFrame(rows)


def _spectral_radius(step: TopKStep, x: Tensor, c: Tensor) -> float:
    return float(spectral_radius(record(lambda state, params: (step(*state, *params),), (x,), (c,)))[0])


def make(measurement: Measurement) -> None:
    """Write figures/figure_3.png, .pdf and .csv and tables/figure_3.md, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("multilabel/figure-3", settings, measure)
    curves = summarize(rows)
    measurement.artifacts.csv("figures/figure_3", curves)
    said = (
        f"{settings.instances} top-{settings.k} problems of {settings.n} random logits of norm 1, projected gradient "
        f"of stepsize {settings.stepsize}, float64; relative errors in L1."
    )
    caption = f"{said}\nMedians, bands from the smallest to the largest. Made by: {measurement.command}"
    measurement.artifacts.figure("figure_3", draw(curves, rows["rho"].median(), caption))
    table = rates(rows)
    measurement.artifacts.csv("tables/figure_3", table)
    measurement.artifacts.markdown(
        "tables/figure_3",
        ("Pass", *(f"Iterations to {threshold:.0e}" for threshold in THRESHOLDS), "Rate", "−log ρ(Φ)"),
        (
            [row[0], *(f"{value:.0f}" for value in row[1:-2]), *(f"{v:.2f}" for v in row[-2:])]
            for row in table.to_numpy()
        ),
        f"Medians of {said} Rate: decrease of log(error) per iteration between 1e-4 and 1e-10. "
        f"Made by: `{measurement.command}`",
    )


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the median (column mean), smallest and largest error over the instances, by start, pass and iteration."""
    grouped = rows.groupby(["start", "pass", "iteration"])["error"]
    return grouped.agg(mean="median", low="min", high="max").reset_index()


def draw(curves: pd.DataFrame, rho: float, caption: str) -> Figure:
    """Return the figure of `curves`, with the line of Theorem 1 for the median spectral radius `rho`."""
    with style.panels(caption, figsize=(6.6, 3.6)) as (figure, panel):
        for (start, which), (label, line) in LINES.items():
            shown = curves[(curves["start"] == start) & (curves["pass"] == which)].copy()
            shown[["mean", "low", "high"]] = shown[["mean", "low", "high"]].clip(lower=SMALLEST)
            style.curve(panel, shown, line, label, x="iteration")
        _theorem(panel, curves, rho)
        panel.set(yscale="log", xlabel="Iteration", ylabel="Relative error", ylim=(SMALLEST / 2, 1e3))
        style.grid(panel)
        panel.legend(fontsize=7, frameon=False, loc="upper right")
    return figure


def _theorem(panel: Axes, curves: pd.DataFrame, rho: float) -> None:
    """Draw a line of slope log rho(Phi) next to the backward errors from the solution."""
    shown = curves[(curves["start"] == "solution") & (curves["pass"] == "backward")]
    k = shown["iteration"].to_numpy()
    tail = shown["mean"].to_numpy() > 1e-12
    last = k[tail][-1]
    line = 0.1 * shown["mean"].to_numpy()[tail][-1] * np.power(rho, k - last)
    panel.plot(k[tail], line[tail], color="k", linewidth=1, linestyle=":", label=f"slope log ρ(Φ), ρ = {rho:.2f}")


def rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of iterations to THRESHOLDS, rate and -log rho(Phi) for each pass with an error above 0."""
    table = []
    for (start, which), (label, _) in LINES.items():
        if (start, which) == ("solution", "forward"):
            continue
        part = rows[(rows["start"] == start) & (rows["pass"] == which)]
        row = {"pass": label} | {f"to_{threshold:.0e}": _iterations_to(part, threshold) for threshold in THRESHOLDS}
        measured = part.groupby("instance").apply(_rate, include_groups=False)
        theory = -np.log(part.groupby("instance")["rho"].first())
        table.append(row | {"rate": measured.median(), "theory": theory.median()})
    return pd.DataFrame(table)


def _iterations_to(part: pd.DataFrame, threshold: float) -> float:
    """Return the median number of iterations after which the error stays below `threshold`."""
    above = part[part["error"] > threshold].groupby("instance")["iteration"].max()
    return above.reindex(part["instance"].unique(), fill_value=0).median() + 1


def _rate(trace: pd.DataFrame) -> float:
    tail = trace[(trace["error"] < 1e-4) & (trace["error"] > 1e-10)]
    errors = np.log(tail["error"].to_numpy())
    return (errors[0] - errors[-1]) / (len(errors) - 1) if len(errors) > 1 else np.nan
