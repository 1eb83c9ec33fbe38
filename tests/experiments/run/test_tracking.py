"""Weights & Biases: offline by default, offline when online cannot be reached, nothing when disabled."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import wandb

from experiments.report import reproduction
from experiments.run import folders, tracking
from experiments.run.execution import execute
from experiments.run.tracking import Tracker
from experiments.run.trainer import Trainer
from experiments.sweep import studies
from tests.experiments.run import wandb_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    wandb.teardown()  # what it read of the environment of this test


def tracked(folder):
    return sorted(path.name for path in (folder / "wandb").glob("offline-run-*") if list(path.glob("*.wandb")))


def test_offline_runs_are_kept_for_wandb_sync(tiny, console):
    cfg = tiny("tracking.mode=offline", "train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    names = tracked(folders.of(cfg))
    assert len(names) == 1
    assert names[0].endswith(folders.identity(cfg)[:12])
    kept = wandb_files.read(folders.of(cfg))
    assert (kept["group"], kept["job_type"], kept["exit_code"]) == ("", "", 0)
    assert kept["tags"] == ["portfolio", "two_stage", "mlp"]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Let a small study take the place of figure_4c: one run, a figure and its table."""
    raw = {
        "name": "figure_4c",
        "title": "Small",
        "base": [
            *("task=portfolio", "task.n_train=64", "task.n_val=16", "task.n_test=32", "train.epochs=3", "train.lr=0.1"),
            *(
                "device=cpu",
                "tracking.mode=disabled",
                "tracking.tags=[mine]",
                f"paths.runs={tmp_path / 'results/runs'}",
            ),
        ],
        "grid": {"task.degree": [3]},
        "series": {"two_stage": {"title": "two-stage", "overrides": ["backend=two_stage"]}},
        "profiles": {"smoke": {"seeds": 1, "series": {"two_stage": {}}}},
        "outputs": ["small_figure"],
    }

    def make(outputs):
        outputs.artifacts.write("figures/figure_4c.png", b"a picture")
        metrics = folders.load_metrics(outputs.planned[0].folder)
        outputs.artifacts.csv("figures/figure_4c", metrics[["epoch", "split", "regret"]])

    monkeypatch.setitem(sys.modules, "small_figure", SimpleNamespace(make=make))
    monkeypatch.setattr(studies, "load", lambda name: studies.parse(raw, "a test"))
    monkeypatch.setattr(reproduction, "output_root", lambda profile: tmp_path / "results")
    return studies.load("figure_4c")


def test_a_tracked_study_can_be_read_back_and_is_what_wandb_sync_would_send(study, console, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert reproduction.reproduce(["figure_4c"], "smoke", 1, console, "offline") == 0
    (run,) = studies.expand(study, "smoke", mode="offline")

    kept = wandb_files.read(run.folder)
    assert kept["id"] == folders.identity(run.config)[:12]
    assert (kept["group"], kept["job_type"], kept["exit_code"]) == ("figure_4c", "two_stage", 0)
    assert kept["tags"] == ["mine", "two_stage", "smoke", "degree=3", "portfolio", "mlp"]
    assert kept["config"]["task"]["degree"] == 3
    assert kept["config"]["train"] == dict(run.config.train)
    metrics = folders.load_metrics(run.folder)
    assert [row["epoch"] for row in kept["history"]] == [row["_step"] for row in kept["history"]] == [0, 1, 2, 3]
    for split, part in metrics.groupby("split"):
        logged = [row[f"{split}/mse"] for row in kept["history"] if f"{split}/mse" in row]
        assert logged == pytest.approx(part["mse"].dropna().tolist())
    assert kept["steps"]["*"] == "epoch", "the x-axis of every metric"
    for group, final in folders.load_summary(run.folder)["final"].items():
        assert {name: kept["summary"][f"{group}/{name}"] for name in final if name != "split"} == pytest.approx(
            {name: value for name, value in final.items() if name != "split"}
        )
    val = metrics[(metrics["split"] == "val") & (metrics["epoch"] > 0)]
    assert kept["summary"]["val_at_best_val/regret"] == pytest.approx(val["regret"].min())

    reports = tmp_path / "results/runs/reports/figure_4c-smoke"
    report = wandb_files.read(reports)
    assert (report["group"], report["job_type"], report["history"]) == ("figure_4c", "report", [])
    assert report["tags"] == ["mine", "two_stage", "smoke", "degree=3"], "what all of its runs have"
    assert "WANDB_SERVICE" not in os.environ, "what starts later has a service of its own"
    artifact = report["artifacts"]["figure_4c-smoke"]
    assert artifact["type"] == "figures"
    assert set(artifact["files"]) == {
        *("figures/figure_4c.png", "figures/figure_4c.csv", "provenance/figure_4c.json"),
    }
    for name, path in artifact["files"].items():
        assert Path(path).is_relative_to(reports), "figures made later change nothing"
        assert Path(path).read_bytes() == (tmp_path / "results" / name).read_bytes()

    command = re.search(r"^wandb sync results/runs/.*", (ROOT / "docs/harness/run.md").read_text(), re.MULTILINE)[0]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    sync = ["bash", "-c", f"{command} --dry-run"]
    done = subprocess.run(sync, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Would sync 2 run(s)" in done.stdout + done.stderr
    for kept_id in (kept["id"], report["id"]):
        assert f"run-{kept_id}.wandb" in done.stdout + done.stderr

    assert reproduction.reproduce(["figure_4c"], "smoke", 1, console, "offline") == 0
    assert len(tracked(run.folder)) == len(tracked(reports)) == 1, "nothing is logged again"


def test_figures_that_wandb_does_not_take_cost_nothing(tiny, tmp_path, caplog):
    settings = tiny("tracking.mode=offline").tracking
    (tmp_path / "a.csv").write_text("x")
    given = (settings, tmp_path, [tmp_path / "a.csv"])
    assert not tracking.log_figures(*given, tmp_path / "no name: of an artifact")
    assert "W&B cannot take no name: of an artifact" in caplog.text
    (tmp_path / "in the way").write_text("")
    assert not tracking.log_figures(*given, tmp_path / "in the way")
    assert "W&B gets no figures" in caplog.text


@pytest.mark.parametrize("key", ["0" * 40, None], ids=["unreachable", "no key"])
def test_online_without_a_server_goes_on_offline(tiny, console, monkeypatch, key):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    else:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = tiny("tracking.mode=online", "tracking.init_timeout=4", "train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    folder = folders.of(cfg)
    assert "W&B cannot be reached" in (folder / "log.txt").read_text()
    assert len(tracked(folder)) == 1
    assert folders.load_summary(folder)["status"] == "finished"


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
    folder = folders.of(cfg)
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
    assert not (folders.of(cfg) / "wandb").exists()


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
    folder = folders.of(cfg)
    assert "tracked offline" in (folder / "log.txt").read_text()
    assert len(tracked(folder)) == 1
    assert len(folders.load_metrics(folder)) == 5
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert key.encode() not in content, f"{path} holds the key"
        assert licence.encode() not in content, f"{path} holds the licence"
    assert key not in console.file.getvalue()


class _Answers(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs; once `hangs` is set it takes requests and never answers."""

    protocol_version = "HTTP/1.1"
    named = {"id": "1", "name": "run", "entityName": "me", "entity": {"id": "1", "name": "me"}}  # noqa: RUF012
    bucket = {**named, "displayName": "run", "config": "{}", "historyLineCount": 0, "project": named}  # noqa: RUF012
    data = {  # noqa: RUF012
        "viewer": {**named, "username": "me", "flags": "{}", "teams": {"edges": []}},
        "serverInfo": {"features": [], "cliVersionInfo": {}},
        "upsertBucket": {"bucket": bucket, "inserted": True},
        "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
        "model": {**named, "bucket": None},
    }

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.hangs.is_set():
            self.server.ends.wait(120)
            self.close_connection = True
            return
        content = json.dumps({"data": self.data} if self.path.endswith("graphql") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def answering():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.hangs, server.ends, server.daemon_threads = threading.Event(), threading.Event(), True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.ends.set()
        server.shutdown()


def test_a_server_that_hangs_at_the_end_costs_little_time_and_no_data(tiny, console, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    limits = ["tracking.init_timeout=60", "tracking.finish_timeout=4"]
    cfg = tiny("tracking.mode=online", *limits, "train.epochs=1", "backend=two_stage")
    folder, seconds = folders.of(cfg), []
    with answering() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        finish = Tracker.__exit__

        def hung(self, *error):
            server.hangs.set()
            begin = time.monotonic()
            finish(self, *error)
            seconds.append(time.monotonic() - begin)

        monkeypatch.setattr(Tracker, "__exit__", hung)
        assert execute(cfg, console) == 0
        begin = time.monotonic()
        wandb.teardown()  # as at the end of the process
        seconds.append(time.monotonic() - begin)
    assert max(seconds) < 30, "4 s each, and what a busy machine adds"
    said = (folder / "log.txt").read_text()
    assert "tracked offline" not in said
    assert "send it later: wandb sync" in said
    assert folders.load_summary(folder)["status"] == "finished"
    assert len(folders.load_metrics(folder)) == 5
    (kept,) = folder.glob("wandb/run-*/*.wandb")
    assert b"test/regret" in kept.read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a file system of some kB, which takes root."""
    mounted = []

    def mount(folder, size):
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("no file system of one's own can be mounted here")
        mounted.append(folder)

    yield mount
    wandb.teardown()
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
@pytest.mark.parametrize("size", [4, 64])
def test_a_full_disk_under_wandb_costs_no_run(tiny, console, small_disk, size):
    """Too small to start on, and large enough to start but not for all of the run."""
    cfg = tiny("tracking.mode=offline", "train.epochs=60", "backend=two_stage")
    folder = folders.of(cfg)
    small_disk(folder / "wandb", size)
    assert execute(cfg, console) == 0
    assert folders.load_summary(folder)["status"] == "finished"
    assert len(folders.load_metrics(folder)) == 182
    used = shutil.disk_usage(folder / "wandb")
    assert used.free < 4096, "the disk is full"


def test_a_tracker_that_cannot_write_costs_no_run(tiny, console):
    cfg = tiny("tracking.mode=offline", "train.epochs=1", "backend=two_stage")
    folder = folders.of(cfg)
    folder.mkdir(parents=True)
    (folder / "wandb").write_text("in the way")
    assert execute(cfg, console) == 0
    assert folders.load_summary(folder)["status"] == "finished"
    assert "it goes on without" in (folder / "log.txt").read_text()
    assert len(folders.load_metrics(folder)) == 5
