"""Whole runs, small: what they leave behind, and that a stop of any kind changes nothing."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.run import folders
from experiments.run.checkpoint import Checkpoint
from experiments.run.execution import execute
from experiments.run.interruption import BUSY, StopRequest
from experiments.run.settings import resolve_device
from experiments.run.trainer import Trainer
from foldopt.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
LONG = ["train.epochs=60", "train.schedule=cosine", "model=mlp_bn", "train.mse_epochs=2"]


def test_a_run_leaves_metrics_summary_config_and_log(tiny, console, untimed):
    cfg = tiny()
    assert execute(cfg, console) == 0
    folder = folders.of(cfg)
    frame = folders.load_metrics(folder)
    assert tuple(frame.columns) == (*folders.COLUMNS, "regret", "regret_percent", "mse")
    assert list(zip(frame["epoch"], frame["split"], strict=True)) == [
        (epoch, split) for epoch in range(4) for split in (["train"] if epoch else []) + ["val", "test"]
    ]
    test, train = frame[frame["split"] == "test"], frame[frame["split"] == "train"]
    assert test["regret_percent"].iloc[-1] < test["regret_percent"].iloc[0]
    assert (test["regret"] >= 0).all()
    assert (train[["seconds_network", "seconds_solve", "seconds_backward"]].sum(1) <= train["seconds_epoch"]).all()
    assert (train[["seconds_network", "seconds_solve", "seconds_backward"]] > 0).all(axis=None)
    assert train["zero_gradient_fraction"].between(0, 1).all()
    assert (train["solver_failures"] == 0).all()
    summary = folders.load_summary(folder)
    assert summary["status"] == "finished"
    assert summary["final"]["test"]["regret"] == pytest.approx(test["regret"].iloc[-1])
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "epoch 3/3" in (folder / "log.txt").read_text()
    assert "epoch 3/3" in console.file.getvalue()
    assert (folder / "config.yaml").is_file()

    assert execute(cfg, console) == 0
    assert "Nothing to do: this run is finished" in console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", ["mlp", "mlp_bn"])
def test_the_same_configuration_gives_the_same_numbers(tiny, console, untimed, tmp_path, model, threads):
    """Bit by bit, with either number of threads."""
    frames = []
    for name in "ab":
        cfg = tiny(f"paths.runs={tmp_path / name}", f"threads={threads}", f"model={model}")
        assert execute(cfg, console) == 0
        frames.append(untimed(folders.of(cfg)))
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_deterministic_algorithms_are_chosen_for_one_run(tiny, console):
    """On the CPU; all operations of the study have one."""
    for overrides, wanted in (("deterministic=true", True), ("seed=1", False)):
        assert execute(tiny("train.epochs=1", overrides), console) == 0
        assert torch.are_deterministic_algorithms_enabled() is wanted


def test_two_stage_trains_on_the_predictions_and_solves_nothing(tiny, console):
    cfg = tiny("backend=two_stage")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    train, test = frame[frame["split"] == "train"], frame[frame["split"] == "test"]
    assert (train["seconds_solve"] == 0).all()
    assert test["mse"].iloc[-1] < test["mse"].iloc[0]
    assert test["regret"].notna().all()


def test_a_warm_start_is_two_stage_training_first(tiny, console, untimed):
    warm, two_stage = tiny("train.mse_epochs=2"), tiny("backend=two_stage")
    for cfg in (warm, two_stage):
        assert execute(cfg, console) == 0
    a, b = (untimed(folders.of(cfg)) for cfg in (warm, two_stage))
    until = a["epoch"] <= 2
    pd.testing.assert_frame_equal(a.loc[until, ["regret", "mse"]], b.loc[until, ["regret", "mse"]], check_exact=True)
    assert not a.loc[a["epoch"] == 3, "regret"].equals(b.loc[b["epoch"] == 3, "regret"])


def command(tmp_path, name):
    overrides = ["task.n_train=64", "task.n_val=16", "task.n_test=32", "tracking.mode=disabled", "device=cpu", *LONG]
    return [sys.executable, str(ROOT / "run.py"), *overrides, f"paths.runs={tmp_path / name}"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(path, "runs"), check=True, capture_output=True)
    return next((path / "runs").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_the_numbers_of_one_never_stopped(tmp_path, uninterrupted, untimed, number, code):
    process = subprocess.Popen(command(tmp_path, "runs"), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while (
        not (found := list(tmp_path.glob("runs/*/*/checkpoint.pt"))) or len(folders.load_metrics(found[0].parent)) < 9
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    folder = found[0].parent
    assert process.returncode == code
    assert folders.status(folder) == "interrupted"
    assert number == signal.SIGKILL or "Interrupted; the same command goes on" in output
    assert folders.load_metrics(folder)["epoch"].max() < 60

    again = subprocess.run(command(tmp_path, "runs"), check=True, capture_output=True, text=True)
    assert "resumed after epoch" in (folder / "log.txt").read_text()
    assert "epoch 60/60" in again.stdout
    pd.testing.assert_frame_equal(untimed(folder), untimed(uninterrupted), check_exact=True)


@pytest.mark.parametrize(("size", "visited"), [(1, 64), (9, 63), (64, 64)])
def test_batches_of_every_size_train(tiny, console, size, visited):
    """Only a last sample alone, which batch normalization cannot take, is left out of its epoch."""
    cfg = tiny("backend=two_stage", "train.epochs=1", f"train.batch_size={size}")
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    assert frame.loc[frame["split"] == "train", "samples"].tolist() == [visited]


def test_rows_written_after_the_last_checkpoint_are_dropped(tmp_path):
    model = torch.nn.Linear(2, 1)
    checkpoint = Checkpoint(tmp_path, ("regret",), model=model)
    for epoch in range(3):
        checkpoint.save(epoch, float(epoch), [{"epoch": epoch, "split": "test", "regret": epoch}])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,test,,9\n4,te")
    model.reset_parameters()
    assert checkpoint.restore(torch.device("cpu")) == (2, 2.0, None)
    assert folders.load_metrics(tmp_path)["epoch"].tolist() == [0, 1, 2]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_without_a_checkpoint_a_run_starts_over(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,split\n0,test\n")
    assert Checkpoint(tmp_path).restore(torch.device("cpu")) == (-1, 0.0, None)
    assert not (tmp_path / "metrics.csv").exists()


def test_diverged_training_stops_with_the_remedy_and_keeps_what_it_has(tiny, console):
    cfg = tiny("train.lr=1e30")
    assert execute(cfg, console) == 1
    folder = folders.of(cfg)
    assert "training diverged" in console.file.getvalue()
    assert "Lower train.lr=1e+30" in console.file.getvalue()
    assert "DivergenceError" in (folder / "error.txt").read_text()
    summary = folders.load_summary(folder)
    assert summary["status"] == "failed"
    assert "DivergenceError" in summary["error"]
    assert len(folders.load_metrics(folder)) >= 2


def test_a_run_that_is_being_executed_is_left_alone(tiny, console):
    cfg = tiny()
    folder = folders.of(cfg)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert execute(cfg, console) == BUSY
    assert "another process is executing this run" in console.file.getvalue()
    assert not (folder / "metrics.csv").exists()


def test_a_run_waits_for_the_process_that_executes_it(tiny, console, monkeypatch):
    """As on a cluster, where the job of a lost node may still run; a stop ends the waiting."""
    monkeypatch.setattr(folders, "LOCK_POLL_SECONDS", 0.05)
    cfg = tiny("backend=two_stage", "train.epochs=1")
    folder = folders.of(cfg)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()
        assert execute(cfg, console, wait=True) == 143
        assert not (folder / "metrics.csv").exists()
        threading.Timer(0.3, fcntl.flock, [file, fcntl.LOCK_UN]).start()
        assert execute(cfg, console, wait=True) == 0
    assert "waiting for the process that executes this run" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_in_the_middle_of_an_epoch_loses_no_batch(tiny, console, untimed, tmp_path, monkeypatch, number):
    whole, stopped = (
        tiny("model=mlp_bn", "train.batch_size=8", "train.epochs=3", f"paths.runs={tmp_path / name}") for name in "ab"
    )
    assert execute(whole, console) == 0
    step, steps = Trainer._step, []

    def signalled(self, epoch, batch, watch):
        steps.append(epoch)
        if len(steps) in (3, 12):
            os.kill(os.getpid(), number)
        return step(self, epoch, batch, watch)

    monkeypatch.setattr(Trainer, "_step", signalled)
    assert [execute(stopped, console) for _ in range(3)] == [128 + number, 128 + number, 0]
    assert steps == sorted([1, 2, 3] * 8), "no batch is done twice"
    text = (folders.of(stopped) / "log.txt").read_text()
    assert "resumed after epoch 0 of 3 and 3 batches" in text
    assert "resumed after epoch 1 of 3 and 4 batches" in text
    pd.testing.assert_frame_equal(untimed(folders.of(whole)), untimed(folders.of(stopped)), check_exact=True)


def test_a_cuda_device_that_is_not_there_is_named():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(InputError, match=r"device='cuda:99' is not there"):
        resolve_device("cuda:99")


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest(insist=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_failed_samples_are_left_out_of_the_loss():
    class Task:
        @staticmethod
        def decision_losses(decisions, samples):
            return (decisions * samples["c"]).sum(1)

    trainer = object.__new__(Trainer)
    trainer.task = Task
    decisions = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 4.0]], requires_grad=True)
    loss = trainer._decision_loss(decisions, {"c": torch.ones(3, 2)})
    assert float(loss.detach()) == 5.0
    loss.backward()
    assert decisions.grad.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]
