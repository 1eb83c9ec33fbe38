"""Weights & Biases: offline by default, offline when online cannot be reached, nothing when disabled."""

import pytest

from experiments import runs
from experiments.execution import execute


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


def test_disabled_leaves_nothing(tiny, console):
    cfg = tiny("train.epochs=1", "backend=two_stage")
    assert execute(cfg, console) == 0
    assert not (runs.folder(cfg) / "wandb").exists()
