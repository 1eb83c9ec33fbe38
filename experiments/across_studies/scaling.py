"""Growth of time and memory of every backend with the size of the problem, the batch and the iterations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.across_studies.linear_solvers import MULTILABEL, parameters_in_training
from experiments.report import style
from experiments.report.markdown import number
from experiments.report.measurements import measured_once, peak_memory, seconds
from experiments.report.outputs import Measurement
from experiments.report.style import Line
from experiments.run import components, configuration

ITERATED = ("unroll", "unfold")


@dataclass(frozen=True)
class Layer:
    """A layer of a study: its overrides, the key of its size n (None if the data fix it), and its backends."""

    title: str
    overrides: tuple[str, ...]
    key: str | None
    backends: tuple[str, ...]


LAYERS: Mapping[str, Layer] = {
    "portfolio": Layer("portfolio", ("task=portfolio",), "task.n_assets", ("fold", "gurobi", "unroll", "cvxpylayers")),
    "bilinear": Layer("bilinear", ("task=bilinear", "task.kappa=0.9"), "task.n_variables", ("fold", "lfpi", "unfold")),
    "denoising": Layer(
        "denoising",
        ("task=denoising", "model=operator"),
        "task.length",
        ("fold", "unfold", "unroll", "qpth", "cvxpylayers"),
    ),
    "multilabel": Layer(
        "multilabel",
        (*MULTILABEL, "task.temperature=1"),
        None,
        ("exact", "fold", "unfold", "cvxpylayers"),
    ),
}
BACKENDS: Mapping[str, tuple[str, tuple[str, ...], Line]] = {
    "exact": ("exact", ("backend=exact",), Line(style.COLORS[3], ":")),
    "fold": ("folded, exact forward", ("backend=fold",), Line("k")),
    "lfpi": ("folded, by LFPI", ("backend=fold", "linear_solver=lfpi"), Line("0.55")),
    "gurobi": ("folded, Gurobi forward", ("backend=fold", "backend.forward=gurobi"), Line(style.COLORS[1])),
    "unroll": ("unrolled", ("backend=unroll", "backend.tol=1e6"), Line(style.COLORS[4])),
    "unfold": ("unfolded", ("backend=unfold", "backend.tol=1e6"), Line(style.COLORS[0])),
    "qpth": ("qpth", ("backend=qpth",), Line(style.COLORS[2])),
    "cvxpylayers": ("cvxpylayers (Clarabel)", ("backend=cvxpylayers",), Line(style.COLORS[5])),
}
LEAST_BYTES = 2**16  # smallest peak memory that the counters of the operating system resolve
AXES: Mapping[str, str] = {"n": "Size n", "batch": "Batch", "iterations": "Iterations"}


@dataclass(frozen=True)
class Settings:
    """Size of the measurement.

    Attributes:
        repeats: Number of calls at each place.
        sizes: Values of n, at the usual batch.
        batches: Batch sizes, at the usual n.
        iterations: Numbers of iterations of the backends that iterate on the graph.
        usual_n: n where it does not vary.
        usual_batch: Batch size where it does not vary.
        usual_iterations: Number of iterations where it does not vary.
        limit: A series ends where one forward and backward pass takes more seconds than this.
        seed: Seed of the data and the parameters.
    """

    repeats: int = 2
    sizes: tuple[int, ...] = (12, 25, 50, 100, 200)
    batches: tuple[int, ...] = (8, 32, 128)
    iterations: tuple[int, ...] = (10, 30, 100, 300)
    usual_n: int = 50
    usual_batch: int = 32
    usual_iterations: int = 50
    limit: float = 1.0
    seed: int = 0


PROFILES = {
    "smoke": Settings(
        repeats=1, sizes=(12, 25), batches=(4, 8), iterations=(5, 10), usual_n=12, usual_batch=4, limit=0.2
    ),
    "default": Settings(),
    "paper": Settings(repeats=7, sizes=(12, 25, 50, 100, 200, 400), batches=(8, 32, 128, 512, 2048), limit=10.0),
}


def measure(settings: Settings, layers: Sequence[str] = tuple(LAYERS)) -> pd.DataFrame:
    """Return one row per layer, axis, value, backend and repetition with the seconds of both passes and peak bytes."""
    return pd.DataFrame(
        row for layer in layers for backend in LAYERS[layer].backends for row in _series(layer, backend, settings)
    )


def _series(name: str, backend: str, settings: Settings) -> Iterator[dict[str, str | float]]:
    layer = LAYERS[name]
    grids = {"n": settings.sizes if layer.key else (), "batch": settings.batches}
    grids["iterations"] = settings.iterations if backend in ITERATED else ()
    for axis, values in grids.items():
        for value in values:
            place = {"n": settings.usual_n, "batch": settings.usual_batch, "iterations": settings.usual_iterations}
            call = _layer_call(layer, backend, {**place, axis: value}, settings.seed)
            call()
            _, memory = peak_memory(call)
            forward = backward = 0.0
            for _ in range(settings.repeats):
                forward, backward = call()
                yield {
                    **{"layer": name, "axis": axis, "value": value, "backend": backend},
                    **{"seconds_forward": forward, "seconds_backward": backward, "peak_bytes": memory},
                }
                if forward + backward > settings.limit / 4:
                    break
            if forward + backward > settings.limit:
                break


def _layer_call(layer: Layer, backend: str, place: Mapping[str, int], seed: int) -> partial[tuple[float, float]]:
    """Return a function that makes a forward and a backward pass and returns the seconds of each."""
    size = [f"task.n_train={place['batch']}", "task.n_val=1", "task.n_test=1"]
    if layer.key:
        size.append(f"{layer.key}={place['n']}")
    chosen = [*BACKENDS[backend][1]]
    if backend in ITERATED:
        chosen.append(f"backend.iterations={place['iterations']}")
    parts = components.build(configuration.compose([*layer.overrides, *size, *chosen]))
    parameters = parameters_in_training(parts.task, 0.3, torch.Generator().manual_seed(seed))
    return partial(_pass, parts, tuple(p.clone().requires_grad_() for p in parameters))


def _pass(parts: components.Components, leaves: tuple[Tensor, ...]) -> tuple[float, float]:
    decisions, forward = seconds(lambda: parts.backend(leaves if len(leaves) > 1 else leaves[0]))
    loss = parts.task.decision_losses(decisions, parts.task.splits["train"]).mean()
    _, backward = seconds(lambda: torch.autograd.grad(loss, leaves, allow_unused=True))
    parts.backend.take_failures()
    return forward, backward


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Fit the exponents of time and memory to the three largest values of each series.

    Returns:
        One row per layer, axis and backend with the columns largest, the largest value; seconds and peak_bytes, those
        at this value; time_slope and memory_slope, the exponents, NaN for a series with fewer than two values or whose
        memory is too small to be measured.
    """
    rows = []
    for (layer, axis, backend), part in table.groupby(["layer", "axis", "backend"], sort=False):
        end = part.sort_values("value").tail(3)
        last = end.iloc[-1]
        rows.append(
            {
                **{"layer": layer, "axis": axis, "backend": backend, "largest": last["value"]},
                **{"seconds": last["seconds"], "peak_bytes": last["peak_bytes"]},
                "time_slope": _slope(end["value"], end["seconds"], 0.0),
                "memory_slope": _slope(end["value"], end["peak_bytes"], LEAST_BYTES),
            }
        )
    return pd.DataFrame(rows)


def _slope(x: pd.Series, y: pd.Series, least: float) -> float:
    if len(x) < 2 or (y < least).any():
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def make(measurement: Measurement) -> None:
    """Write figures/scaling.png, .pdf and .csv and tables/scaling.csv and .md, measuring once per profile."""
    settings = measurement.settings(PROFILES)
    rows = measured_once("scaling", settings, measure, {k: v.overrides for k, v in LAYERS.items()})
    keys = ["layer", "axis", "value", "backend"]
    table = rows.groupby(keys, sort=False).median().reset_index()
    table["seconds"] = table["seconds_forward"] + table["seconds_backward"]
    measurement.artifacts.csv("figures/scaling", table)
    fitted = slopes(table)
    note = (
        f"Forward and backward pass, float64, one thread, medians of {settings.repeats} (of 1 where a pass takes more "
        f"than {settings.limit / 4:g} s; a series ends where it takes more than {settings.limit:g} s). Where they do "
        f"not vary: n = {settings.usual_n} (multilabel: 100 classes), batch {settings.usual_batch}, "
        f"{settings.usual_iterations} iterations of what is unrolled or unfolded"
    )
    measurement.artifacts.csv("tables/scaling", fitted)
    measurement.artifacts.markdown(
        "tables/scaling",
        ("Layer", "Backend", *(f"{what}, {axis}" for axis in AXES for what in ("Time", "Memory"))),
        _rows(fitted),
        f"Exponents of time and peak memory in n, batch and iterations, fitted to the three largest values. {note}. "
        f"Made by: `{measurement.command}`",
    )
    legend = "Numbers: exponents, fitted to the three largest values of each series"
    caption = f"{legend}. Made by: {measurement.command}"
    caption = f"{note}.\n{caption}".replace("Where they", "\nWhere they")
    measurement.artifacts.figure("scaling", draw(table, fitted, caption))


def _rows(fitted: pd.DataFrame) -> Iterator[list[str]]:
    indexed = fitted.set_index(["layer", "backend", "axis"])
    for name, layer in LAYERS.items():
        for backend in layer.backends:
            cells = []
            for axis in AXES:
                for column in ("time_slope", "memory_slope"):
                    place = (name, backend, axis)
                    value = indexed.loc[place, column] if place in indexed.index else float("nan")
                    cells.append(number(value, ".1f", "–"))
            yield [layer.title, BACKENDS[backend][0], *cells]


def draw(table: pd.DataFrame, fitted: pd.DataFrame, caption: str) -> Figure:
    """Draw a row for time and one for memory per axis, a column per layer; the legends have the exponents."""
    measures = (("seconds", "time_slope", "Time (s)", 1.0), ("peak_bytes", "memory_slope", "Memory (MB)", 1e-6))
    kinds = [(axis, *measure) for axis in AXES for measure in measures]
    exponents = fitted.set_index(["layer", "axis", "backend"]).sort_index()
    with style.panels(caption, len(kinds), len(LAYERS), figsize=(7.4, 9.6)) as (figure, axes):
        for row, (axis, column, slope, label, unit) in zip(axes, kinds, strict=True):
            for (name, layer), panel in zip(LAYERS.items(), row, strict=True):
                part = table[(table["layer"] == name) & (table["axis"] == axis)]
                if part.empty:
                    panel.set_axis_off()
                    continue
                _draw_panel(panel, part, column, unit, exponents[slope].loc[name, axis], layer.backends)
                panel.set_xlabel(AXES[axis], fontsize=6.5, labelpad=1)
                panel.set_ylabel(label if name == next(iter(LAYERS)) else "", fontsize=6.5)
        for (_, layer), panel in zip(LAYERS.items(), axes[0], strict=True):
            panel.set_title(layer.title, fontsize=8)
        handles = [
            replace(line, linewidth=1.5, marker="o").legend_handle(title) for title, _, line in BACKENDS.values()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_panel(
    panel: Axes, part: pd.DataFrame, column: str, unit: float, exponents: pd.Series, backends: Sequence[str]
) -> None:
    for backend in backends:
        shown = part[(part["backend"] == backend) & (part[column] > 0)]
        if shown.empty:
            continue
        label = number(exponents.get(backend), ".1f", "–")
        panel.plot(
            shown["value"],
            unit * shown[column],
            markersize=2.5,
            label=label,
            **asdict(replace(BACKENDS[backend][2], linewidth=1.1, marker="o")),
        )
    style.plain_log(panel.xaxis, subs=(1, 2, 5))
    low, high = part.loc[part[column] > 0, column].agg(["min", "max"])
    style.plain_log(panel.yaxis, subs=(1,) if high > 50 * low else (1, 2, 5))
    panel.tick_params(labelsize=6)
    style.grid(panel)
    panel.set_ylim(top=unit * high * (high / low) ** 0.35)  # leaves room for the legend
    panel.legend(fontsize=5.5, frameon=False, loc="upper left", handlelength=1.2, labelspacing=0.15, ncols=2)
