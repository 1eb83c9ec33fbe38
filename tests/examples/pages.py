"""An example as its page shows it: what it prints, and its figure."""

import re

import matplotlib.pyplot as plt
import numpy as np

from scripts.examples import FIGURES, SCRIPTS, STYLE, play
from tests.docs.test_pages import agree


def text(name):
    """Return the Markdown of the text cells of an example."""
    cells = SCRIPTS[name].read_text().split("\n# %%")
    found = [cell.split("\n")[1:] for cell in cells if cell.startswith(" [markdown]")]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for cell in found for line in cell)


def run(name, capsys, tmp_path):
    """Run an example, compare what it prints and draws with its page, and return its variables and the panels."""
    with plt.style.context(STYLE):
        variables, figure = play(name)
        printed, shown = capsys.readouterr().out, "".join(re.findall(r"```text\n(.*?)```", text(name), re.DOTALL))
        assert agree(printed, shown), f"examples/{name}.py prints\n{printed}\nand shows\n{shown}"
        figure.savefig(tmp_path / f"{name}.png")
    drawn, committed = plt.imread(tmp_path / f"{name}.png"), plt.imread(FIGURES / f"{name}.png")
    assert drawn.shape == committed.shape, f"the figure has changed: python -m scripts.examples {name}"
    assert np.abs(drawn - committed).mean() < 0.01, f"the figure has changed: python -m scripts.examples {name}"
    for panel in figure.axes:
        assert panel.get_xlabel()
        assert panel.get_title()
        assert panel.get_ylabel() or panel.get_yticklabels()
        assert all(np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all() for line in panel.lines)
        assert not covered(panel), f"{name}: the legend of '{panel.get_title()}' covers {covered(panel)}"
    return variables, figure.axes


def covered(panel):
    """Return the labels of the lines of a panel that run below its legend."""
    if panel.get_legend() is None:
        return []
    box = panel.get_legend().get_window_extent()
    artists = [*panel.lines, *panel.patches]
    paths = [one.get_transform().transform_path(one.get_path()).interpolated(100) for one in artists]
    return [one.get_label() for one, path in zip(artists, paths, strict=True) if box.count_contains(path.vertices)]


def labels(panels):
    """Return what the legend of each panel says."""
    return [panel.get_legend_handles_labels()[1] for panel in panels]
