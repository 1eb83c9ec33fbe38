"""Weights & Biases: offline by default, offline when online cannot be reached, nothing when disabled."""

import contextlib
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import wandb

from experiments import runs
from experiments.execution import execute
from experiments.trainer import Trainer


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)


def tracked(folder):
    return sorted(path.name for path in (folder / "wandb").glob("offline-run-*") if list(path.glob("*.wandb")))


def test_offline_runs_are_kept_for_wandb_sync(tiny, console):
    cfg = tiny("tracking.mode=offline", "train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    names = tracked(runs.folder(cfg))
    assert len(names) == 1
    assert names[0].endswith(runs.identity(cfg)[:12])


@pytest.mark.parametrize("key", ["0" * 40, None], ids=["unreachable", "no key"])
def test_online_without_a_server_goes_on_offline(tiny, console, monkeypatch, key):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    else:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = tiny("tracking.mode=online", "tracking.init_timeout=4", "train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    folder = runs.folder(cfg)
    assert "W&B cannot be reached" in (folder / "log.txt").read_text()
    assert len(tracked(folder)) == 1
    assert runs.load_summary(folder)["status"] == "finished"


def test_a_run_outlives_the_service_and_catches_up_when_resumed(tiny, console, monkeypatch):
    """A signal to all processes of a job, or Ctrl-C, ends W&B's service as well."""
    cfg = tiny("tracking.mode=offline", "train.epochs=4", "backend=two_stage")
    fitted = Trainer._train

    def train(self, epoch, stop, begun):
        if epoch == 2:
            service = [child for child in psutil.Process().children(True) if child.name().startswith("wandb")]
            for process in service:
                process.terminate()
            psutil.wait_procs(service, timeout=30)
            os.kill(os.getpid(), signal.SIGTERM)
        return fitted(self, epoch, stop, begun)

    monkeypatch.setattr(Trainer, "_train", train)
    assert execute(cfg, console) == 143
    folder = runs.folder(cfg)
    assert "W&B's service has died" in (folder / "log.txt").read_text()
    monkeypatch.setattr(Trainer, "_train", fitted)
    steps, logged = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, values, step: steps.append(step) or logged(run, values, step=step)
    )
    assert execute(cfg, console) == 0
    assert len({name.split("-")[3] for name in tracked(folder)}) == 1, "one W&B run"
    assert steps == [0, 1, 2, 3, 4], "of which the last file has all"


def test_disabled_leaves_nothing(tiny, console):
    cfg = tiny("train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    assert not (runs.folder(cfg) / "wandb").exists()


class _Refuses(BaseHTTPRequestHandler):
    """A server of W&B to which every key is wrong."""

    def handle_one_request(self):
        self.raw_requestline = self.rfile.readline()
        self.close_connection = True
        if self.parse_request():
            self.send_response(401)
            self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def wrong_key():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextlib.contextmanager
def hanging():
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", [wrong_key, hanging])
def test_a_server_that_refuses_or_hangs_costs_little_time_and_no_data(tiny, console, monkeypatch, kind):
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("GRB_WLSSECRET", licence := "f0e1d2c3-secret")
    cfg = tiny("tracking.mode=online", "tracking.init_timeout=4", "train.epochs=1", "backend=two_stage")
    with kind() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        begin = time.monotonic()
        assert execute(cfg, console) == 0
    assert time.monotonic() - begin < 90
    folder = runs.folder(cfg)
    assert "tracked offline" in (folder / "log.txt").read_text()
    assert len(tracked(folder)) == 1
    assert len(runs.load_metrics(folder)) == 5
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert key.encode() not in content, f"{path} holds the key"
        assert licence.encode() not in content, f"{path} holds the licence"
    assert key not in console.file.getvalue()


def test_a_tracker_that_cannot_write_costs_no_run(tiny, console):
    cfg = tiny("tracking.mode=offline", "train.epochs=1", "backend=two_stage")
    folder = runs.folder(cfg)
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("in the way")
    assert execute(cfg, console) == 0
    assert runs.load_summary(folder)["status"] == "finished"
    assert "it goes on without" in (folder / "log.txt").read_text()
    assert len(runs.load_metrics(folder)) == 5
