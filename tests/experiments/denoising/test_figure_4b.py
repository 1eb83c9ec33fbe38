"""The figure and the table of the denoising study, made from runs with known numbers."""

import json
from itertools import product

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments.denoising.classical import best_classical
from experiments.denoising.figures import denoised_signals, figure_4b
from experiments.denoising.series import READINGS, STRUCTURES
from experiments.denoising.tables import mse
from experiments.report import measurements
from experiments.report.aggregation import aggregate
from experiments.report.artifacts import Artifacts
from experiments.report.outputs import StudyOutputs
from experiments.run import configuration, folders
from experiments.run.execution import execute
from experiments.sweep import studies
from experiments.sweep.metrics import MissingRunsError, collect
from experiments.sweep.studies import StudyRun

pytestmark = pytest.mark.slow

TASK = {"n_train": 64, "n_test": 32, "length": 30}
CONFIG = OmegaConf.create({"task": TASK, "train": {"epochs": 2}})


@pytest.fixture
def study():
    return studies.load("figure_4b")


@pytest.fixture
def planned(tmp_path):
    """Two lambdas: at the smaller one learning halves the error with each epoch, at the larger one it doubles it."""
    planned = []
    for reading in READINGS:
        for suffix in STRUCTURES:
            for weight in (1, 4):
                if (reading, suffix, weight) == ("literal", "_filter", 4):
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


@pytest.fixture
def trained(tmp_path, console):
    """Short runs in place of the study's: three readings, two seeds, two lambdas, all structures."""
    planned = []
    for series, content in studies.load("figure_4b").series.items():
        reading = series.partition("_")[0]
        for seed, weight in product((0, 1), (0.5, 4) if reading != "optnet" else (5, 40)):
            small = ["task.length=30", "task.n_train=64", "task.n_val=16", "task.n_test=32", "train.epochs=1"]
            places = [f"task.weight={weight}", f"seed={seed}", f"paths.runs={tmp_path}", "tracking.mode=disabled"]
            overrides = ("task=denoising", "model=operator", *content, *small, *places)
            config = configuration.compose(list(overrides))
            assert execute(config, console) == 0
            point, label = {"task.weight": weight}, f"{series} {weight} {seed}"
            planned.append(StudyRun("figure_4b", series, label, point, seed, overrides, config, folders.of(config)))
    return planned


def test_the_table_has_classical_and_learned_errors_and_marks_what_is_better(study, planned):
    table = mse.summarize(collect(planned)).set_index(["series", "weight"])
    assert len(table) == 17
    columns = ["seeds", "classical", "learned", "seconds_epoch"]
    assert table.loc[("optnet", 1), columns].tolist() == [1, 1.0, 0.25, 0.25]
    assert table.loc[("optnet", 4), columns].tolist() == [1, 4.0, 16.0, 0.25]
    rows = list(mse._rows(study, table.reset_index()))
    assert rows[0] == ["heights in [-3, 3], noise 1", "1", "1", "**0.25**", "**0.25**", "**0.25**", "0.2"]
    assert rows[-1] == ["heights in [10, 100], noise 1", "4", "4", "16", "16", "", "0.2"]


def test_every_output_of_the_study_from_trained_models(tmp_path, monkeypatch, study, trained):
    monkeypatch.setattr(measurements, "RESULTS", tmp_path / "results")
    for first in (True, False):
        artifacts = Artifacts(tmp_path / "results")
        for maker in (figure_4b, mse, denoised_signals):
            maker.make(StudyOutputs(study, trained, "default", artifacts))
        assert len(artifacts.written) == (11 if first else 0)
    curves = pd.read_csv(tmp_path / "results" / "figures" / "figure_4b.csv")
    assert len(curves) == 9 * 2 * 2
    classical = best_classical(trained)
    assert classical.groupby("reading").size().tolist() == [2, 2, 2]
    for row in classical.to_dict("records"):
        same = [run for run in trained if (run.series, run.seed) == (row["reading"], row["seed"])]
        starts = [
            folders.load_metrics(run.folder).query("epoch == 0 and split == 'test'")["mse"].item() for run in same
        ]
        assert row["mse"] <= min(starts) * (1 + 1e-12), "no worse than any lambda of the study"

    best = mse.margins(trained, classical)
    assert len(best) == 9
    for row in best.to_dict("records"):
        runs_of = [run for run in trained if run.series == row["reading"] + row["structure"]]
        finals = {
            (run.seed, run.point["task.weight"]): folders.load_summary(run.folder)["final"]["test"]["mse"]
            for run in runs_of
        }
        weights = [float(weight) for weight in row["weights"].split()]
        assert row["learned"] == pytest.approx((finals[0, weights[0]] + finals[1, weights[1]]) / 2)
        assert row["difference"] == pytest.approx(row["learned"] - row["classical"])
        assert row["ci95"] > 0
    lines = (tmp_path / "results" / "tables" / "figure_4b_best.md").read_text().splitlines()
    assert lines[-1].endswith("over all test signals of 2 seed(s). Made by: `make figure-4b`")


def test_the_figure_shows_every_curve_and_the_best_classical(study, planned):
    frame = collect(planned)
    curves = aggregate(frame[frame["split"] == "test"], ["series", "weight", "epoch"], "mse")
    classical = pd.Series(0.75, index=READINGS)
    figure = figure_4b.draw(study, curves, classical, "caption")
    assert [len(panel.get_lines()) for panel in figure.axes] == [3] * 8 + [2]
    assert set(figure.axes[0].get_lines()[-1].get_ydata()) == {0.75}


def test_missing_runs_are_named(tmp_path, study, planned):
    (planned[0].folder / "summary.json").unlink()
    for maker in (figure_4b.make, mse.make, denoised_signals.make):
        with pytest.raises(MissingRunsError, match="centred 1"):
            maker(StudyOutputs(study, planned, "default", Artifacts(tmp_path / "results")))


@pytest.mark.parametrize("profile", ["default", "paper"])
def test_every_reading_learns_all_of_d_at_four_weights_and_every_structure(study, profile):
    """All training signals and batches of 32, as in the paper; other structures have only some of the weights."""
    expanded = studies.expand(study, profile)
    for reading, suffix in product(READINGS, STRUCTURES):
        paper, found = (
            {run.point["task.weight"] for run in expanded if (run.series, run.seed) == (series, 0)}
            for series in (reading, reading + suffix)
        )
        assert len(paper) == 4
        assert found
        assert found <= paper if profile == "default" else found == paper
    assert all(r.config.task.n_train == 9000 and r.config.train.batch_size == 32 for r in expanded)
