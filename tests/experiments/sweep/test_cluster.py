"""Sweeps on a real Slurm: the commands of docs/harness/cluster.md, a preempted job, a lost node, the local numbers."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from experiments.run import configuration, folders
from experiments.run.execution import execute
from experiments.sweep import studies
from scripts.sweep import main
from tests.experiments.sweep import local_slurm
from tests.experiments.sweep.local_slurm import LocalSlurm

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

SIZES = ["task.n_val=16", "task.n_test=32"]
STUDIES = {
    "short": {
        "title": "Short runs",
        "base": ["task=portfolio", "task.n_train=64", *SIZES, "tracking.mode=disabled"],
        "grid": {"task.degree": [1, 3]},
        "series": {
            "fold": {"title": "fold", "overrides": ["backend=fold", "train.epochs=3"]},
            "two_stage": {"title": "two-stage", "overrides": ["backend=two_stage", "train.epochs=3"]},
        },
        "profiles": {"default": {"seeds": 1, "series": {"fold": {}, "two_stage": {}}}},
    },
    "long": {
        "title": "A run that outlives a preemption and a node",
        "base": [
            "task=denoising",
            "model=operator",
            "train.lr=0.001",
            "task.n_train=1000",
            *SIZES,
            "tracking.mode=offline",
        ],
        "grid": {"task.weight": [10]},
        "series": {"fold": {"title": "fold", "overrides": ["backend=fold", "train.epochs=40"]}},
        "profiles": {"default": {"seeds": 1, "series": {"fold": {}}}},
    },
}


@pytest.fixture(scope="module")
def slurm():
    reason = local_slurm.missing()
    if reason:
        pytest.skip(reason)
    with LocalSlurm() as slurm:
        yield slurm


def project(path):
    """Make a copy of the project whose run folders are its own, with two small studies more."""
    path.mkdir()
    for name in ("conf", "experiments", "foldopt", "data", "scripts"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__", "cache"))
    shutil.copy(ROOT / "run.py", path)
    for name, content in STUDIES.items():
        (path / "conf" / "study" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **content}))
    return path


def planned(folder):
    """Return the runs of both studies, to be executed into `folder`."""
    raw = [
        {"name": name, **content, "base": [*content["base"], f"paths.runs={folder}", "tracking.mode=disabled"]}
        for name, content in STUDIES.items()
    ]
    return [run for one in raw for run in studies.expand(studies.parse(one, "a test"))]


def epoch(path, study):
    """Return the last epoch that is in the metrics of the only run of a study."""
    found = list(path.glob(f"results/runs/{study}/*/metrics.csv"))
    return folders.load_metrics(found[0].parent)["epoch"].max() if found else -1


@pytest.fixture
def here(slurm, tmp_path, monkeypatch):
    """A copy of the project that the commands of this process work on, with the Slurm of the tests."""
    here = project(tmp_path / "cluster")
    monkeypatch.setattr(configuration, "ROOT", here)
    monkeypatch.setattr(configuration, "CONF", here / "conf")
    monkeypatch.setattr(studies, "STUDY_FOLDER", here / "conf" / "study")
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    return here


@pytest.fixture
def sweep(here, capsys):
    """Do what `python -m scripts.sweep <words>` does; return what it prints."""

    def sweep(*words, code=0):
        assert main(list(words)) == code
        return capsys.readouterr().out

    return sweep


def test_a_sweep_survives_preemption_and_a_lost_node_and_equals_local_runs(slurm, here, sweep, tmp_path, untimed):
    def log_of_run():
        return "".join(path.read_text() for path in here.glob("results/runs/denoising/*/log.txt"))

    def resumed(times):
        slurm.wait(lambda: log_of_run().count("resumed after epoch") == times, 90, f"resumption {times}")

    def job(form):
        return slurm.call("squeue", "-h", "-r", f"--name={array}", "-o", form).strip()

    # Jobs that break before their runs do are failures, and can be retried.
    out = sweep("submit", "short", "--runs-per-job", "2", "-s", "partition=low", "-s", "setup=[exit 3]")
    assert "submitted 2 jobs" in out
    slurm.wait(lambda: not slurm.call("squeue", "-h"), 60, "end of the jobs that exit at once")
    out = sweep("status", "short", code=1)
    assert "short (default): 4 runs, 4 failed" in out
    assert "its job ended without it, see" in out
    assert "4 of 4 runs submitted" in sweep("retry", "short", "--failed", "--runs-per-job", "4", "-s", "partition=low")
    out = sweep("submit", "short", "long", "-s", "partition=low", "-s", "timeout_min=30")
    assert "short (default): 0 of 4 runs submitted" in out, "they are in the queue, or finished"
    assert "long (default): 1 of 1 runs submitted" in out
    array = next(here.glob("results/runs/sweeps/long-default/*/job.sh")).parent.name

    # The warning before a time limit: the signal that --signal=B:USR1@120 sends.
    slurm.wait(lambda: epoch(here, "denoising") >= 2, 90, "second epoch")
    slurm.call("scancel", "--batch", "--signal=USR1", job("%A"))
    resumed(1)

    # Preemption: the job in the partition high takes all nodes.
    before = epoch(here, "denoising")
    slurm.wait(lambda: epoch(here, "denoising") > before, 90, "progress after the first resumption")
    slurm.call("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    resumed(2)

    # A node is lost and its processes hang: the run starts elsewhere, but goes on only when they are gone.
    node = job("%N")
    slurm.lose_node(node)
    slurm.wait(lambda: slurm.states()[node].startswith("down"), 60, "loss of the node")
    slurm.wait(lambda: job("%T %N") == f"RUNNING {next(n for n in local_slurm.NODES if n != node)}", 60, "other node")
    slurm.wait(lambda: "waiting for the process that executes this run" in log_of_run(), 60, "waiting")
    slurm.start_node(node)
    slurm.wait(lambda: slurm.states()[node] in ("idle", "mixed"), 60, "return of the node")
    resumed(3)

    slurm.wait(lambda: not slurm.call("squeue", "-h"), 180, "end of all jobs")
    out = sweep("collect", "short", "long")
    assert "the metrics of 4 of 4 runs" in out
    assert "the metrics of 1 of 1 runs" in out
    assert len(pd.read_csv(here / "results/runs/sweeps/short-default/metrics.csv")) == 4 * (2 + 3 * 3)
    tracked = next(here.glob("results/runs/denoising/*/wandb"))
    assert len({path.name.split("-")[3] for path in tracked.glob("offline-run-*")}) == 1, "one W&B run all along"

    for run in planned(tmp_path / "local"):
        assert execute(run.config, Console(file=io.StringIO())) == 0
        remote = here / "results/runs" / run.folder.relative_to(tmp_path / "local")
        assert folders.status(remote) == "finished"
        pd.testing.assert_frame_equal(untimed(remote), untimed(run.folder), check_exact=True)


def test_what_is_cancelled_stays_stopped_until_it_is_retried(slurm, here, sweep):
    study = here / "conf/study/short.yaml"  # with runs that no machine ends before they are cancelled
    study.write_text(study.read_text().replace("train.epochs=3", "train.epochs=5000"))
    sweep("submit", "short", "--series", "fold", "-s", "partition=low", "-s", "timeout_min=30")
    out = sweep("status", "short")
    assert "2 missing" in out
    assert "2 queued" in out or "running" in out
    assert "short (default): 1 job arrays cancelled" in sweep("cancel", "short")
    slurm.wait(lambda: not slurm.call("squeue", "-h"), 60, "end of what was cancelled")
    assert "short (default): 4 runs, 2 stopped, 2 missing" in sweep("status", "short")
    assert "short (default): 0 of 4 runs submitted" in sweep("retry", "short", "--failed")
    assert "short (default): 2 of 4 runs submitted" in sweep("retry", "short", "-s", "additional_parameters.hold=true")
    assert "queued 2: PENDING: JobHeldUser" in sweep("status", "short")
    assert "0 of 4 runs" in sweep("collect", "short", code=1)
    sweep("cancel", "short")


def test_wrong_values_are_named(here, sweep):
    assert "hydra.launcher.nodes=2: a run is one process" in sweep("submit", "short", "-s", "nodes=2", code=1)
    assert "runs_per_job=0: expected a whole number" in sweep("submit", "short", "--runs-per-job", "0", code=1)
    assert "invalid partition specified: nowhere" in sweep("submit", "short", "-s", "partition=nowhere", code=1)
    assert "4 missing" in sweep("status", "short"), "what Slurm refuses counts as never submitted"


def test_hydras_launcher_takes_the_same_settings(slurm, here):
    launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=30"]
    command = [sys.executable, "run.py", "-m", *launcher, "seed=0,1", "backend=two_stage", "tracking.mode=disabled"]
    done = subprocess.run([*command, "train.epochs=1"], cwd=here, env=slurm.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = list(here.glob("results/runs/portfolio/*"))
    assert [folders.status(folder) for folder in made] == ["finished", "finished"]
