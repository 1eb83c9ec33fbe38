"""The output of `make bench`: tables of targets and of all contenders, the figure and the JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmark.layers import LAYERS, OURS, Layer
from experiments.benchmark.measure import FLOOR, NETWORK, Settings, measure
from experiments.benchmark.verdicts import FASTER, exponents, judged, medians, throughput
from experiments.report import style
from experiments.report.artifacts import Artifacts, output_root
from experiments.report.markdown import number
from experiments.report.measurements import measured_once
from experiments.run.summary import made_with

BESIDE = {FLOOR: "batched LU of the backward pass's size", NETWORK: "step of the network alone"}
QUICK: Mapping[str, Any] = {
    "limit": 1.0,
    "budget": 0.5,
}  # on a GPU, where many small kernels make slow contenders even slower
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"factors": (1,), "many": 128, "rounds": 1, "budget": 0.1, "limit": 2.0},
    "default": {},
    "paper": {"rounds": 15, "budget": 10.0, "limit": 60.0},
}


def machine() -> dict[str, str | int]:
    """Return the name of the CPU and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count() or 1}


def make(
    profile: str,
    names: Sequence[str],
    threads: Sequence[int],
    command: str,
    gpu: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Artifacts, pd.DataFrame]:
    """Measure the layers in `names`, and write results/bench and the figure.

    Every layer is measured in a separate process. Its measurement is kept, so that a second call does not repeat it.

    Args:
        profile: The size of the measurement.
        names: Names of the layers.
        threads: Numbers of threads.
        command: The command, for the captions.
        gpu: Name of the GPU, if one is measured as well.
        say: Prints progress.

    Returns:
        The written files, and the table of `judged`.
    """
    frames = []
    for device, count in [*(("cpu", count) for count in threads), *([("cuda", 1)] if gpu else [])]:
        for name in names:
            say(f"Measuring: {LAYERS[name].title}, {_place(device, count)}")
            settings = Settings(name, count, device, **{**PROFILES[profile], **(QUICK if device == "cuda" else {})})
            also = LAYERS[name].identity(), machine(), made_with()["versions"], gpu if device == "cuda" else None
            place = count if device == "cpu" else device
            rows = measured_once(f"bench-{name}-{place}", settings, measure, *also, threads=count)
            frames.append(rows.assign(layer=name, device=device, threads=count))
    rows = pd.concat(frames, ignore_index=True)
    rows["variant"] = rows["variant"].fillna("")
    table = medians(rows)
    artifacts = Artifacts(output_root(profile))
    if gpu:
        _write_gpu(artifacts, rows, table, gpu, command)
        rows, table = (frame[frame["device"] == "cpu"] for frame in (rows, table))
    _write_json(artifacts, "bench/bench", table, machine())
    verdicts = {count: judged(table, count) for count in threads}
    where, repeats = machine(), Settings("", 1, **PROFILES[profile]).rounds
    note = (
        f"{where['cpu']}, {where['cores']} cores; float64; medians of up to {repeats} rounds, in which all take turns."
    )
    artifacts.markdown(
        "bench/targets",
        (
            *("Layer", "Part", "Against", "Target"),
            *(_threads(count).capitalize() for count in threads),
            *("Error of x, ours / theirs", "Of the vjp"),
        ),
        _verdict_rows(verdicts),
        "Time of the other contender divided by ours, in the variant with the smallest ratio; ≤: our time divided by "
        f"that of the other, in the variant with the largest ratio. **Bold**: missed. {note} Errors, and the choice of "
        f"the fastest other contender, are those with {_threads(max(threads))}; errors are relative to folding with a "
        f"direct solver. Made by: `{command}`",
    )
    _write_layers(artifacts, "bench/layers", rows, table, note, command)
    grown = {key: f"{exponent:.2f}" for key, exponent in exponents(table).items()}
    artifacts.markdown(
        "bench/growth",
        ("Layer", "Time, batch", "Time, n"),
        [[LAYERS[name].title, *(grown.get((name, axis), "–") for axis in ("batch", "n"))] for name in names],
        f"Exponents of the time of folding, forward and backward, on one thread; 1 is linear. {note} "
        f"Made by: `{command}`",
    )
    figure = draw(
        table,
        "Black: what a user of foldopt gets; blue: other ways that foldopt has; orange: other libraries; "
        "grey: beside them.\nBars: medians, and how many times that of black; whiskers: the fastest and "
        f"the slowest round.\n{note}\n{_threads(max(threads)).capitalize()}. Made by: {command}",
    )
    artifacts.figure("bench", figure)
    plt.close(figure)
    return artifacts, verdicts[max(threads)]


def _write_json(artifacts: Artifacts, name: str, table: pd.DataFrame, where: Mapping[str, str | int]) -> None:
    content = {"machine": where, **made_with(), "rows": json.loads(table.to_json(orient="records"))}
    artifacts.write(f"{name}.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _write_layers(
    artifacts: Artifacts, name: str, rows: pd.DataFrame, table: pd.DataFrame, note: str, command: str
) -> None:
    artifacts.markdown(
        name,
        (
            *("Layer", "n", "Batch", "Who", "Threads", "Forward (µs)", "Backward (µs)", "Ratio", "Memory (MB)"),
            *("Error of x", "Of the vjp"),
        ),
        _layer_rows(rows, table),
        "Microseconds per sample. Ratio: time of both passes divided by that of folding. Memory: peak for a batch. "
        f"{note} Made by: `{command}`",
    )


def _write_gpu(artifacts: Artifacts, rows: pd.DataFrame, table: pd.DataFrame, gpu: str, command: str) -> None:
    """Write bench/cuda.md, cuda_layers.md and cuda.json: the GPU compared with the CPU, and all contenders on it."""
    measured, medians_there = (frame[frame["device"] == "cuda"] for frame in (rows, table))
    _write_json(artifacts, "bench/cuda", table, machine() | {"gpu": gpu})
    _write_layers(artifacts, "bench/cuda_layers", measured, medians_there, f"{gpu}; float64.", command)
    rows = throughput(table)
    batches = " and ".join(f"{many:,}" for many in sorted(set(rows["many"])))
    most = table.loc[table["device"] == "cpu", "threads"].max()
    artifacts.markdown(
        "bench/cuda",
        (
            *("Layer", "Study's batch: CPU (µs)", "CUDA (µs)", f"Batch {batches}: CPU (µs)", "CUDA (µs)"),
            *("Ratio", "To the CPU at the study's batch", "Memory (MB)", "Error of x", "Of the vjp"),
        ),
        _gpu_rows(rows),
        f"Microseconds per sample, forward and backward; float64; {gpu}, and {_threads(most)} of {machine()['cpu']}, "
        f"{machine()['cores']} cores. Target: {FASTER}×; **bold**: missed. Errors and memory are those of the large "
        f"batch on the GPU, errors relative to a solve on the CPU. Made by: `{command}`",
    )


def _gpu_rows(rows: pd.DataFrame) -> Iterator[list[str]]:
    for row in rows.itertuples():
        layer = LAYERS[row.layer]
        who = "" if row.contender == OURS else f", {title(layer, row.contender)}"
        times = [1e6 * seconds for seconds in (row.cpu, row.cuda, row.cpu_many, row.cuda_many)]
        ratios = [seconds / row.cuda_many for seconds in (row.cpu_many, row.cpu)]
        yield [
            layer.title + who,
            *(number(time, ".3g", "–") for time in times),
            *("–" if pd.isna(ratio) else _bold(_ratio(ratio), ratio < FASTER) for ratio in ratios),
            *(f"{row.peak_bytes / 1e6:.0f}", f"{row.error_x:.0e}", f"{row.error_vjp:.0e}"),
        ]


def _place(device: str, count: int) -> str:
    return _threads(count) if device == "cpu" else "CUDA"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def title(layer: Layer, contender: str) -> str:
    """Return the title of a contender, or of one of the other measurements."""
    return BESIDE[contender] if contender in BESIDE else layer.contenders[contender].title


def _verdict_rows(verdicts: Mapping[int, pd.DataFrame]) -> Iterator[list[str]]:
    measured = {count: frame.set_index("number") for count, frame in verdicts.items()}
    for row in verdicts[max(verdicts)].itertuples():
        layer = LAYERS[row.layer]
        ours = "" if row.ours == OURS else f", {title(layer, row.ours)}"
        yield [
            *(layer.title + ours, row.part, title(layer, row.against)),
            f"{'≤ ' if row.at_most else ''}{row.factor:,g}×",
            *(_measured(frame.loc[row.number]) for frame in measured.values()),
            *(
                f"{getattr(row, f'{error}_ours'):.0e} / {getattr(row, f'{error}_theirs'):.0e}"
                for error in ("error_x", "error_vjp")
            ),
        ]


def _measured(verdict: pd.Series) -> str:
    where = f" ({verdict['variant']})" if verdict["variant"] else ""
    ratio = _ratio(verdict["measured"])
    return _bold(ratio, not verdict["holds"]) + where


def _bold(text: str, missed: bool) -> str:
    return f"**{text}**" if missed else text


def _ratio(value: float) -> str:
    """Return a ratio with three digits, without a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}×" if rounded >= 100 else f"{rounded:g}×"


def _layer_rows(rows: pd.DataFrame, table: pd.DataFrame) -> Iterable[list[str]]:
    refused = rows[rows["seconds_forward"].isna()]
    for name, layer in LAYERS.items():
        for row in table[table["layer"] == name].itertuples():
            variant = f"{layer.title}, {row.variant}" if row.variant else layer.title
            yield [
                *(variant, f"{row.n}", f"{row.batch}", title(layer, row.contender), f"{row.threads}"),
                *(f"{1e6 * row.forward:.3g}", f"{1e6 * row.backward:.3g}", f"{row.ratio:.3g}"),
                *(number(row.peak_bytes / 1e6, ".0f", "–"), f"{row.error_x:.0e}", f"{row.error_vjp:.0e}"),
            ]
        for row in refused[refused["layer"] == name].itertuples():
            variant = f"{layer.title}, {row.variant}" if row.variant else layer.title
            place = (variant, f"{row.n}", f"{row.batch}", title(layer, row.contender), f"{row.threads}")
            yield [*place, row.why, *[""] * 5]


def draw(table: pd.DataFrame, caption: str) -> Figure:
    """Draw a panel per layer, with a bar per contender at the study's size."""
    threads = table["threads"].max()
    shown = [name for name in LAYERS if name in set(table["layer"])]
    columns = 2
    rows = -(-len(shown) // columns)
    with style.panels(caption, rows, columns, figsize=(7.4, 2.3 * rows), squeeze=False) as (figure, axes):
        for panel in axes.flat[len(shown) :]:
            panel.set_axis_off()
        for name, panel in zip(shown, axes.flat, strict=False):
            layer = LAYERS[name]
            part = table[(table["layer"] == name) & (table["threads"] == threads)]
            part = part[(part["n"] == layer.n) & (part["batch"] == layer.batch)]
            _draw_layer(panel, layer, part[part["variant"] == next(iter(layer.variants))])
    return figure


def _draw_layer(panel: Axes, layer: Layer, part: pd.DataFrame) -> None:
    """Draw the bars of a layer, each labelled by the ratio of its time to ours; whiskers: the range of the rounds."""
    part = part.sort_values("total", ascending=False)
    variant = next(iter(layer.variants))
    colors = [_color(layer, contender) for contender in part["contender"]]
    micro = 1e6 * part["total"]
    spread = 1e6 * np.stack([part["total"] - part["fastest"], part["slowest"] - part["total"]]).clip(min=0)
    whiskers = {"ecolor": "0.5", "elinewidth": 0.8}
    panel.barh(range(len(part)), micro, xerr=spread, error_kw=whiskers, color=colors, height=0.7)
    panel.set_yticks(range(len(part)), [title(layer, c) for c in part["contender"]], fontsize=6)
    for place, (value, ratio) in enumerate(zip(micro, part["ratio"], strict=True)):
        end = max(value, 1e6 * part["slowest"].iloc[place])
        panel.text(1.1 * end, place, _ratio(ratio), va="center", fontsize=5.5)
    panel.set_xscale("log")
    panel.set_xlim(0.5 * micro.min(), 20 * micro.max())
    named = f"{layer.title}{', ' if variant else ''}{variant}, n = {layer.n}, batch {layer.batch}"
    panel.set_title(named, fontsize=7, loc="right")
    panel.tick_params(axis="x", labelsize=6)
    panel.set_xlabel("µs per sample, forward and backward", fontsize=6.5)
    style.grid(panel)


def _color(layer: Layer, contender: str) -> str:
    if contender == OURS:
        return "k"
    if contender in BESIDE:
        return "0.8"
    return style.COLORS[4] if layer.contenders[contender].peer else style.COLORS[5]
