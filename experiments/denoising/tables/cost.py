"""Time, peak memory and errors of every backend on the denoising study's layer.

Each lambda and reading of the study is measured on one batch of training signals. D is the differencing operator plus
noise, as if it had been trained. Errors are relative to the exact solver and its folded gradient: the largest error of
a denoised signal, and the error of the gradient of the training loss with respect to D.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pandas as pd

from experiments.denoising.bench import OVERRIDES, REFERENCE, STUDY, Bench, Settings
from experiments.denoising.series import READINGS
from experiments.report.measurements import measured_once, peak_memory
from experiments.report.outputs import Measurement
from experiments.sweep import studies

TITLES = {
    "fold": "f-FDPG, exact forward",
    "fold_warm": "f-FDPG, exact forward, warm started",
    "fold_fdpg": "f-FDPG, FDPG forward",
    "unroll": "FDPG unrolled, 300 iterations",
    "qpth": "qpth",
    "qpth_float32": "qpth in float32",
    "cvxpylayers": "cvxpylayers (Clarabel)",
}
SLOW = ("cvxpylayers",)


PROFILES = {"smoke": Settings("smoke", repeats=1), "default": Settings("default"), "paper": Settings("paper", 9)}


def measure(settings: Settings) -> pd.DataFrame:
    """Return one row per reading, lambda, backend and repetition; the backends take turns."""
    rows = []
    for run in _places(settings):
        bench = Bench(list(run.overrides), settings)
        layers = {name: bench.layer(name) for name in TITLES}
        exact = bench.call(layers[REFERENCE])[:2]
        for layer in layers.values():
            bench.call(layer)
        memory: dict[str, int] = {}
        for repeat in range(settings.repeats):
            for name, layer in layers.items():
                if repeat and name in SLOW:
                    continue
                if not repeat:
                    (x, gradient, forward, backward), memory[name] = peak_memory(partial(bench.call, layer))
                else:
                    x, gradient, forward, backward = bench.call(layer)
                rows.append(
                    {
                        "reading": run.series,
                        "weight": run.point["task.weight"],
                        "backend": name,
                        "seconds_forward": forward,
                        "seconds_backward": backward,
                        "peak_bytes": memory[name],
                        **bench.errors(x, gradient, exact),
                    }
                )
    return pd.DataFrame(rows)


def _places(settings: Settings) -> list[studies.StudyRun]:
    """Return one run per reading and lambda of the study."""
    planned = studies.expand(studies.load(STUDY), settings.profile, set(READINGS))
    return [run for run in planned if run.seed == settings.seed]


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Return medians over the repetitions, one row per reading, lambda and backend.

    The column `ratio` is the time of forward and backward pass relative to that of folding with the exact solver.
    """
    keys = ["reading", "weight", "backend"]
    table = rows.groupby(keys, sort=False).median().reset_index()
    total = table["seconds_forward"] + table["seconds_backward"]
    reference = table[table["backend"] == REFERENCE].assign(reference=total)[[*keys[:2], "reference"]]
    table["ratio"] = (total / table.merge(reference, on=keys[:2])["reference"]).to_numpy()
    return table


def make(measurement: Measurement) -> None:
    """Write tables/denoising_cost.csv and .md and denoising_ratios.md, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    places = [run.overrides for run in _places(settings)]
    table = summarize(measured_once("denoising/cost", settings, measure, OVERRIDES, places))
    measurement.artifacts.csv("tables/denoising_cost", table)
    note = (
        f"One batch of {settings.batch_size} signals, one thread, float64 unless the title says float32, medians of "
        f"{settings.repeats} rounds (cvxpylayers: 1) in which the backends take turns. D is the differencing operator "
        f"plus noise of standard deviation {settings.learned}. Errors are relative to the exact solver. "
        f"Made by: `{measurement.command}`"
    )
    measurement.artifacts.markdown(
        "tables/denoising_cost",
        ("Backend", "Forward (ms)", "Backward (ms)", "Peak memory (MB)", "Error of x*", "Error of the gradient"),
        _cost_rows(table),
        f"Smallest and largest value over the readings of the data and the λ of Figure 4(b). {note}",
    )
    measurement.artifacts.markdown(
        "tables/denoising_ratios",
        ("Data", "λ", "f-FDPG (ms)", "qpth (ms)", "Ratio", "Ratio, float32", "Ratio, cvxpylayers"),
        _ratio_rows(table),
        f"Times of forward and backward pass together; ratios to f-FDPG with the exact solver. {note}",
    )


def _cost_rows(table: pd.DataFrame) -> Iterator[list[str]]:
    for name, title in TITLES.items():
        part = table[table["backend"] == name]
        yield [
            title,
            _range(1e3 * part["seconds_forward"]),
            _range(1e3 * part["seconds_backward"]),
            _range(part["peak_bytes"] / 1e6),
            _range(part["error_x"], ".0e"),
            _range(part["error_gradient"], ".0e"),
        ]


def _range(values: pd.Series, form: str = ".3g") -> str:
    low, high = f"{values.min():{form}}", f"{values.max():{form}}"
    return low if low == high else f"{low} – {high}"


def _ratio_rows(table: pd.DataFrame) -> Iterator[list[str]]:
    titles = studies.load(STUDY).titles
    for reading in READINGS:
        for weight, part in table[table["reading"] == reading].groupby("weight"):
            rows = part.set_index("backend")
            total = 1e3 * (rows["seconds_forward"] + rows["seconds_backward"])
            ratios = (f"{rows.loc[name, 'ratio']:.0f}" for name in ("qpth", "qpth_float32", "cvxpylayers"))
            yield [titles[reading], f"{weight:g}", f"{total[REFERENCE]:.1f}", f"{total['qpth']:.0f}", *ratios]
