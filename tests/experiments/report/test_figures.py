import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy import stats

from experiments.portfolio.figures import figure_4c
from experiments.portfolio.tables import final_regret
from experiments.report import paired, style
from experiments.report.aggregation import aggregate, at_best_validation, seeds_said
from experiments.report.aggregation import (
    paired as paired_rows,
)
from experiments.report.artifacts import Artifacts, output_root
from experiments.report.outputs import StudyOutputs, make_outputs
from experiments.run import folders
from experiments.sweep import studies
from experiments.sweep.metrics import MissingRunsError, collect, require_finished
from experiments.sweep.studies import Study, StudyRun
from foldopt.errors import InputError

CONFIG = OmegaConf.create({"task": {"n_train": 96, "n_test": 64, "tau": 0.1}, "train": {"epochs": 3}})
SERIES = ("fold", "fold_gurobi", "cvxpylayers_paper", "cvxpylayers_normalized", "two_stage")


def metrics(level: float, epochs: int = 3) -> pd.DataFrame:
    rows = []
    for epoch in range(epochs + 1):
        regret = level / (1 + epoch)
        for split in ("val", "test") if epoch == 0 else ("train", "val", "test"):
            rows.append({"epoch": epoch, "split": split, "regret_percent": regret, "seconds_epoch": level / 100})
    return pd.DataFrame(rows)


def write_run(folder: Path, frame: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    frame.to_csv(folder / "metrics.csv", index=False)
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds_wall": 1.0}))


@pytest.fixture
def study() -> Study:
    return studies.load("figure_4c")


@pytest.fixture
def planned(tmp_path) -> list[StudyRun]:
    planned = []
    for number, series in enumerate(SERIES):
        for degree in (1, 2, 3):
            for model in ("mlp", "mlp_bn"):
                for seed in (0, 1):
                    name = f"{series}-{degree}-{model}-{seed}"
                    point = {"task.degree": degree, "model": model}
                    folder = tmp_path / "runs" / name
                    planned.append(StudyRun("figure_4c", series, name, point, seed, (), CONFIG, folder))
                    write_run(folder, metrics(level=2.0 ** (5 - number) * degree * (1 + seed)))
    return planned


@pytest.fixture
def outputs(tmp_path, study, planned) -> StudyOutputs:
    return StudyOutputs(study, planned, "default", Artifacts(tmp_path / "results"))


def test_aggregation_agrees_with_numbers_by_hand():
    frame = pd.DataFrame({"series": ["a"] * 5 + ["b"], "value": [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]})
    table = aggregate(frame, ["series"], "value").set_index("series")
    assert table.loc["a", "mean"] == pytest.approx(3.0)
    assert table.loc["a", "sd"] == pytest.approx(np.sqrt(2.5))
    assert table.loc["a", "ci95"] == pytest.approx(2.776445 * np.sqrt(2.5) / np.sqrt(5), rel=1e-6)
    assert tuple(table.loc["a", ["n", "low", "high"]]) == (5, 1.0, 5.0)
    assert table.loc["b", "n"] == 1
    assert np.isnan(table.loc["b", "sd"])
    assert np.isnan(table.loc["b", "ci95"])


def test_paired_differences_agree_with_the_paired_t_test():
    generator = np.random.default_rng(0)
    rows = [
        {"series": series, "seed": seed, "n": n, "value": level + n * 0.1 * generator.normal()}
        for n in (1, 2)
        for series, level in (("ours", 1.0), ("theirs", 1.3), ("same", 1.0))
        for seed in range(6)
        for _ in range(2)
    ]
    frame = pd.DataFrame(rows)
    table = paired_rows(frame, ["n"], "seed", "value", [("ours", "theirs"), ("ours", "same"), ("ours", "ours")])
    assert len(table) == 6
    means = frame[frame["n"] == 2].groupby(["series", "seed"])["value"].mean().unstack("series")
    test = stats.ttest_rel(means["ours"], means["theirs"])
    row = table[(table["n"] == 2) & (table["against"] == "theirs")].iloc[0]
    assert (row["pairs"], row["mean"]) == (6, pytest.approx(means["ours"].mean()))
    assert row["p"] == pytest.approx(test.pvalue)
    interval = test.confidence_interval()
    assert row["difference"] + row["ci95"] == pytest.approx(interval.high)
    assert row["difference"] - row["ci95"] == pytest.approx(interval.low)
    assert (table["p_adjusted"] >= table["p"]).all()
    itself = table[table["against"] == "ours"]
    assert (itself[["difference", "ci95"]].to_numpy() == 0).all()
    assert (itself["p"] == 1).all()


def test_only_units_that_both_series_have_are_paired():
    frame = pd.DataFrame(
        [
            {"series": s, "seed": k, "n": 1, "value": float(k**2)}
            for s, seeds in (("a", 5), ("b", 3))
            for k in range(seeds)
        ]
        + [{"series": "c", "seed": 0, "n": 1, "value": 1.0}]
    )
    table = paired_rows(frame, ["n"], "seed", "value", [("a", "b"), ("a", "c"), ("a", "absent")])
    assert table[["against", "pairs"]].to_numpy().tolist() == [["b", 3]], "one pair tests nothing"
    assert paired_rows(frame[frame["seed"] == 0], ["n"], "seed", "value", [("a", "b")]).empty


def test_seeds_are_said_with_the_series_that_have_fewer(planned):
    assert seeds_said(planned) == "2 seeds"
    fewer = [run for run in planned if run.series not in ("two_stage", "fold_gurobi") or run.seed == 0]
    assert seeds_said(fewer) == "2 seeds (1 of fold_gurobi, two_stage)"
    assert style.seeds_note(fewer).startswith("mean over 2 seeds (1 of")
    assert style.seeds_note([run for run in planned if run.seed == 0]) == "1 seed, no band"


def test_a_band_is_the_confidence_interval_and_leaves_the_axes_to_what_was_observed():
    frame = pd.DataFrame(
        {"epoch": [0, 1], "mean": [2.0, 1.0], "low": [1.5, 0.9], "high": [2.5, 1.1], "ci95": [9.0, 9.0]}
    )
    figure, (wide, narrow) = plt.subplots(1, 2)
    style.curve(wide, frame, style.Line("k"))
    style.curve(narrow, frame.drop(columns="ci95"), style.Line("k"))
    assert [panel.get_ylim() for panel in (wide, narrow)] == [narrow.get_ylim()] * 2
    tops = [panel.collections[0].get_paths()[0].vertices[:, 1].max() for panel in (wide, narrow)]
    assert tops == [11.0, 2.5]
    plt.close(figure)


@pytest.mark.parametrize("name", [name for name in studies.names() if name != "figure_4b"])
def test_every_comparison_is_one_of_series_that_the_study_has(name):
    study = studies.load(name)
    comparisons = study.paired.comparisons if study.paired else ()
    assert {series for pair in comparisons for series in pair} <= set(study.series)
    assert ("experiments.report.paired" in study.outputs) == bool(comparisons)


def test_the_table_of_paired_tests_names_both_series(tmp_path, outputs):
    paired.make(outputs)
    table = pd.read_csv(tmp_path / "results/tables/figure_4c_paired.csv")
    row = table[(table["against"] == "two_stage") & (table["degree"] == 2) & (table["model"] == "mlp")].iloc[0]
    assert (row["mean"], row["against_mean"], row["pairs"]) == (24.0, 1.5, 2)
    text = (tmp_path / "results/tables/figure_4c_paired.md").read_text()
    assert "| 2 | mlp | f-SQP, exact forward | two-stage, targets as they are | 2 | +22.5 ±" in text


def test_best_validation_epoch_ignores_the_epoch_before_training_and_reports_the_test_row():
    frame = pd.DataFrame(
        [
            {"epoch": epoch, "split": split, "regret_percent": value}
            for epoch, validation, test in ((0, 0.5, 9.0), (1, 3.0, 4.0), (2, 2.0, 5.0), (3, 2.5, 1.0))
            for split, value in (("val", validation), ("test", test))
        ]
    ).assign(run="fold degree=1 model=mlp seed=0")
    assert at_best_validation(frame)[["epoch", "regret_percent"]].to_numpy().tolist() == [[2, 5.0]]


def test_collect_carries_the_place_of_each_run(planned):
    frame = collect(planned)
    assert len(frame) == len(planned) * (2 + 3 * 3)
    assert set(frame["model"]) == {"mlp", "mlp_bn"}
    assert set(frame["degree"]) == {1, 2, 3}
    assert set(frame["seed"]) == {0, 1}


@pytest.mark.slow
def test_figure_and_table_files_are_byte_identical_on_a_second_call(tmp_path, study, planned):
    def make_all() -> Artifacts:
        outputs = StudyOutputs(study, planned, "default", Artifacts(tmp_path / "results"))
        figure_4c.make(outputs)
        final_regret.make(outputs)
        return outputs.artifacts

    first = make_all()
    assert {str(path.relative_to(tmp_path / "results")) for path in first.written} == {
        "figures/figure_4c.png",
        "figures/figure_4c.pdf",
        "figures/figure_4c.csv",
        "tables/figure_4c.csv",
        "tables/figure_4c.md",
    }
    second = make_all()
    assert second.written == []
    assert second.lines() == [f"Nothing to do: 5 files under {tmp_path / 'results'} are up to date."]

    curves = pd.read_csv(tmp_path / "results" / "figures" / "figure_4c.csv")
    place = (curves["series"] == "two_stage") & (curves["degree"] == 2) & (curves["model"] == "mlp")
    row = curves[place & (curves["epoch"] == 3)].iloc[0]
    assert (row["mean"], row["n"], row["low"], row["high"]) == (pytest.approx(1.5), 2, 1.0, 2.0)


def test_final_table_takes_the_last_epoch_and_reads_well(tmp_path, planned, outputs):
    table = final_regret.summarize(collect(planned))
    row = table[(table["series"] == "fold") & (table["degree"] == 1) & (table["model"] == "mlp")].iloc[0]
    assert row["seeds"] == 2
    assert row["regret_mean"] == pytest.approx((32 + 64) / 2 / 4)
    assert row["regret_sd"] == pytest.approx((64 - 32) / 4 / np.sqrt(2))
    assert row["seconds_epoch_mean"] == pytest.approx(0.48)

    final_regret.make(outputs)
    lines = (tmp_path / "results" / "tables" / "figure_4c.md").read_text().splitlines()
    assert lines[2] == "| mlp | f-SQP, exact forward | 12.00 ± 5.66 | 24.00 ± 11.31 | 36.00 ± 16.97 | 0.96 |"
    assert "Made by: `make figure-4c`" in lines[-1]


def test_missing_runs_are_named_with_the_command_that_makes_them(tmp_path, planned, outputs):
    (planned[3].folder / "summary.json").unlink()
    with pytest.raises(MissingRunsError) as caught:
        figure_4c.make(outputs)
    assert planned[3].label in str(caught.value)
    assert f"1 of {len(planned)} runs are not finished" in str(caught.value)
    assert "Make them with: make reproduce" in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_a_series_that_the_figure_does_not_know_is_named(planned, outputs):
    stranger = dataclasses.replace(planned[0], series="spo_minus")
    added = dataclasses.replace(outputs, planned=[*planned, stranger])
    with pytest.raises(InputError, match="figure_4c has no line for the series spo_minus; add it, or choose among"):
        figure_4c.make(added)


def test_a_module_that_a_study_names_must_be_there(outputs):
    for path in ("experiments.portfolio.figures.figure_5", "experiments.portfolio.series_of_mine", "no_dots"):
        study = dataclasses.replace(outputs.study, outputs=(path,))
        with pytest.raises(InputError, match=f"study figure_4c needs {path}.make, which cannot be imported"):
            make_outputs(dataclasses.replace(outputs, study=study))


def test_many_missing_runs_are_counted_not_listed(tmp_path):
    planned = [StudyRun("s", "fold", f"run {n}", {}, n, (), CONFIG, tmp_path / str(n)) for n in range(30)]
    assert {folders.status(run.folder) for run in planned} == {"missing"}
    with pytest.raises(MissingRunsError, match="and 18 more"):
        require_finished(planned, "make reproduce")


def test_only_the_default_profile_writes_the_reference_results():
    assert output_root("smoke") == output_root("default") / "smoke"
    assert output_root("default").name == "results"
