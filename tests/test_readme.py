"""Everything the README shows runs, and its numbers are those of the committed tables."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foldopt
from experiments.run import configuration, folders
from experiments.run.components import task_class
from scripts import sweep

TASKS = ("portfolio", "denoising", "bilinear", "multilabel")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    ("number", "printed"),
    [
        (0, ["tensor([[ 2.5000,  0.0000, -1.5000]]", "tensor([[1., 0., 1.]]", "tensor(0.", "tensor([True])"]),
        (1, ["[0.5000, 0.5000, 0.0000]", "[-0.5000,  0.5000,  0.0000]"]),
        (2, ["('solved',) ('differentiable',)"]),
        (3, ["tensor([[1.0000, 1.5000]]", "[[1., -0.]", "[-0.8936,  0.6944]"]),
        (4, ["tensor([[0.0900, 0.2447, 0.6652]])", "tensor([[ 0.0819, -0.0220, -0.0599]])"]),
    ],
)
def test_examples_print_what_their_comments_say(number, printed, tmp_path):
    output = without_signs_of_zero(run(blocks("python")[number], tmp_path))
    for text in printed:
        assert without_signs_of_zero(text) in output


def without_signs_of_zero(text):
    """Also without the space that a sign of another entry leaves: both are the rounding of the machine."""
    return re.sub(r"\[ +", "[", re.sub(r"-0\.(?!\d)", "0.", text))


def test_the_report_is_the_one_shown(tmp_path):
    """Up to rounding errors, which are the machine's."""

    def without_errors(text):
        return re.sub(r"\d\.\de-\d+", "tiny", text.strip())

    assert without_errors(run(blocks("python")[5], tmp_path)) == without_errors(blocks("text")[0])


def run(code, folder):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["smoothed", "fold", "spo_plus"])
def test_extensions_run_and_learn_as_they_stand(tmp_path, backend):
    (tmp_path / "my_package.py").write_text("\n".join(blocks("python")[6:]))
    for content in blocks("yaml"):
        path = tmp_path / re.match(r"# (\S+)\n", content)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    command = [sys.executable, str(ROOT / "run.py"), "--config-dir", str(tmp_path / "conf")]
    chosen = ["task=three_assets", "model=linear", f"backend={backend}", "train.epochs=10", "tracking.mode=disabled"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *chosen, f"paths.runs={tmp_path / 'runs'}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = tmp_path.glob("runs/three_assets/*/summary.json")
    frame = folders.load_metrics(summary.parent)
    regret = frame[frame["split"] == "test"]["regret"].to_numpy()
    assert regret[-1] < 0.5 * regret[0]


def test_commands_exist():
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", README, re.MULTILINE))
    assert targets >= {"reproduce", "test"}
    known = subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=ROOT, capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    for line in re.findall(r"^python run\.py (?!-|\+tuned)(.+)$", README, re.MULTILINE):
        configuration.compose(line.split())
    for line in re.findall(r"^python -m scripts\.sweep (.+)$", README, re.MULTILINE):
        sweep.parser().parse_args(line.split())


def test_every_column_is_explained():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    declared = [task_class(configuration.compose([f"task={task}"])).columns for task in TASKS]
    for column in {*folders.COLUMNS, *(name for columns in declared for name in columns)}:
        assert f"`{column}`" in rows


@pytest.mark.parametrize(
    "table",
    [
        *("figure_4c", "portfolio_settings", "solver_accuracy", "figure_4a"),
        *("bilinear_kappa", "bilinear_certificates"),
        *("figure_4b", "figure_4b_best", "denoising_cost", "denoising_ratios", "peers"),
        *("figure_3", "figure_7_stand_in", "topk_layers", "layer_share", "scaling", "targets"),
    ],
)
def test_tables_are_the_committed_ones(table):
    """As committed: results/ in the working tree may hold those of the machine it was reproduced on."""
    folder = "bench" if table == "targets" else "tables"
    show = ["git", "-C", str(ROOT), "show", f"HEAD:results/{folder}/{table}.md"]
    done = subprocess.run(show, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.strip() in README


def test_linked_files_exist():
    for target in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_claim_of_the_tables_has_its_test():
    rows = [line for line in README.splitlines() if line.startswith("| ") and "`test_" in line]
    claims = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) >= 12 + 25  # of the comparison, and of what may go wrong
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert claims <= defined, claims - defined


def paths():
    """The numbered lists of CONTRIBUTING: of each the lines, (file, names of functions and classes)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lists = re.split(r"^(?=1\. `)", text, flags=re.MULTILINE)[1:]
    lines = [re.findall(r"^\d+\. `([^`]+\.py)`: (.+)$", part, re.MULTILINE) for part in lists]
    return [[(path, re.findall(r"`(\w+)`", said)) for path, said in part] for part in lines]


@pytest.mark.parametrize("number", [0, 1])
def test_the_paths_through_the_house_are_told_truly(number):
    steps = paths()[number]
    assert len(steps) == 10
    rooms = [ROOT / "run.py", *(path for room in ("foldopt", "experiments") for path in (ROOT / room).rglob("*.py"))]
    defined = {str(path.relative_to(ROOT)): set(re.findall(r"(?:def|class) (\w+)", path.read_text())) for path in rooms}
    for path, names in steps:
        assert names[0] in defined[path], path
        assert set(names) <= set.union(*defined.values()), names


def test_a_call_of_a_layer_goes_the_way_that_is_told():
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append((frame.f_code.co_filename, frame.f_code.co_name))

    p = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    layer = foldopt.QPLayer()
    sys.setprofile(note)
    try:
        layer(torch.eye(3), p, A=torch.ones(1, 3), b=torch.ones(1), lower=0).sum().backward()
    finally:
        sys.setprofile(None)
    seen = iter(called)
    for path, names in paths()[0]:
        assert any(file.endswith(path) and name == names[0] for file, name in seen), (path, names[0])
