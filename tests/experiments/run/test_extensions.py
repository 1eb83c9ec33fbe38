"""Tasks, a model, a backend and a study from outside the project: one class and one YAML each."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.report import reproduction
from experiments.run import folders
from experiments.sweep import studies
from foldopt.errors import InputError
from scripts import figures, reproduce, sweep

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = '''
import os

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


class Stopped(Sparse):
    """Sends a signal to its own process when a number of metrics were measured (two an epoch), or losses computed."""

    def __init__(self, seed, capacity: float):
        super().__init__(seed, capacity)
        self.left = {name: int(os.environ.get(f"STOP_AFTER_{name}", 0)) for name in ("metrics", "losses")}

    def count(self, name):
        self.left[name] -= 1
        if self.left[name] == 0:
            os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))

    def metrics(self, outputs, samples):
        self.count("metrics")
        return super().metrics(outputs, samples)

    def decision_losses(self, decisions, samples):
        if decisions.requires_grad:
            self.count("losses")
        return super().decision_losses(decisions, samples)


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
FIGURES = """
def make(outputs):
    metrics = outputs.metrics()
    last = metrics[(metrics["split"] == "test") & (metrics["epoch"] == metrics["epoch"].max())]
    outputs.artifacts.csv("tables/shrinkage", last[["series", "capacity", "seed", "error", "zeros"]])
    outputs.artifacts.write("tables/shrinkage.md", f"Made by {outputs.command}.".encode())
"""
STUDY = {
    "name": "shrinkage",
    "title": "Shrinkage of signals",
    "base": ["task=sparse", "model=scale", "device=cpu", "tracking.mode=disabled", "train.epochs=2"],
    "grid": {"task.capacity": [1, 2]},
    "series": {
        "fold": {"title": "folded", "overrides": ["backend=fold", "backend.forward=threshold"]},
        "direct": {"title": "no layer", "overrides": ["backend=direct"]},
    },
    "profiles": {"smoke": {"seeds": 2, "series": {"fold": {}, "direct": {"task.capacity": [1]}}}},
    "outputs": ["my_figures"],
    "tables": {"shrinkage": "Shrinkage, last error"},
}
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
        "task": (*TASKS, "Stopped", "Undeclared", "WithoutMetrics", "Untyped", "WithoutObjective", "Plain"),
        "model": ("Scale",),
        "backend": ("Direct",),
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        for name in names:
            settings = {"task": {"capacity": 1.0}, "model": {}, "backend": {"factor": 1.0}}[group]
            content = {"_target_": f"mine.{name}", "name": name.lower(), **settings}
            (tmp_path / "conf" / group / f"{name.lower()}.yaml").write_text(yaml.safe_dump(content))

    def call(*overrides, **variables):
        command = [sys.executable, str(ROOT / "run.py"), "--config-dir", str(tmp_path / "conf"), *overrides]
        fixed = ["model=scale", "device=cpu", "tracking.mode=disabled", f"paths.runs={tmp_path / 'runs'}"]
        fixed += [] if any("forward=" in o or "backend=" in o for o in overrides) else ["backend.forward=threshold"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
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
@pytest.mark.slow
def test_what_is_missing_is_named_with_the_remedy(outside, overrides, messages):
    done = outside(*overrides)
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1
    assert "Traceback (most recent call last)" not in done.stdout + done.stderr
    assert "epoch 1" not in done.stdout, "before training"
    for message in messages:
        assert message in done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [({"STOP_AFTER_metrics": "5"}, signal.SIGKILL, -9), ({"STOP_AFTER_losses": "6"}, signal.SIGTERM, 143)],
    ids=["killed", "stopped"],
)
def test_a_disturbed_run_with_columns_of_its_own_resumes_to_the_same_numbers(
    outside, tmp_path, untimed, moment, number, code
):
    """In its second epoch of four: killed as it measures the columns, or stopped in the second of four batches."""
    chosen = ["task=stopped", "train.batch_size=4", "train.epochs=4", "optimizer=sgd"]
    assert outside(*chosen).returncode == 0
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/*/metrics.csv"))
    whole = untimed(folder)
    folder.rename(tmp_path / "whole")
    assert outside(*chosen, **moment, STOP_SIGNAL=str(int(number))).returncode == code
    assert folders.status(folder) == "interrupted"
    assert folders.load_metrics(folder)["epoch"].max() == 1
    assert outside(*chosen).returncode == 0
    assert "resumed after epoch" in (folder / "log.txt").read_text()
    assert {"error", "zeros"} <= set(whole)
    pd.testing.assert_frame_equal(untimed(folder), whole, check_exact=True)
    ended, expected = (folders.load_summary(path)["final"] for path in (folder, tmp_path / "whole"))
    for split in ("val", "test", "val_at_best_val"):
        assert (ended[split]["error"], ended[split]["zeros"]) == (expected[split]["error"], expected[split]["zeros"])


@pytest.fixture
def own_study(outside, tmp_path, monkeypatch):
    """Write a study of one's own, its content changed as told; return the folder of configurations."""
    (tmp_path / "my_figures.py").write_text(FIGURES)
    (tmp_path / "conf" / "study").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reproduction, "output_root", lambda profile: tmp_path / "results")

    def write(file="shrinkage", **changes):
        content = {**STUDY, **changes}
        content["base"] = [*content["base"], f"paths.runs={tmp_path / 'runs'}"]
        (tmp_path / "conf" / "study" / f"{file}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "conf")

    return write


@pytest.mark.slow
def test_a_study_of_one_s_own_runs_and_makes_its_table(own_study, tmp_path, capsys, monkeypatch):
    """Task, model, backend, study and the module of its table are all outside; workers are processes of their own."""
    folder = own_study()
    monkeypatch.setattr(reproduce.report, "output_root", lambda profile: tmp_path / "results")
    named = ["--config-dir", folder, "--profile", "smoke", "--study", "shrinkage"]
    assert figures.main(named) == 1
    assert "6 of 6 runs are not finished" in capsys.readouterr().out
    assert reproduce.main([*named, "--workers", "2"]) == 0
    table = pd.read_csv(tmp_path / "results" / "tables" / "shrinkage.csv")
    assert sorted(zip(table["series"], table["capacity"], table["seed"], strict=True)) == [
        *(("direct", 1, seed) for seed in (0, 1)),
        *(("fold", capacity, seed) for capacity in (1, 2) for seed in (0, 1)),
    ]
    assert table["error"].gt(0).all()
    said = (tmp_path / "results" / "tables" / "shrinkage.md").read_text()
    command = said.removeprefix("Made by ").removesuffix(".").split()
    assert command[:3] == ["make", "shrinkage", "PROFILE=smoke"]
    recipe = subprocess.run([*command, "-n", "-o", ".venv/.installed"], cwd=ROOT, capture_output=True, text=True)
    assert "scripts.figures --study shrinkage --profile smoke --config-dir" in recipe.stdout
    assert "### Shrinkage, last error" in (tmp_path / "results" / "REPORT.md").read_text()
    capsys.readouterr()
    assert sweep.main(["status", "shrinkage", "--config-dir", folder, "--profile", "smoke"]) == 0
    assert "shrinkage (smoke): 6 runs, 6 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": ["task=spars"]}, "study shrinkage, series fold: In 'config': Could not find 'task/spars'"),
        ({"outputs": ["my_tables"]}, "study shrinkage needs my_tables.make, which cannot be imported: No module named"),
        ({"outputs": ["mine"]}, "study shrinkage needs mine.make, which cannot be imported: module 'mine' has no"),
        ({"name": "other"}, "shrinkage.yaml: name='other' differs from the file's name"),
        ({"series": {"fold": {"title": "folded"}}}, "shrinkage.yaml: series.fold: expected the keys ['overrides', "),
        ({"grid": {"task.capacity": 1}}, "shrinkage.yaml: grid.task.capacity: expected a list, got 1"),
        ({"profiles": {"smoke": {"seeds": 0, "series": {}}}}, "profiles.smoke.seeds=0: expected a whole number"),
        ({"profiles": {"default": {"seeds": 1, "series": {}}}}, "no profile 'smoke'; choose one of default"),
    ],
)
def test_what_a_study_of_one_s_own_lacks_is_named(own_study, capsys, changes, message):
    folder = own_study(**changes)
    assert figures.main(["--config-dir", folder, "--profile", "smoke", "--study", "shrinkage"]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_folders_without_studies_and_names_that_are_taken_are_refused(own_study, tmp_path, capsys):
    with pytest.raises(InputError, match=r"there is no study/<name>.yaml in this folder; add one"):
        studies.available(tmp_path / "nowhere")
    folder = own_study()
    with pytest.raises(SystemExit):
        figures.main(["--config-dir", folder, "--study", "shrinkag"])
    assert "invalid choice: 'shrinkag' (choose from" in capsys.readouterr().err
    own_study("figure_6")
    with pytest.raises(SystemExit, match="conf/study has a study 'figure_6' too; rename yours"):
        sweep.main(["status", "figure_6", "--config-dir", folder])
