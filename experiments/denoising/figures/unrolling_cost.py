"""Time, peak memory and errors of unrolling the denoiser by number of iterations, compared with folding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.denoising import bench as benches
from experiments.denoising.bench import REFERENCE, STUDY, Bench, Layer
from experiments.report import style
from experiments.report.measurements import measured_once, peak_memory
from experiments.report.outputs import Measurement
from experiments.run import components, configuration
from experiments.sweep import studies


@dataclass(frozen=True)
class Settings(benches.Settings):
    """Size of the measurement: the numbers of iterations, and one reading and lambda of the study."""

    iterations: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000)
    reading: str = "optnet"
    weight: float = 20.0


PROFILES = {
    "smoke": Settings("smoke", repeats=1, iterations=(10, 100)),
    "default": Settings("default", repeats=3),
    "paper": Settings("paper", repeats=5),
}


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per number of iterations and repetition; 0 iterations stands for folding with the exact solver."""
    planned = studies.expand(studies.load(STUDY), settings.profile, {settings.reading})
    place = next(run for run in planned if run.point["task.weight"] == settings.weight and run.seed == settings.seed)
    bench = Bench(list(place.overrides), settings)
    layers = {0: bench.layer(REFERENCE)} | {k: _unrolled(bench, k) for k in settings.iterations}
    exact = bench.call(layers[0])[:2]
    rows = []
    for k, layer in layers.items():
        bench.call(layer)
        _, memory = peak_memory(partial(bench.call, layer))
        for _ in range(settings.repeats):
            x, gradient, forward, backward = bench.call(layer)
            row = {"iterations": k, "seconds_forward": forward, "seconds_backward": backward, "peak_bytes": memory}
            rows.append(row | bench.errors(x, gradient, exact))
    return pd.DataFrame(rows)


def _unrolled(bench: Bench, iterations: int) -> Layer:
    # With this tol, samples that have not converged are measured instead of raising an error.
    backend = ["backend=unroll", f"backend.iterations={iterations}", "backend.tol=1e6"]
    parts = components.build(configuration.compose([*bench.place, *backend]))
    return lambda D: parts.backend(parts.task.parameters(D, bench.samples))


def make(measurement: Measurement) -> None:
    """Write figures/unrolling_cost.png, .pdf and .csv, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("denoising/unrolling", settings, measure)
    table = rows.groupby("iterations").median().reset_index()
    measurement.artifacts.csv("figures/unrolling_cost", table)
    title = studies.load(STUDY).titles[settings.reading]
    caption = (
        f"One batch of {settings.batch_size} signals, {title}, λ = {settings.weight:g}, float64, one thread, medians "
        f"of {settings.repeats}. Errors are relative, against the exact solver.\nMade by: {measurement.command}"
    )
    measurement.artifacts.figure("unrolling_cost", draw(table, caption))


def draw(table: pd.DataFrame, caption: str) -> Figure:
    """Return the figure of `table`, which has one row per number of iterations; 0 stands for folding."""
    fold, unrolled = table[table["iterations"] == 0].iloc[0], table[table["iterations"] > 0]
    milliseconds = 1e3 * (table["seconds_forward"] + table["seconds_backward"])
    with style.panels(caption, 1, 3, figsize=(7.4, 2.6)) as (figure, (time, memory, error)):
        for panel, values, label in (
            (time, milliseconds, "Forward and backward (ms)"),
            (memory, table["peak_bytes"] / 1e6, "Peak memory (MB)"),
        ):
            folded, others = values[fold.name], values[unrolled.index]
            panel.plot(
                unrolled["iterations"], others, "o-", color=style.COLORS[4], markersize=3.5, label="unrolled FDPG"
            )
            panel.axhline(folded, color="k", linewidth=1.4, label="folded, exact forward")
            panel.set_ylabel(label)
            _log_axes(panel)
        for column, marker, label in (("error_x", "o-", "of x*"), ("error_gradient", "s--", "of the gradient")):
            error.plot(
                unrolled["iterations"],
                unrolled[column],
                marker,
                color=style.COLORS[4],
                markersize=3.5,
                label=f"unrolled, {label}",
            )
        error.set_ylabel("Relative error")
        _log_axes(error)
    return figure


def _log_axes(panel: Axes) -> None:
    panel.set(xscale="log", yscale="log", xlabel="Iterations")
    style.grid(panel)
    panel.legend(fontsize=6.5, frameon=False, loc="best")
