"""run.py as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = ["task.n_train=32", "task.n_val=8", "task.n_test=8", "train.epochs=1", "tracking.mode=disabled"]

MY_TASK = '''
import torch
from experiments.contracts.task import Task
from experiments.portfolio.problem import PortfolioProblem

class TwoAssets(Task):
    """Two assets whose returns are the two features."""

    n_inputs, n_outputs = 2, 2

    objective, columns = "regret", ("regret",)

    def __init__(self, seed, samples):
        self.problem = PortfolioProblem(torch.eye(2), 0.9)
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(samples, 2, generator=generator)
        self.splits = {name: {"inputs": z, "c": z.double()} for name in ("train", "val", "test")}

    def parameters(self, outputs, samples):
        return outputs.double()

    def decision_losses(self, decisions, samples):
        c = samples["c"]
        return self.problem.value(self.problem.exact(c).x, c) - self.problem.value(decisions, c)

    def prediction_losses(self, outputs, samples):
        return (outputs - samples["c"]).square().mean(1)

    def metrics(self, outputs, samples):
        return {"regret": float(self.problem.regret(self.problem.exact(outputs.double()).x, samples["c"]).mean())}
'''
MY_MODEL = """
from torch import nn

class Linear(nn.Linear):
    def __init__(self, n_inputs, n_outputs):
        super().__init__(n_inputs, n_outputs)
"""
MY_BACKEND = '''
from experiments.contracts.backend import Backend

class Identity(Backend):
    """Decides what was predicted, which is as wrong as it is differentiable."""

    def __init__(self, task, linear_solver, factor):
        self.factor = factor

    def __call__(self, parameters):
        return self.factor * parameters
'''


def run(*overrides, path=ROOT, **environment):
    command = [sys.executable, str(ROOT / "run.py"), *overrides]
    return subprocess.run(
        command, cwd=path, env={**os.environ, "COLUMNS": "200", **environment}, capture_output=True, text=True
    )


def test_help_is_readable():
    done = run("--help")
    assert done.returncode == 0
    assert "backend: cvxpy, cvxpylayers, exact, fold, pyepo, qpth, spo_plus, two_stage, unfold, unroll" in done.stdout
    assert "python run.py task=portfolio backend=fold" in done.stdout
    assert "Exit codes: 0 finished" in done.stdout
    assert "hydra" not in done.stdout.lower()


def test_errors_come_without_a_traceback_and_with_an_exit_code(tmp_path):
    done = run("backend=fold", "backend.optimizer=pgd_a", f"paths.runs={tmp_path}")
    assert done.returncode == 1
    assert done.stdout.startswith(
        "error: backend.optimizer='pgd_a' is not there for this task; choose auto or one of ['sqp']."
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == [], "stopped before any work"
    unknown = run("backend=nonsense")
    assert unknown.returncode == 1
    assert "Could not find 'backend/nonsense'" in unknown.stderr
    assert "two_stage" in unknown.stderr


@pytest.mark.slow
def test_a_sweep_runs_every_combination(tmp_path):
    done = run("-m", "backend=two_stage", "seed=0,1", *TINY, f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("portfolio/two_stage-mlp-seed*/summary.json"))) == 2
    assert not (ROOT / "multirun.yaml").exists()


@pytest.fixture
def mine(tmp_path):
    """A task, a model and a backend, one file and one YAML each, outside of the project."""
    nodes = {
        "task": {"_target_": "my_task.TwoAssets", "name": "two_assets", "samples": 32},
        "model": {"_target_": "my_model.Linear", "name": "linear"},
        "backend": {"_target_": "my_backend.Identity", "name": "identity", "factor": 0.5},
    }
    for group, node in nodes.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(yaml.safe_dump(node))
    for name, code in (("my_task", MY_TASK), ("my_model", MY_MODEL), ("my_backend", MY_BACKEND)):
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["task=mine", "task=mine model=mine backend=mine", "model=mine"])
def test_a_task_a_model_and_a_backend_from_outside(mine, chosen):
    common = ["train.epochs=2", "tracking.mode=disabled", f"paths.runs={mine / 'runs'}", *chosen.split()]
    if "task=mine" not in chosen:
        common += TINY[:3]
    done = run("--config-dir", str(mine / "conf"), *common, path=mine, PYTHONPATH=str(mine))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(mine.glob("runs/*/*/summary.json"))) == 1
