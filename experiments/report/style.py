"""The style of all figures: fonts, colours for colour-blind readers, logarithmic axes, curves with a band."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.report.aggregation import seeds_said
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError

T = TypeVar("T")
LineStyle = str | tuple[float, tuple[float, ...]]

STYLE: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
COLORS = ("#CC79A7", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9")  # Okabe and Ito
CAPTION = {"fontsize": 6.5, "color": "0.3"}


@dataclass(frozen=True)
class Line:
    """How the line of one series is drawn; the fields are keyword arguments of matplotlib's `plot`."""

    color: str
    linestyle: LineStyle = "-"
    linewidth: float = 1.6
    zorder: float = 2
    marker: str | None = None

    def legend_handle(self, label: str) -> Line2D:
        """Return an entry for the legend of a whole figure."""
        return Line2D([], [], label=label, markersize=3, **asdict(self))


@contextmanager
def panels(caption: str, *grid: int, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure in this style and its axes, made by ``plt.subplots(*grid, **options)``, and add the caption."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*grid, layout="constrained", **options)
        yield figure, axes
        figure.supxlabel(caption, **CAPTION)


def plain_log(axis: Axis, subs: tuple[float, ...]) -> None:
    """Make an axis logarithmic, with plain numbers as labels at the multiples `subs` of each power of ten."""
    panel = axis.axes
    (panel.set_xscale if axis is panel.xaxis else panel.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def epochs(panel: Axes) -> None:
    """Label the x axis by whole epochs, and draw a light grid."""
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    grid(panel)


def grid(panel: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Draw a light grid of one or both axes behind everything."""
    panel.grid(visible=True, which="major", axis=axis, color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


def curve(panel: Axes, frame: pd.DataFrame, line: Line, label: str | None = None, x: str = "epoch") -> None:
    """Draw the column `mean` of `frame` against `x` with its 95% confidence band.

    With few seeds the band is much wider than the range of the observations. The limits of the axes therefore follow
    the columns `low` and `high`, and the band is cut off. Without a column `ci95` the band is from `low` to `high`.
    """
    frame = frame.sort_values(x)
    panel.plot(frame[x], frame["mean"], label=label, markersize=3, **asdict(line))
    panel.update_datalim(frame[[x, "low"]].to_numpy())
    panel.update_datalim(frame[[x, "high"]].to_numpy())
    room, least = panel.dataLim.get_points().copy(), np.array(panel.dataLim.minpos)
    low, high = frame["low"], frame["high"]
    if "ci95" in frame:
        low, high = frame["mean"] - frame["ci95"], frame["mean"] + frame["ci95"]
    panel.fill_between(frame[x], low, high, color=line.color, alpha=0.18, linewidth=0, zorder=1)
    panel.dataLim.set_points(room)
    np.asarray(panel.dataLim.minpos)[:] = least
    panel.autoscale_view()


def drawn(lines: Mapping[str, T], found: Iterable[str], figure: str) -> dict[str, T]:
    """Return the entries of `lines` for the series `found`, in order. Raises InputError for a series not in `lines`."""
    found = set(found)
    if unknown := sorted(found - set(lines)):
        raise InputError(
            f"{figure} has no line for the series {', '.join(unknown)}; add it, or choose among {', '.join(lines)}."
        )
    return {series: line for series, line in lines.items() if series in found}


def seeds_note(planned: Sequence[StudyRun]) -> str:
    """Return the part of a caption that explains the seeds and the bands."""
    said = seeds_said(planned)
    return f"{said}, no band" if said == "1 seed" else f"mean over {said}, with its 95% confidence band (Student's t)"
