"""task=portfolio on a file of returns: the runs of the backends, and that a changed file is another run."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from experiments.portfolio.task import PortfolioTask
from experiments.run import configuration, folders
from experiments.run.components import build, trained
from experiments.run.execution import execute
from foldopt.errors import InputError

NAMES = ("north", "east", "south", "west", "up", "down", "left", "right")


def returns(rows=240, noise=0.005):
    """Returns of eight assets that follow the wind and the rain of the day before, each in its own proportion."""
    draw = np.random.default_rng(0)
    strength, signals = draw.uniform(-0.01, 0.02, (2, 8)), draw.normal(size=(rows, 2))
    moved = 0.001 + np.roll(signals, 1, 0) @ strength + noise * draw.normal(size=(rows, 8))
    dates = pd.date_range("2020-01-01", periods=rows, freq="D").strftime("%Y-%m-%d")
    columns = dict(zip((*NAMES, "wind", "rain"), np.hstack([moved, signals]).T, strict=True))
    return pd.DataFrame({"date": dates, **columns})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "returns.csv"
    returns().to_csv(path, index=False)
    return path


@pytest.fixture
def on_file(file, tmp_path):
    """Compose a run of seconds on the file."""

    def compose(*overrides):
        base = [f"task.csv={file}", "task.features=[wind,rain]", "task.lags=0", f"paths.runs={tmp_path / 'runs'}"]
        fixed = ["tracking.mode=disabled", "progress=false", "device=cpu", "train.batch_size=8"]
        return configuration.compose([*base, *fixed, *overrides])

    return compose


def test_keys_have_the_same_defaults_in_the_configuration_in_the_class_and_in_the_identity():
    configured = OmegaConf.to_container(configuration.compose([]).task, resolve=True)
    optional = {
        f"task.{name}": parameter.default
        for name, parameter in inspect.signature(PortfolioTask).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert optional == {key: value for key, value in folders.ADDED.items() if key.startswith("task.")}
    for key, value in optional.items():
        assert configured[key.removeprefix("task.")] == value


def test_a_run_on_generated_data_keeps_the_identity_it_had_before_files():
    cfg = configuration.compose(["task=portfolio", "backend=two_stage"])
    kept = ("_target_", "name", "degree", "n_train", "n_val", "n_test", "n_assets", "n_features", "tau", "standardize")
    older = OmegaConf.create({**cfg, "task": {key: cfg.task[key] for key in kept}})
    assert folders.identity(older) == folders.identity(cfg)
    assert build(older).task.n_inputs == 5


def test_the_identity_follows_the_content_of_the_file(on_file, file):
    first, text = folders.identity(on_file()), file.read_text()
    file.write_text(text[:-2] + "\n")  # one digit less
    assert folders.identity(on_file()) != first
    file.write_text(text)
    assert folders.identity(on_file()) == first
    for other in ("task.folds=2", "task.risk=2", "task.lags=1", "task.returns=[north,east]", "task.val_share=0.2"):
        assert folders.identity(on_file(other)) != first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.csv=gone.csv"], "task.csv='gone.csv' cannot be read"),
        (["task.csv=5"], "task.csv=5: expected text or null"),
        (["task.features=[noise]"], "no column 'noise' (task.features)"),
        (["task.lags=1.5"], "task.lags=1.5: expected a whole number"),
        (["task.fold=1"], "task.fold=1: with task.folds=1 it is at most 0"),
        (["task.csv=null", "task.folds=2"], "task.folds=2: only the data of a file have folds"),
        (["task.digest=abc"], "restore the file"),
        (["task.val_share=0.69"], "too few for fold 0"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(on_file, console, tmp_path, overrides, message):
    assert execute(on_file(*overrides), console) == 1
    assert message in console.file.getvalue()
    assert "Traceback" not in console.file.getvalue()
    assert not (tmp_path / "runs").exists()


def test_a_risk_limit_below_every_portfolio_is_named(on_file, console):
    pytest.importorskip("sklearn")
    assert execute(on_file("task.risk=0.01"), console) == 1
    said = console.file.getvalue()
    assert "task.risk=0.01" in said
    assert "times the variance of equal weights" in said


def test_the_problem_and_the_samples_are_those_of_the_file(on_file):
    pytest.importorskip("sklearn")
    parts = build(on_file("task.folds=2", "task.fold=1", "task.risk=1.5", "task.returns=[west,north]"))
    task, table = parts.task, returns()
    assert (task.n_inputs, task.n_outputs) == (2, 2)
    assert [len(task.splits[name]["returns"]) for name in ("train", "val", "test")] == [167, 36, 36]
    truth = table[["west", "north"]].to_numpy()
    assert np.array_equal(task.splits["test"]["returns"].numpy(), truth[-36:])
    assert np.array_equal(task.splits["val"]["returns"].numpy(), truth[-72:-36])
    equal = torch.full((1, 2), 0.5, dtype=torch.float64)
    assert float(equal @ task.problem.V @ equal.T) == pytest.approx(task.problem.gamma / 1.5)
    short = (task.splits["test"]["optimal"][:, None] - task.splits["test"]["returns"]).amin(1)
    assert (short < 1e-12).all(), "hindsight is at most the better asset"


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["fold", "two_stage", "cvxpylayers", "spo_plus", "unroll", "unfold", "cvxpy", "pyepo"]
)
def test_a_backend_learns_from_the_file(on_file, console, backend):
    """On days that are later than all training, where the untrained model loses almost all of the value."""
    pytest.importorskip("sklearn")
    if backend in ("spo_plus", "pyepo"):
        pytest.importorskip("pyepo")
    cfg = on_file(f"backend={backend}", "train.epochs=4", "model=linear", "train.lr=0.03")
    assert execute(cfg, console) == 0, console.file.getvalue()
    frame = folders.load_metrics(folders.of(cfg))
    regret = frame[frame["split"] == "test"]["regret_percent"].to_numpy()
    assert regret[-1] < 0.5 * regret[0]
    assert (frame[frame["split"] == "train"]["solver_failures"] == 0).all()


@pytest.mark.slow
def test_a_finished_run_is_not_reused_when_the_file_changes(on_file, console, file):
    pytest.importorskip("sklearn")
    settings = "backend=two_stage", "train.epochs=1"
    first = on_file(*settings)
    assert execute(first, console) == 0
    assert execute(on_file(*settings), console) == 0
    assert "Nothing to do" in console.file.getvalue()
    text = file.read_text()
    returns(noise=0.01).to_csv(file, index=False)
    second = on_file(*settings)
    assert folders.status(folders.of(second)) == "missing"
    with pytest.raises(InputError, match="has changed since this run was configured"):
        trained(folders.of(first))
    assert execute(second, console) == 0
    assert folders.of(second) != folders.of(first)
    assert all(folders.status(folders.of(cfg)) == "finished" for cfg in (first, second))
    file.write_text(text)
    assert trained(folders.of(first)).task.n_outputs == 8
    assert folders.load_summary(folders.of(first))["identity"] == folders.identity(on_file(*settings))


@pytest.mark.slow
def test_a_file_that_changes_during_the_run_leaves_its_folder_whole(on_file, console, file, monkeypatch):
    pytest.importorskip("sklearn")
    cfg = on_file("backend=two_stage", "train.epochs=1")
    folder, write = folders.of(cfg), folders.write_atomically

    def change_and_write(path, content):
        returns(noise=0.02).to_csv(file, index=False)
        write(path, content)

    monkeypatch.setattr(folders, "write_atomically", change_and_write)
    assert execute(cfg, console) == 0
    assert folders.of(cfg) == folder
    assert folder.name.endswith(folders.load_summary(folder)["identity"][:12])
