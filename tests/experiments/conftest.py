import io

import pandas as pd
import pytest
from rich.console import Console

from experiments.report.artifacts import Artifacts
from experiments.run import configuration, folders

TINY = [
    "task.n_train=64",
    "task.n_val=16",
    "task.n_test=32",
    "train.epochs=3",
    "tracking.mode=disabled",
    "device=cpu",
]


@pytest.fixture
def tiny(tmp_path):
    """Compose a run of seconds whose folder is in tmp_path."""

    def compose(*overrides):
        return configuration.compose([*TINY, f"paths.runs={tmp_path}", *overrides])

    return compose


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def untimed():
    """Return metrics.csv of a folder without its times."""

    def read(folder) -> pd.DataFrame:
        frame = folders.load_metrics(folder)
        return frame.drop(columns=[name for name in frame if name.startswith("seconds_")])

    return read


@pytest.fixture
def drawings(monkeypatch):
    """The figures that are written, by their names, to look at what they show."""
    kept, write = {}, Artifacts.figure

    def noted(self, name, figure):
        kept[name] = figure
        write(self, name, figure)

    monkeypatch.setattr(Artifacts, "figure", noted)
    return kept
