"""Measurements of the denoiser's layers, and their tables and figures."""

import pandas as pd
import pytest
import torch

from experiments.denoising.bench import Bench, Settings
from experiments.denoising.figures import figure_6, unrolling_cost
from experiments.denoising.tables import cost as denoising_cost
from experiments.report import measurements
from experiments.report.artifacts import Artifacts
from experiments.report.outputs import Measurement
from experiments.sweep.studies import load
from foldopt.errors import InputError

pytestmark = pytest.mark.slow

PLACE = ["task=denoising", "model=operator", "task.length=30", "task.weight=0.7", "task.low=-3", "task.high=3"]
SMALL = [*PLACE, "task.noise=1", "task.n_train=64", "task.n_val=16", "task.n_test=16", "backend=fold"]


@pytest.fixture(scope="module")
def bench():
    return Bench(SMALL, Settings("smoke", batch_size=8))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fold", 1e-15),
        ("fold_warm", 1e-13),
        ("fold_fdpg", 1e-5),
        ("unroll", 1e-3),
        ("qpth", 1e-4),
        ("cvxpylayers", 1e-2),
    ],
)
def test_every_backend_is_measured_on_the_same_batch(bench, name, error):
    exact = bench.call(bench.layer("fold"))[:2]
    x, gradient, forward, backward = bench.call(bench.layer(name))
    found = bench.errors(x, gradient, exact)
    assert found["error_x"] < error
    assert found["error_gradient"] < 100 * error
    assert forward > 0
    assert backward > 0


def test_errors_are_relative_to_the_exact_layer(bench):
    x, g = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    found = bench.errors(x + torch.tensor([[0.0, 0.0], [0.0, 0.5]]), g + torch.tensor([0.0, 0.1]), (x, g))
    assert found == {"error_x": pytest.approx(0.25), "error_gradient": pytest.approx(0.1)}


def test_ratios_are_to_folding_around_the_exact_solver():
    times = {"fold": (1.0, 1.0), "qpth": (70.0, 30.0)}
    rows = [
        {"reading": "centred", "weight": 1.0, "backend": name, "seconds_forward": f * k, "seconds_backward": b * k}
        for name, (f, b) in times.items()
        for k in (1.0, 1.0, 5.0)
    ]
    table = denoising_cost.summarize(pd.DataFrame(rows)).set_index("backend")
    assert table.loc["fold", "ratio"] == 1
    assert table.loc["qpth", "ratio"] == 50, "the median leaves the slow repetition out"


def test_peak_memory_of_tensors_that_are_gone_again():
    total, peak = measurements.peak_memory(lambda: float(torch.ones(4_000_000, dtype=torch.float64).sum()))
    assert total == 4e6
    assert 31e6 < peak < 40e6


def test_memory_without_a_meter_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(measurements, "CLEAR", tmp_path / "missing")
    with pytest.raises(measurements.FoldoptError, match="measure on Linux"):
        measurements.peak_memory(lambda: None)


def note(settings: Settings) -> pd.DataFrame:
    return pd.DataFrame({"repeats": [settings.repeats], "threads": [torch.get_num_threads()]})


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(measurements, "RESULTS", tmp_path)
    settings = Settings("smoke", repeats=3)
    found = measurements.measured_once("denoising/cost", settings, note)
    assert found.to_dict("records") == [{"repeats": 3, "threads": 1}]
    (path,) = tmp_path.glob("runs/denoising/cost-*/measurements.csv")
    path.write_text("repeats\n7\n")
    assert measurements.measured_once("denoising/cost", settings, note)["repeats"].tolist() == [7]
    assert measurements.measured_once("denoising/cost", settings, note, "other")["repeats"].tolist() == [3]


def test_the_figure_of_unrolling(bench):
    columns = ["seconds_forward", "seconds_backward", "peak_bytes", "error_x", "error_gradient"]
    rows = [[0, 0.01, 0.01, 1e6, 0, 0], [10, 0.1, 0.1, 1e7, 1e-1, 1e-1], [100, 1, 1, 1e8, 1e-3, 1e-3]]
    figure = unrolling_cost.draw(pd.DataFrame(rows, columns=["iterations", *columns]), "caption")
    time, memory, error = figure.axes
    assert time.get_lines()[0].get_ydata().tolist() == [200, 2000]
    assert set(time.get_lines()[1].get_ydata()) == {20}
    assert memory.get_lines()[0].get_ydata().tolist() == [10, 100]
    assert len(error.get_lines()) == 2


def test_figure_6_has_a_panel_per_weight_and_two_curves_in_each():
    rows = [(s, w, e, 1.0, 0.9, 1.1) for s in ("fold", "qpth") for w in (1, 2, 4) for e in (0, 1)]
    curves = pd.DataFrame(rows, columns=["series", "weight", "epoch", "mean", "low", "high"])
    figure = figure_6.draw(load("figure_6"), curves, "caption")
    assert [len(panel.get_lines()) for panel in figure.axes] == [2, 2, 2]


@pytest.mark.parametrize("module", [denoising_cost, unrolling_cost])
def test_an_unknown_profile_is_refused(module, tmp_path):
    with pytest.raises(InputError, match="choose one of smoke, default, paper"):
        module.make(Measurement("denoising-cost", "huge", Artifacts(tmp_path)))
