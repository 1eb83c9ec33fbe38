"""Tasks, a model, a backend and a study from outside the project: one class and one YAML each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = '''
import torch
from torch import nn

import foldopt
from experiments.contracts.backend import Backend
from experiments.contracts.problem import Forward, Problem
from experiments.contracts.task import Task


class Shrinkage(Problem):
    """min 1/2 |x - c|^2 + w |x|_1."""

    forwards = {"threshold": Forward(tol=1e-9)}

    @property
    def optimizers(self):
        return {"ista": lambda: lambda x, c: foldopt.prox.soft_threshold(x - 0.5 * (x - c), 0.05)}

    def solve(self, forward, c, **options):
        return foldopt.prox.soft_threshold(c, 0.1)

    def decide(self, c):
        return self.solve("threshold", c)


class Signals(Task):
    """Its problem has a forward of its own name."""

    n_inputs, n_outputs = 3, 3
    objective, columns = "error", ("error",)

    def __init__(self, seed, capacity: float):
        self.problem, self.capacity = Shrinkage(), capacity
        z = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))
        self.splits = {name: {"inputs": z, "signals": z.double()} for name in ("train", "val", "test")}

    def parameters(self, outputs, samples):
        return outputs.double()

    def decision_losses(self, decisions, samples):
        return (decisions - samples["signals"]).square().mean(1)

    def metrics(self, outputs, samples):
        decisions = self.problem.decide(outputs.double())
        return {"error": float(self.decision_losses(decisions, samples).mean())}


class Sparse(Signals):
    """With a metric of its own."""

    columns = ("error", "zeros")

    def metrics(self, outputs, samples):
        zeros = (self.problem.decide(outputs.double()) == 0).double().mean()
        return {**super().metrics(outputs, samples), "zeros": float(zeros)}


class Hits(Signals):
    """With an objective of which more is better."""

    objective, columns, maximize = "hits", ("hits",), True

    def metrics(self, outputs, samples):
        decisions = self.problem.decide(outputs.double())
        hit = decisions.argmax(1) == samples["signals"].argmax(1)
        return {"hits": float(hit.double().mean()), "loss": float(self.decision_losses(decisions, samples).mean())}


class Undeclared(Sparse):
    columns = ("error",)


class WithoutMetrics(Task):
    objective, columns = "error", ("error",)

    def __init__(self, seed, capacity):
        pass

    def parameters(self, outputs, samples):
        return outputs

    def decision_losses(self, decisions, samples):
        return decisions


class Untyped(Signals):
    def __init__(self, seed, capacity):
        super().__init__(seed, torch.zeros(2).fill_(capacity))


class WithoutObjective(Signals):
    objective = "regret"


class Plain:
    pass


class Scale(nn.Module):
    def __init__(self, n_inputs, n_outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_outputs,), 0.5))

    def forward(self, inputs):
        return self.scale * inputs


class Direct(Backend):
    def __init__(self, task, linear_solver, factor: float):
        self.factor = factor

    def __call__(self, parameters):
        return self.factor * parameters
'''
TASKS = ("Signals", "Sparse", "Hits")
REFUSED = [
    (["task=undeclared"], ["mine.Undeclared.metrics returns ['zeros']", "add them there"]),
    (["task=withoutmetrics"], ["mine.WithoutMetrics has no method metrics(outputs, samples); add it"]),
    (["task=withoutobjective"], ["the objective 'regret' of mine.WithoutObjective", "add it there"]),
    (["task=plain"], ["mine.Plain is no Task; derive it from experiments.contracts.task.Task"]),
    (["task=signals", "task.capacity=abc"], ["task.capacity=abc: expected a number"]),
    (["task=untyped", "task.capacity=abc"], ["mine.Untyped refuses its settings {'capacity': 'abc'}"]),
    (["task=signals", "backend=spo_plus"], ["it has no true parameters (truth)", "Backends that can: "]),
    (["task=signals", "backend.forward=exact"], ["choose one of ['threshold']"]),
    (["task=signals", "backend.forward_tol=1e-3"], ["takes no tolerance for this task"]),
]


@pytest.fixture
def outside(tmp_path):
    """Return how to call run.py with a package of one's own on its path; its runs go to runs/."""
    (tmp_path / "mine.py").write_text(PACKAGE)
    for group, names in {
        "task": (*TASKS, "Undeclared", "WithoutMetrics", "Untyped", "WithoutObjective", "Plain"),
        "model": ("Scale",),
        "backend": ("Direct",),
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        for name in names:
            settings = {"task": {"capacity": 1.0}, "model": {}, "backend": {"factor": 1.0}}[group]
            content = {"_target_": f"mine.{name}", "name": name.lower(), **settings}
            (tmp_path / "conf" / group / f"{name.lower()}.yaml").write_text(yaml.safe_dump(content))

    def call(*overrides):
        command = [sys.executable, str(ROOT / "run.py"), "--config-dir", str(tmp_path / "conf"), *overrides]
        fixed = ["model=scale", "device=cpu", "tracking.mode=disabled", f"paths.runs={tmp_path / 'runs'}"]
        fixed += [] if any("forward=" in o or "backend=" in o for o in overrides) else ["backend.forward=threshold"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *fixed], env=environment, capture_output=True, text=True)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("backend", [("backend=fold", "backend.forward=threshold"), ("backend=direct",)])
@pytest.mark.parametrize("task", TASKS)
def test_tasks_run_with_a_model_and_backends(outside, tmp_path, task, backend):
    chosen = [f"task={task.lower()}", *backend, "train.batch_size=4"]
    done = outside(*chosen, "train.epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = tmp_path.glob("runs/*/*/summary.json")
    frame, content = pd.read_csv(summary.parent / "metrics.csv"), json.loads(summary.read_text())
    objective, *more = {"Signals": ["error"], "Sparse": ["error", "zeros"], "Hits": ["hits"]}[task]
    for column in (objective, *more):
        assert frame[frame["split"] == "test"][column].notna().all()
        assert content["final"]["test"][column] == frame[frame["split"] == "test"][column].iloc[-1]
    assert f"test {objective} " in done.stdout
    val = frame[(frame["split"] == "val") & (frame["epoch"] > 0)]
    best = val[objective].max() if task == "Hits" else val[objective].min()
    assert content["final"]["val_at_best_val"][objective] == best


@pytest.mark.parametrize(("overrides", "messages"), REFUSED)
def test_what_is_missing_is_named_with_the_remedy(outside, overrides, messages):
    done = outside(*overrides)
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1
    assert "Traceback (most recent call last)" not in done.stdout + done.stderr
    assert "epoch 1" not in done.stdout, "before training"
    for message in messages:
        assert message in done.stdout


def test_a_task_with_columns_of_its_own_is_restored_from_its_checkpoint(outside, tmp_path):
    """Without its summary, and with a row of a later epoch cut off, a run ends with the metrics that it had."""
    chosen = ["task=sparse", "train.batch_size=4", "train.epochs=2"]
    assert outside(*chosen).returncode == 0
    (metrics,) = tmp_path.glob("runs/*/*/metrics.csv")
    whole = pd.read_csv(metrics)
    (metrics.parent / "summary.json").unlink()
    metrics.write_text(metrics.read_text() + "3,train,1.0\n")  # of an epoch after the checkpoint
    assert outside(*chosen).returncode == 0
    pd.testing.assert_frame_equal(pd.read_csv(metrics), whole)
