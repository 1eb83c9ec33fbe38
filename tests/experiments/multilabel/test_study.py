"""Multilabel classification in the harness: network, images, backends, a run, and its figures."""

import json

import pandas as pd
import pytest
import torch

from experiments.models.densenet import DenseNet
from experiments.multilabel.figures import figure_3, figure_7, stand_in_images
from experiments.multilabel.tables import accuracy as multilabel_accuracy
from experiments.multilabel.tables import layer_share
from experiments.multilabel.tables import layers as topk_layers
from experiments.multilabel.task import PADDING, shifted_and_mirrored
from experiments.report.artifacts import Artifacts
from experiments.report.outputs import StudyOutputs
from experiments.run import components, configuration, folders
from experiments.run.components import CombinationError
from experiments.run.execution import execute
from experiments.sweep import studies
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError

TRAINING = ["task=multilabel", "model=densenet", "optimizer=sgd", "train.lr=0.1", "task.data=stand_in"]
NETWORK = ["model.depth=10", "model.growth=4"]
SMALL = [*TRAINING, *NETWORK, "task.n_train=8", "task.n_val=4", "task.n_test=4"]


def built(*overrides):
    torch.manual_seed(0)
    return components.build(configuration.compose([*SMALL, *overrides]))


def network(depth=10, growth=4, perturbation=0.0, compile=False):
    torch.manual_seed(0)
    return DenseNet(3, 100, depth, growth, True, compile, perturbation)


@pytest.mark.parametrize(("depth", "growth", "count"), [(40, 40, 1_941_620), (22, 12, 77_986)])
def test_the_networks_of_the_paper_and_of_its_code_have_their_parameters(depth, growth, count):
    assert sum(p.numel() for p in network(depth, growth).parameters()) == count


def test_the_network_takes_images_of_any_side_divisible_by_4():
    model = network()
    for side in (32, 8):
        assert model(torch.randn(2, 3, side, side)).shape == (2, 100)
    assert model(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def test_a_perturbation_is_small_and_the_same_each_time():
    plain, a, b = network(), network(perturbation=1e-6), network(perturbation=1e-6)
    for p, q, r in zip(plain.parameters(), a.parameters(), b.parameters(), strict=True):
        assert torch.equal(q, r)
        assert float((p - q).detach().abs().max()) <= 1e-5 * float(p.detach().abs().max())
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), a.parameters(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["model.depth=11"], "model.depth=11: a DenseNet-BC has a depth of 4"),
        (["model.depth=4"], "model.depth=4"),
        (["model.growth=0"], "model.growth=0"),
        (["task.temperature=0"], "temperature=0"),
        (["task.k=100"], "k=100 leaves no choice"),
        (["task.data=mnist"], "data='mnist' is unknown"),
        (["task.noise=2"], "noise=2"),
        (["backend=fold", "backend.optimizer=fdpg"], r"choose auto or one of \['pgd', 'pgd_a', 'pgd_b', 'sqp'\]"),
        (["backend=fold", "backend.forward=gurobi"], r"choose one of \['exact', 'cvxpy'\]"),
        (["+optimizer.speed=3"], "optimizer=sgd: got an unexpected keyword argument 'speed'"),
    ],
)
def test_mistakes_are_named(tiny, console, overrides, match):
    if overrides[0].startswith("+optimizer"):
        assert execute(tiny(*SMALL, *overrides), console) == 1
        assert match in console.file.getvalue()
        return
    with pytest.raises(InputError, match=match):
        built(*overrides)


def test_backends_that_cannot_are_named():
    with pytest.raises(
        CombinationError, match=r"qpth can do the projection.*cvxpylayers, exact, fold, two_stage, unfold"
    ):
        built("backend=qpth")


def test_images_are_normalized_and_shifted_and_mirrored_whole():
    task = built().task
    images = task.splits["train"]["inputs"]
    prepared = task.prepare(images, None)
    assert prepared.mean((0, 2, 3)).abs().max() < 1e-4
    assert float(prepared.std((0, 2, 3)).mean()) == pytest.approx(1, abs=1e-3)
    a, b = (task.prepare(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, prepared)

    gradient = torch.arange(1, 33, dtype=torch.uint8).view(1, 1, 1, 32).expand(64, 1, 32, 32)
    moved = shifted_and_mirrored(gradient, torch.Generator().manual_seed(0))
    mirrored = moved[:, 0, 16, 20] < moved[:, 0, 16, 10]
    assert 16 < int(mirrored.sum()) < 48
    shifts = moved[:, 0, 16, 16][~mirrored].long() - 17
    assert set(shifts.tolist()) <= set(range(-PADDING, PADDING + 1))
    assert len(set(shifts.tolist())) > 4
    assert bool((moved[:, 0, :PADDING].amax((1, 2)) > 0).any())
    assert bool((moved[:, 0, 0].amax(1) == 0).any()), "black comes in where the image is shifted away"


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        (["backend=fold"], 1e-10),
        (["backend=fold", "backend.optimizer=sqp"], 1e-10),
        (["backend=fold", "backend.forward=cvxpy"], 1e-3),
        (["backend=fold", "backend.optimizer=sqp", "backend.forward=cvxpy"], 1e-3),
        (["backend=cvxpylayers"], 1e-2),
    ],
    ids=["pgd", "sqp", "pgd-cvxpy", "sqp-cvxpy", "cvxpylayers"],
)
def test_every_backend_has_the_exact_gradient(backend, tolerance, temperature):
    parts = built(*backend, f"task.temperature={temperature}")
    samples = parts.task.splits["train"]
    outputs = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    outputs[:, 3] += 4
    leaf = outputs.requires_grad_()
    losses = parts.task.decision_losses(parts.backend(parts.task.parameters(leaf, samples)), samples)
    (gradient,) = torch.autograd.grad(losses.mean(), leaf)
    exact = parts.task.exact_gradient(outputs, samples)
    assert float((gradient - exact).norm() / exact.norm()) < max(tolerance, 1e-6)  # the features are float32
    assert parts.backend.take_failures() == 0
    assert temperature == 1 or parts.task.metrics(outputs.detach(), samples)["bound_fraction"] > 0.5


def test_without_a_bound_the_loss_is_the_cross_entropy():
    """At the authors' temperature 1 the layer is therefore equivalent to a softmax."""
    task = built().task
    samples = task.splits["train"]
    outputs = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    losses = task.decision_losses(task.problem.closed_form(task.parameters(outputs, samples)), samples)
    expected = task.prediction_losses(outputs, samples) - torch.tensor(5.0).log()
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    assert task.metrics(outputs, samples)["bound_fraction"] == 0


def test_unfolding_that_diverges_is_counted():
    parts = built("backend=unfold", "task.temperature=0.05")
    leaf = torch.randn(8, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    samples = parts.task.splits["train"]
    losses = parts.task.decision_losses(parts.backend(parts.task.parameters(leaf, samples)), samples)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert parts.backend.take_failures() == 8
    assert float(gradient.abs().max()) == 0


def test_accuracies_count_hits():
    task = built("task.temperature=null").task
    labels = torch.tensor([0, 1, 2, 3])
    outputs = torch.arange(100.0, 0, -1).repeat(4, 1)  # 0 is the largest, 1 the second, ...
    outputs[3, 3] = -1
    found = task.metrics(outputs, {"labels": labels})
    assert (found["top1"], found["top5"]) == (25.0, 75.0)
    assert found["bound_fraction"] == 1


@pytest.mark.parametrize("backend", ["exact", "fold", "two_stage"])
def test_a_run_learns_and_says_how_exact_its_gradients_were(tiny, console, backend):
    cfg = tiny(*TRAINING, *NETWORK, "task.n_train=256", "task.n_test=64", f"backend={backend}", "train.epochs=4")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    train = frame[frame["split"] == "train"]
    assert train["loss"].iloc[-1] < train["loss"].iloc[0]
    assert train["top5"].iloc[-1] > 5
    assert ((train["top1"] >= 0) & (train["top1"] <= train["top5"])).all()
    if backend == "two_stage":
        assert train["gradient_error"].isna().all()
    else:
        assert (train["gradient_error_max"] < 1e-6).all()
        assert (train["gradient_error"] <= train["gradient_error_max"]).all()
    final = folders.load_summary(folders.of(cfg))["final"]
    validation = frame[(frame["split"] == "val") & (frame["epoch"] > 0)]
    assert final["test_at_best_val"]["epoch"] == validation.loc[validation["top5"].idxmax(), "epoch"]
    assert "top5" in console.file.getvalue()


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("cifar", [True, False])
def test_the_profile_follows_hardware_and_data(monkeypatch, cuda, cifar):
    needs = {"cuda": (lambda: cuda, "a CUDA GPU"), "cifar100": (lambda: cifar, "CIFAR-100 in data/cache")}
    monkeypatch.setattr(studies, "NEEDS", needs)
    profile, why = studies.profile_at_hand(studies.load("figure_7"))
    assert profile == ("paper" if cuda and cifar else "default")
    assert why.startswith(f"profile {profile}, {'with ' if cuda and cifar else 'without '}")
    assert ("a CUDA GPU" in why) == (cuda == cifar or not cuda)
    assert studies.profile_at_hand(studies.load("figure_4a")) == ("default", None)


@pytest.fixture
def planned(tmp_path):
    """Two seeds of each series at two temperatures; accuracies rise by 1 per epoch, and by 1.5 for "perturbed"."""
    study, made = studies.load("figure_7"), []
    for run in studies.expand(study, "smoke"):
        folder = tmp_path / "runs" / run.folder.name
        folder.mkdir(parents=True)
        gain = 1.5 if run.series == "perturbed" else 1.0
        error = {"cvxpylayers": 1e-5, "sqp": 2e-5, "pgd": 1e-6}.get(run.series, 0.0)
        rows = [
            {
                "epoch": epoch,
                "split": split,
                "top1": gain * epoch,
                "top5": 10 + gain * epoch + run.seed,
                **(
                    {"gradient_error": error, "gradient_error_max": 2 * error, "solver_failures": 0, "samples": 128}
                    | {name: 0.5 for name in multilabel_accuracy.SECONDS}
                    if split == "train"
                    else {}
                ),
            }
            for epoch in range(3)
            for split in (("val", "test") if epoch == 0 else ("train", "val", "test"))
        ]
        pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
        (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
        made.append(StudyRun(run.study, run.series, run.label, run.point, run.seed, run.overrides, run.config, folder))
    return study, made


@pytest.mark.slow
def test_the_figure_shows_the_noise_floor_and_its_files_say_stand_in(planned, tmp_path, drawings):
    study, made = planned
    artifacts = Artifacts(tmp_path / "out")
    for maker in (figure_7.make, multilabel_accuracy.make, stand_in_images.make):
        maker(StudyOutputs(study, made, "default", artifacts))
    curves = pd.read_csv(tmp_path / "out/figures/figure_7_stand_in.csv")
    last = curves[(curves["epoch"] == 2) & (curves["accuracy"] == "top5") & (curves["series"] == "sqp")]
    assert last["mean"].tolist() == [12.5] * 6, "mean of the seeds, for two temperatures and three splits"
    text = (tmp_path / "out/tables/figure_7_stand_in.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert [line.split("|")[2].strip() for line in rows] == [
        study.titles[run] for run in study.profiles["smoke"].series
    ]
    perturbed = next(line for line in rows if "perturbed" in line).split("|")
    assert perturbed[5].strip() == "1.0", "2 epochs at 0.5 more"
    assert "Stand-in images, not CIFAR-100" in text
    for name in ("figure_7_stand_in", "multilabel_gradients_stand_in", "stand_in_images"):
        assert (tmp_path / f"out/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    shown = [series for series in study.profiles["smoke"].series if series in figure_7.LINES]
    top5 = [panel for panel in drawings["figure_7_stand_in"].axes if panel.get_title().startswith("Top-5")]
    assert len(top5) == 4, "two temperatures, training and test"
    for panel in top5:
        lines = {line.get_label(): line for line in panel.lines}
        assert list(lines) == ["exact forward and backward", *(f"{study.titles[s]}, cvxpy forward" for s in shown)]
        assert lines[f"{study.titles['sqp']}, cvxpy forward"].get_ydata()[-1] == 12.5
        assert len(panel.collections) == 1 + len(shown), "the noise floor, and a band for each"
    for panel in drawings["multilabel_gradients_stand_in"].axes:
        assert [line.get_label() for line in panel.lines] == [study.titles[series] for series in shown]
    pictures = [panel.images[0].get_array() for panel in drawings["stand_in_images"].axes]
    assert len({picture.tobytes() for picture in pictures}) == 100, "one of each class"


def test_the_floor_is_the_largest_distance_so_far():
    rows = [
        {"series": series, "temperature": 1.0, "split": "test", "epoch": epoch, "seed": seed, "top1": value, "top5": 2}
        for seed, series, values in (
            (0, "exact", [1, 5]),
            (0, "perturbed", [4, 5]),
            (1, "exact", [2, 6]),
            (1, "perturbed", [2, 5]),
        )
        for epoch, value in enumerate(values, 1)
    ]
    floor = figure_7.noise_floor(pd.DataFrame(rows))
    top1 = floor[floor["accuracy"] == "top1"]
    assert (top1["high"] - top1["mean"]).tolist() == [3, 3]
    assert top1["mean"].tolist() == [2.25, 5.25]


def test_figure_3_converges_as_theorem_1_says(tmp_path):
    settings = figure_3.Settings(instances=3, iterations=40)
    rows = figure_3.measure(settings)
    forward = rows[(rows["start"] == "solution") & (rows["pass"] == "forward")]
    assert forward["error"].max() < 1e-14
    backward = rows[(rows["start"] == "solution") & (rows["pass"] == "backward")]
    for _, trace in backward.groupby("instance"):
        ratio = (trace["error"].iloc[35] / trace["error"].iloc[25]) ** 0.1
        assert ratio == pytest.approx(trace["rho"].iloc[0], rel=0.15)
    afar = rows[(rows["start"] == "random") & (rows["pass"] == "backward")]
    assert afar["error"].iloc[-1] < 1e-6
    assert (afar.groupby("iteration")["error"].median() >= backward.groupby("iteration")["error"].median()).all()


def test_measurements_of_the_layers_and_of_their_share(tmp_path, monkeypatch):
    monkeypatch.setattr(topk_layers, "LAYERS", {k: topk_layers.LAYERS[k] for k in ("exact", "fold_exact", "sqp")})
    rows = topk_layers.measure(topk_layers.Settings((1.0, 0.05), repeats=1, batch_size=4))
    assert rows["error_gradient"].max() < 1e-3
    assert rows.groupby("temperature")["at_bound"].first().to_dict() == {0.05: 1.0, 1.0: 0.0}
    monkeypatch.setattr(layer_share, "LAYERS", {"exact": layer_share.LAYERS["exact"]})
    share = layer_share.measure(layer_share.PROFILES["smoke"])
    assert (share[["seconds_network", "seconds_layer"]] > 0).all(axis=None)


def test_a_layer_that_refuses_is_shown_as_such(monkeypatch, tmp_path):
    overrides = ["backend=fold", "backend.optimizer=sqp", "backend.tol=1e-30", "backend.on_failure=raise"]
    layers = {"exact": topk_layers.LAYERS["exact"], "sqp": ("refusing", overrides)}
    monkeypatch.setattr(topk_layers, "LAYERS", layers)
    rows = topk_layers.measure(topk_layers.Settings((1.0,), repeats=1, batch_size=4))
    table = rows.groupby(["temperature", "layer"], sort=False).median().reset_index()
    assert list(topk_layers._rows(table))[1] == ["1", "refusing", "–", "–", "–", "–", "100%"]
