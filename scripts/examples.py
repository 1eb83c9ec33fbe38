"""Run the examples and save their figures as the site shows them: `python -m scripts.examples [name ...]`.

A script of `examples/` runs from top to bottom, prints its numbers and draws one figure with pyplot. Here it runs
without a window, and in one style for all.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("[!_]*.py"))}
FIGURES = ROOT / "docs" / "assets" / "examples"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.figsize": (8, 3.6),
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,  # inches
    "font.size": 11,  # 13 pixels where the site shows the figure 700 pixels wide
    "grid.color": "0.9",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def play(name: str) -> tuple[dict[str, Any], Figure]:
    """Run an example in the style of the site.

    Args:
        name: the script's name without its suffix, a key of `SCRIPTS`.

    Returns:
        The variables of the script at its end, and its figure.

    Raises:
        ValueError: the script leaves no figure open in pyplot, or more than one.
    """
    plt.close("all")
    plt.switch_backend("agg")
    arguments, sys.argv = sys.argv, [str(SCRIPTS[name])]
    try:
        variables = runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = arguments
    if len(plt.get_fignums()) != 1:
        raise ValueError(f"examples/{name}.py must draw one figure with pyplot, but it drew {len(plt.get_fignums())}.")
    return variables, plt.gcf()


def main() -> None:
    """Run the examples that the command line names, all by default, and save their figures."""
    parser = argparse.ArgumentParser(description="Run examples and save the figures that the site shows.")
    parser.add_argument("names", nargs="*", default=list(SCRIPTS), metavar="name", help=", ".join(SCRIPTS))
    parser.add_argument("--folder", type=Path, default=FIGURES, help="of the pictures; default: %(default)s")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(SCRIPTS)):
        parser.error(f"no example is called {', '.join(unknown)}. There are: {', '.join(SCRIPTS)}.")
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.names:
        print(f"{name}:")
        with plt.style.context(STYLE):
            _, figure = play(name)
            figure.savefig(asked.folder / f"{name}.png")


if __name__ == "__main__":
    main()
