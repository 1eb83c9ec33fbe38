"""The figure and table of the denoising study, on runs whose numbers are known."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments import studies
from experiments.aggregation import MissingRunsError, collect
from experiments.artifacts import Artifacts
from experiments.figures import figure_4b
from experiments.studies import StudyRun
from experiments.tables import denoising

TASK = {"n_train": 64, "n_test": 32, "length": 30}
CONFIG = OmegaConf.create({"task": TASK, "train": {"epochs": 2}})


@pytest.fixture
def study():
    return studies.load("figure_4b")


@pytest.fixture
def planned(tmp_path):
    """Two lambdas: at the smaller one learning halves the error with each epoch, at the larger one it doubles it."""
    planned = []
    for reading in figure_4b.READINGS:
        for suffix in figure_4b.ROWS:
            for weight in (1, 4):
                if (reading, suffix, weight) == ("literal", "_tuned", 4):
                    continue
                run = StudyRun(
                    *("figure_4b", reading + suffix, f"{reading}{suffix} {weight}", {"task.weight": weight}, 0, ()),
                    *(CONFIG, tmp_path / "runs" / f"{reading}{suffix}-{weight}"),
                )
                run.folder.mkdir(parents=True)
                factor = 0.5 if weight == 1 else 2.0
                rows = [
                    {"epoch": epoch, "split": split, "mse": weight * factor**epoch, "seconds_epoch": 0.25}
                    for epoch in range(3)
                    for split in (("val", "test") if epoch == 0 else ("train", "val", "test"))
                ]
                pd.DataFrame(rows).to_csv(run.folder / "metrics.csv", index=False)
                (run.folder / "summary.json").write_text(json.dumps({"status": "finished"}))
                planned.append(run)
    return planned


def test_the_table_has_classical_and_learned_errors_and_marks_what_is_better(tmp_path, study, planned):
    table = denoising.summarize(collect(planned)).set_index(["series", "weight"])
    assert len(table) == 11
    assert table.loc[("optnet", 1)].tolist() == [1, 1.0, 0.25, 0.25]
    assert table.loc[("optnet", 4)].tolist() == [1, 4.0, 16.0, 0.25]
    denoising.make(study, planned, Artifacts(tmp_path / "results"), "make figure-4b", "make reproduce")
    lines = (tmp_path / "results" / "tables" / "figure_4b.md").read_text().splitlines()
    assert lines[2] == "| heights in [-3, 3], noise 1 | 1 | 1 | **0.25** | **0.25** | 0.2 |"
    assert lines[7] == "| heights in [10, 100], noise 1 | 4 | 4 | 16 |  | 0.2 |"
    assert "after 2 epochs" in lines[-1]
    assert "Made by: `make figure-4b`" in lines[-1]


def test_the_figure_is_the_same_on_a_second_call_and_shows_every_curve(tmp_path, study, planned):
    for expected in (3, 0):
        artifacts = Artifacts(tmp_path / "results")
        figure_4b.make(study, planned, artifacts, "make figure-4b", "make reproduce")
        assert len(artifacts.written) == expected
    curves = pd.read_csv(tmp_path / "results" / "figures" / "figure_4b.csv")
    assert len(curves) == 11 * 3
    figure = figure_4b.draw(study, curves, "caption")
    assert [len(panel.get_lines()) for panel in figure.axes] == [3, 3, 3, 3, 3, 2], "the curves and the best classical"
    dashed = figure.axes[0].get_lines()[-1]
    assert set(dashed.get_ydata()) == {1.0}


def test_missing_runs_are_named(tmp_path, study, planned):
    (planned[0].folder / "summary.json").unlink()
    for maker in (figure_4b.make, denoising.make):
        with pytest.raises(MissingRunsError, match="centred 1"):
            maker(study, planned, Artifacts(tmp_path / "results"), "make figure-4b", "make reproduce")


def test_every_reading_runs_with_both_settings_and_four_weights(study):
    expanded = studies.expand(study)
    for reading in figure_4b.READINGS:
        weights = [
            sorted(r.point["task.weight"] for r in expanded if r.series == reading + suffix)
            for suffix in figure_4b.ROWS
        ]
        assert weights[0] == weights[1]
        assert len(weights[0]) == 4
    assert all(r.config.task.n_train == 9000 and r.config.train.batch_size == 32 for r in expanded)
