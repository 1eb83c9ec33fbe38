"""Searches, as typed: trials are kept, the best become a configuration, launchers run many at a time."""

import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from experiments.run import configuration, folders
from experiments.run.components import task_class
from experiments.sweep.search import write_tuned

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TINY = ["backend=two_stage", "task.n_train=32", "task.n_val=8", "task.n_test=8", "train.epochs=1"]


@pytest.fixture
def here(tmp_path):
    """A copy of the project, whose conf/tuned is its own."""
    for name in ("conf", "experiments", "foldopt", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tuned"))
    shutil.copy(ROOT / "run.py", tmp_path)
    return tmp_path


def run(here, *overrides, tracking="disabled"):
    command = [sys.executable, "run.py", *overrides, *TINY, f"tracking.mode={tracking}"]
    return subprocess.run(command, cwd=here, capture_output=True, text=True)


def test_a_search_keeps_its_trials_goes_on_and_gives_a_configuration(here):
    search = ["-m", "+search=portfolio"]
    parallel = ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2"]
    for trials, launcher in ((2, parallel), (3, ["hydra.sweeper.n_trials=1"])):
        done = run(here, *search, *launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        storage = f"sqlite:///{here}/results/runs/search/portfolio-two_stage/trials.db"
        study = optuna.load_study(study_name="portfolio-two_stage", storage=storage)
        assert len([trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]) == trials
    best = min(
        folders.load_metrics(path.parent).query("split == 'val' and epoch > 0")["regret"].min()
        for path in here.glob("results/runs/portfolio/*/summary.json")
    )
    assert study.best_value == pytest.approx(best)
    assert "use it with: +tuned=portfolio-two_stage" in done.stdout

    done = run(here, "+tuned=portfolio-two_stage")
    assert "Nothing to do: this run is finished" in done.stdout, "it is the run of the best trial"

    done = run(here, *search, "task.degree=1")
    assert done.returncode == 1
    assert "its trials belong to a search with" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_run_of_parallel_workers_reaches_the_exit_code(here):
    done = run(here, "-m", "hydra/launcher=local", "hydra.launcher.n_jobs=2", "train.lr=0.01,-1")
    assert done.returncode == 1
    assert "train.lr=-1: expected a number above 0" in done.stdout
    assert len(list(here.glob("results/runs/portfolio/*/summary.json"))) == 1, "a bad value writes nothing"
    assert "RunFailed: exit code 1, see" in done.stderr


def test_tuned_groups_are_chosen_and_values_set(tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "CONF", tmp_path)
    (tmp_path / "model").mkdir()
    params = {"model": "mlp_bn", "train.lr": 0.25, "train.schedule": "cosine"}
    path = write_tuned("mine", params, 1.5)
    text = path.read_text()
    assert text.startswith("# @package _global_\n")
    assert yaml.safe_load(text) == {
        "defaults": [{"override /model": "mlp_bn"}],
        "train": {"lr": 0.25, "schedule": "cosine"},
    }


SEARCHES = sorted(path.stem for path in (ROOT / "conf/search").glob("*.yaml") if path.stem != "base")


def space(name):
    with initialize_config_dir(str(configuration.CONF), version_base="1.3"):
        cfg = compose("config", [f"+search={name}"], return_hydra_config=True)
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in cfg.hydra.sweeper.params.items()])
    return cfg, {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_is_of_its_task_and_every_parameter_exists(name):
    cfg, parameters = space(name)
    assert cfg.task.name == name
    assert cfg.hydra.sweeper._target_.endswith("OptunaSweeper")
    for key, value in parameters.items():
        for choice in value.list if isinstance(value, ChoiceSweep) else (value.start, value.end):
            configuration.compose([f"task={name}", f"model={cfg.model.name}", f"{key}={choice}"])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_by_wandb_is_of_the_same_space(name):
    sweep = yaml.safe_load((ROOT / f"conf/wandb_sweep/{name}.yaml").read_text())
    _, parameters = space(name)
    assert sweep["parameters"].keys() == parameters.keys()
    for key, value in parameters.items():
        theirs = sweep["parameters"][key]
        if isinstance(value, ChoiceSweep):
            assert [str(choice) for choice in value.list] == [str(choice) for choice in theirs["values"]]
        else:
            assert (value.start, value.end) == (theirs["min"], theirs["max"])
            assert theirs["distribution"] == ("log_uniform_values" if "log" in value.tags else "uniform")
    cfg = configuration.compose([word for word in sweep["command"] if "=" in word])
    assert (cfg.task.name, cfg.tracking.mode) == (name, "online")
    assert sweep["metric"]["name"].removeprefix("val/") in task_class(cfg).columns


def test_the_agent_of_a_wandb_sweep_names_the_run(here, monkeypatch):
    """In a process of its own, as wandb reads these variables once."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert run(here, tracking="offline").returncode == 0
    files = here.glob("results/runs/portfolio/*/wandb/offline-run-*")
    assert [path.name.rpartition("-")[2] for path in files] == ["given"]
