"""The benchmark: its measurements of a layer, and its evaluation of targets and growth."""

import dataclasses

import pandas as pd
import pytest
import torch

from experiments.benchmark import layers, measure, report, verdicts
from experiments.benchmark.layers import LAYERS, Contender, Place
from foldopt.errors import SolverError


def small(name, contenders, n, batch):
    layer = LAYERS[name]
    kept = {key: layer.contenders[key] for key in contenders}
    first = next(iter(layer.variants))
    return dataclasses.replace(layer, n=n, batch=batch, contenders=kept, variants={first: layer.variants[first]})


@pytest.fixture
def measured(monkeypatch):
    threads = torch.get_num_threads()

    def call(layer, **settings):
        monkeypatch.setitem(LAYERS, "tried", layer)
        chosen = {"factors": (1,), "many": 0, "rounds": 3, "budget": 5.0, **settings}
        return measure.measure(measure.Settings("tried", 1, **chosen))

    yield call
    torch.set_num_threads(threads)


def test_all_layers_name_what_is_ours_and_what_errors_are_relative_to():
    for name, layer in LAYERS.items():
        both = {layers.OURS, layers.REFERENCE}
        assert both & set(layer.contenders) == (both if name != "vertex" else {layers.OURS}), "a vertex has one solver"
    for target in verdicts.TARGETS:
        known = {*LAYERS[target.layer].contenders, measure.FLOOR, measure.NETWORK}
        assert {target.ours, *target.against} <= known | set(verdicts.CONES)


@pytest.mark.parametrize(
    ("name", "contenders"),
    [
        ("portfolio", ("fold", "direct", "gmres", "clarabel")),
        ("denoising", ("fold", "direct", "qpth")),
        ("bilinear", ("fold", "direct", "block")),
        ("qp", ("fold", "direct", "qpth", "cvxpylayers")),
    ],
)
def test_contenders_take_turns_and_agree(measured, name, contenders):
    rows = measured(small(name, contenders, 12, 3))
    beside = {measure.FLOOR} if name == "qp" else {measure.FLOOR, measure.NETWORK}
    assert set(rows["contender"]) == {*contenders, *beside}
    assert (rows.groupby("contender").size() == 3).all()
    assert (rows["seconds_backward"] > 0).all()
    exact = rows[rows["contender"].isin(["fold", "direct", "gmres", "block"])]
    assert (exact[["error_x", "error_vjp"]] < 1e-8).all(axis=None)
    assert (rows[["error_x", "error_vjp"]] < 1e-2).all(axis=None), rows


def test_the_vertex_is_that_of_gurobi_and_has_no_backward_pass(measured):
    rows = measured(small("vertex", ("fold", "gurobi"), 6, 4))
    own = rows[rows["contender"].isin(["fold", "gurobi"])]
    assert (own["error_x"] < 1e-6).all()
    assert (own["seconds_backward"] == 0).all()


def test_a_very_large_batch_is_for_who_is_fast(measured):
    layer = dataclasses.replace(small("portfolio", ("fold", "direct", "gmres"), 12, 3), fast=("fold", "gmres"))
    rows = measured(layer, many=40)
    for batch, who in ((3, {"fold", "direct", "gmres"}), (40, {"fold", "gmres"})):
        part = rows[rows["batch"] == batch]
        assert set(part["contender"]) == who | {measure.FLOOR, measure.NETWORK}
        assert (part["samples"] == batch).all()
        assert (part[["error_x", "error_vjp"]] < 1e-8).all(axis=None)


def test_growth_is_of_batch_and_of_n():
    places = LAYERS["portfolio"].places((1, 4))
    assert places == [Place("", 20, 32), Place("", 20, 128), Place("", 80, 32)]
    assert LAYERS["multilabel"].places((1, 4), 4096) == [
        Place("τ = 1", 100, 64),
        Place("τ = 0.05", 100, 64),
        Place("τ = 1", 100, 256),
        Place("τ = 1", 100, 4096),
    ], "its n is the number of classes"


def test_who_is_missing_too_slow_or_refuses_is_said(measured, monkeypatch):
    absent = Contender("absent", ("backend=fold",), needs=("no_such_package",))
    layer = small("bilinear", ("fold", "direct", "unfold"), 6, 4)
    layer = dataclasses.replace(layer, contenders={**layer.contenders, "absent": absent})

    def refuse(self, *_):
        raise SolverError("no answer")

    monkeypatch.setattr("experiments.backends.unfold.UnfoldBackend.__call__", refuse)
    rows = measured(layer, factors=(1, 4), limit=0.0)
    why = rows.dropna(subset=["why"]).groupby("contender")["why"].first()
    assert why["absent"] == "no_such_package is not installed"
    assert why["unfold"] == "no answer"
    grown = rows[rows["batch"] == 16]
    assert (grown.loc[grown["contender"] == "fold", "why"] == "would take more than 0 s").all()


def rows_of(device="cpu", **content):
    rows = []
    for (contender, variant), (forward, backward, error) in content["times"].items():
        row = {"layer": content["layer"], "device": device, "threads": 1, "variant": variant, "contender": contender}
        row |= {"n": content["n"], "batch": content["batch"], "samples": content["batch"], "peak_bytes": 0, "why": None}
        row |= {"seconds_forward": forward, "seconds_backward": backward, "error_x": error, "error_vjp": error}
        rows += [row, row]
    return pd.DataFrame(rows)


def test_a_target_is_judged_where_the_ratio_is_least_and_needs_the_accuracy():
    times = {
        ("fold", "λ = 2"): (1e-3, 1e-3, 0.0),
        ("qpth", "λ = 2"): (0.2, 0.1, 1e-6),
        ("fold", "λ = 1"): (1e-3, 1e-3, 0.0),
        ("qpth", "λ = 1"): (0.1, 0.12, 1e-6),
        ("lu", "λ = 2"): (0.0, 2e-4, 0.0),
        ("lu", "λ = 1"): (0.0, 1e-3, 0.0),
    }
    rows = rows_of(layer="denoising", n=100, batch=32, times=times)
    table = verdicts.medians(rows)
    assert table.set_index(["contender", "variant"]).loc[("qpth", "λ = 2"), "ratio"] == pytest.approx(150)
    judged = verdicts.judged(table, 1).set_index("against")
    assert judged.loc["qpth", "variant"] == "λ = 1"
    assert judged.loc["qpth", "measured"] == pytest.approx(110)
    assert judged.loc["qpth", "holds"]
    assert judged.loc["lu", "measured"] == pytest.approx(5), "where it is most"
    assert not judged.loc["lu", "holds"]

    rows.loc[rows["contender"] == "fold", ["error_x", "error_vjp"]] = 1e-3
    again = verdicts.judged(verdicts.medians(rows), 1).set_index("against")
    assert not again.loc["qpth", "holds"], "faster, less accurate"


def test_a_gpu_is_compared_with_all_cores_in_a_large_batch_and_at_the_studys():
    def at(batch, seconds, **where):
        times = {("fold", "τ = 1"): (seconds, 0.0, 1e-15), ("exact", "τ = 1"): (seconds / 2, 0.0, 0.0)}
        return rows_of(layer="multilabel", n=100, batch=batch, times=times, **where)

    one = [at(64, 64e-5), at(4096, 1.0)]
    both = [frame.assign(threads=2) for frame in (at(64, 32e-5), at(4096, 0.4096))]
    gpu = [at(batch, 4096e-6, device="cuda") for batch in (64, 4096)]
    found = verdicts.throughput(verdicts.medians(pd.concat([*one, *both, *gpu]))).set_index("contender")
    assert list(found.index) == ["fold", "exact"], "f-SQP was not measured"
    row = found.loc["fold"]
    assert (row["layer"], row["many"], row["error_x"]) == ("multilabel", 4096, 1e-15)
    assert row["cpu"] == pytest.approx(5e-6), "with all cores"
    assert row["cpu_many"] == pytest.approx(1e-4)
    assert row["cuda"] == pytest.approx(64e-6)
    assert row["cuda_many"] == pytest.approx(1e-6)
    refused = verdicts.throughput(verdicts.medians(pd.concat([*both[:1], *gpu])))
    assert refused["cpu_many"].isna().all(), "the CPU would take too long"


def test_growth_is_fitted_for_a_batch():
    places = [(20, 32, 1e-3), (20, 128, 4e-3), (80, 32, 16e-3)]
    rows = pd.concat(
        rows_of(layer="portfolio", n=n, batch=batch, times={("fold", ""): (seconds, 0.0, 0.0)})
        for n, batch, seconds in places
    )
    found = verdicts.exponents(verdicts.medians(rows))
    assert found == {("portfolio", "batch"): pytest.approx(1.0), ("portfolio", "n"): pytest.approx(2.0)}


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """The files and verdicts of `report.make` if every forward and every backward pass takes 1 ms."""

    def call(names, threads, gpu=None, without=()):
        def made(name, settings, *_, threads):
            assert threads == settings.threads
            assert name.endswith(f"-{settings.threads if settings.device == 'cpu' else settings.device}")
            layer = LAYERS[settings.layer]
            each = [who for who in [*layer.contenders, measure.FLOOR] if who not in without]
            times = {(who, variant): (1e-3, 1e-3, 0.0) for who in each for variant in layer.variants}
            rows = rows_of(layer=settings.layer, n=layer.n, batch=layer.batch, times=times)
            many = rows[rows["contender"].isin(layer.fast)].assign(batch=settings.many, samples=settings.many)
            return pd.concat([rows, many]).drop(columns=["layer", "device", "threads"])

        monkeypatch.setattr(report, "measured_once", made)
        monkeypatch.setattr(report, "output_root", lambda profile: tmp_path)
        _, judged = report.make("smoke", names, threads, "make bench PROFILE=smoke", gpu)
        return tmp_path, judged

    return call


def test_tables_json_and_figure_are_written(reported, drawings):
    path, judged = reported(list(LAYERS), [1, 3])
    assert len(judged) == len(verdicts.TARGETS) - 3, "no network was measured"
    text = (path / "bench/targets.md").read_text()
    assert "| One thread | 3 threads |" in text
    assert "| 100× | **1×** (λ = 2) | **1×** (λ = 2) |" in text
    assert "| ≤ 3× | 1× | 1× |" in text
    assert "Made by: `make bench PROFILE=smoke`" in text
    assert "qpth" in (path / "bench/layers.md").read_text()
    assert "0.00 | – |" in (path / "bench/growth.md").read_text(), "batches take the same time"
    assert '"cores"' in (path / "bench/bench.json").read_text()
    assert (path / "figures/bench.png").read_bytes().startswith(b"\x89PNG")
    panels = [panel for panel in drawings["bench"].axes if panel.axison]
    for panel, layer in zip(panels, LAYERS.values(), strict=True):
        assert panel.get_title(loc="right").startswith(layer.title)
        bars = len(layer.contenders) + 1  # plus the batched LU
        assert [bar.get_width() for bar in panel.patches] == [pytest.approx(2e3 / layer.batch)] * bars
    assert not list(path.glob("bench/cuda*"))


def test_a_gpu_has_tables_of_its_own(reported):
    path, _ = reported(list(LAYERS), [1, 3], "a GPU")
    for name in ("targets", "layers", "growth"):
        assert "GPU" not in (path / f"bench/{name}.md").read_text()
    text = (path / "bench/cuda.md").read_text()
    assert "| QPLayer | 31.2 | 31.2 | 15.6 | 15.6 | **1×** | **2×** |" in text
    assert "a GPU, and 3 threads of" in text
    assert "qpth" in (path / "bench/cuda_layers.md").read_text()
    assert '"gpu": "a GPU"' in (path / "bench/cuda.json").read_text()


def test_a_layer_without_peers_is_measured_and_not_judged(reported):
    path, judged = reported(["vertex"], [1], without=("gurobi",))
    assert judged.empty
    assert "enumeration" in (path / "bench/layers.md").read_text()
