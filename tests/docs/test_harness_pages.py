"""The pages about the harness: every column is explained, and the project that they build runs and learns."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from experiments.backends.pyepo import LOSSES
from experiments.run import configuration, folders
from experiments.run.components import task_class
from experiments.sweep import studies
from tests.docs.pages import DOCS, ROOT, blocks

CHOICES = {
    group: [path.stem for path in (ROOT / "conf" / group).glob("*.yaml")]
    for group in ("task", "backend", "model", "linear_solver", "optimizer")
}
EXTEND = blocks((DOCS / "harness" / "extend.md").read_text())
FILES = {
    match[1]: block.text
    for block in EXTEND
    if block.language == "yaml" and (match := re.match(r"# (\S+)\n", block.text))
}


def test_every_column_is_explained():
    page = (DOCS / "harness" / "run.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    declared = [task_class(configuration.compose([f"task={task}"])).columns for task in CHOICES["task"]]
    for column in {*folders.COLUMNS, *(name for columns in declared for name in columns)}:
        assert f"`{column}`" in rows


@pytest.mark.parametrize("group", CHOICES)
def test_every_choice_is_listed(group):
    page = (DOCS / "harness" / "run.md").read_text()
    (row,) = re.findall(rf"^\| `{group}` \| (.*) \|$", page, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(CHOICES[group])


def test_the_files_of_the_project_have_names_of_their_own():
    assert not [name for name in FILES if (ROOT / name).exists()]


def test_every_key_for_a_file_is_explained():
    page = (DOCS / "harness" / "your-data.md").read_text()
    keys = [key for key in folders.ADDED if key.startswith("task.")]
    assert len(keys) > 10
    for key in keys:
        assert f"| `{key}` |" in page


def test_the_table_of_losses_is_that_of_the_code():
    page = (DOCS / "harness" / "linear-programs.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)
    shown = [(*row[:2], tuple(re.findall(r"backend\.(\w+)", row[2])), row[3], row[4]) for row in rows]
    answer = {True: "yes", False: "no"}
    assert shown == [
        (name, loss.name, loss.settings, answer[not loss.takes], answer[loss.pooled]) for name, loss in LOSSES.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["smoothed", "fold", "spo_plus"])
def test_the_project_runs_and_learns_as_it_stands(tmp_path, backend):
    (tmp_path / "my_package.py").write_text("\n".join(block.text for block in EXTEND if block.language == "python"))
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    command = [sys.executable, str(ROOT / "run.py"), "--config-dir", str(tmp_path / "conf")]
    chosen = ["task=three_assets", "model=affine", f"backend={backend}", "train.epochs=10", "tracking.mode=disabled"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *chosen, f"paths.runs={tmp_path / 'runs'}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = tmp_path.glob("runs/three_assets/*/summary.json")
    frame = folders.load_metrics(summary.parent)
    regret = frame[frame["split"] == "test"]["regret"].to_numpy()
    assert regret[-1] < 0.5 * regret[0]


def test_the_study_has_the_runs_that_its_file_lists():
    study = studies.parse(yaml.safe_load(FILES["conf/study/more_noise.yaml"]), "more_noise.yaml")
    assert [run.label for run in studies.expand(study, "smoke") if run.seed == 0] == [
        "fold tau=0.1 seed=0",
        "fold tau=1 seed=0",
        "two_stage tau=1 seed=0",
    ]
    assert len(studies.expand(study, "default")) == 2 * 2 * 5
