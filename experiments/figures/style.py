"""What all figures share: fonts, colours that the colour-blind tell apart, logarithmic axes, curves with a band."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
COLORS = ("#CC79A7", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9")  # Okabe and Ito
CAPTION = {"fontsize": 6.5, "color": "0.3"}


def plain_log(axis: Axis, subs: tuple[float, ...]) -> None:
    """Make an axis logarithmic, labelled in plain numbers at `subs` of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def epochs(panel: Axes) -> None:
    """Let the x axis count epochs, over a light grid."""
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    grid(panel)


def grid(panel: Axes) -> None:
    """Draw a light grid behind everything."""
    panel.grid(visible=True, which="major", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)


def curve(panel: Axes, frame: pd.DataFrame, x: str = "epoch", **line: Any) -> None:
    """Draw the columns mean, low and high of `frame` against `x`: a line and a band from low to high."""
    frame = frame.sort_values(x)
    (drawn,) = panel.plot(frame[x], frame["mean"], **line)
    panel.fill_between(
        frame[x], frame["low"], frame["high"], color=drawn.get_color(), alpha=0.18, linewidth=0, zorder=1
    )


def seeds_note(seeds: int) -> str:
    """Return how a caption speaks of the seeds and the bands."""
    return f"mean over {seeds} seeds, bands from the smallest to the largest" if seeds > 1 else "1 seed"
