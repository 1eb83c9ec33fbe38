"""Who may import whom in the harness, read from the sources: a study knows no other study, a table no figure."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ("portfolio", "denoising", "bilinear", "multilabel")
SHARED = ("contracts", "numerics", "run", "sweep", "report", "backends", "models")
SOURCES = sorted((ROOT / "experiments").rglob("*.py"))


def imported(source):
    """Yield the dotted names of the modules of this project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def forbidden(source):
    """Return why a file must not import what it imports, one line an import."""
    parts = source.relative_to(ROOT / "experiments").parts
    found = []
    for name in imported(source):
        target = name.split(".")
        if target[0] == "scripts" or (target[0] == "experiments" and len(target) < 2):
            found.append(f"{name}: a module of the harness imports no script")
        if target[0] != "experiments":
            continue
        of_study = target[1] in (*STUDIES, "across_studies")
        if parts[0] in STUDIES and of_study and target[1] != parts[0]:
            found.append(f"{name}: a study imports no other study")
        if parts[0] in SHARED and of_study:
            found.append(f"{name}: {parts[0]}/ serves every study and knows none")
        if parts[0] == "numerics" and target[1] != "numerics":
            found.append(f"{name}: numerics/ knows nothing of the harness")
        if parts[0] == "run" and target[1] in ("sweep", "report"):
            found.append(f"{name}: one run knows nothing of sweeps and reports")
        if parts[0] == "sweep" and target[1] == "report":
            found.append(f"{name}: a sweep makes no report")
        if len(parts) > 1 and {parts[1], *target[2:3]} == {"figures", "tables"}:
            found.append(f"{name}: tables and figures do not import each other")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_imports_follow_the_rules(source):
    assert forbidden(source) == []


def test_the_library_knows_nothing_of_the_harness():
    for source in (ROOT / "foldopt").rglob("*.py"):
        assert not [name for name in imported(source) if name.split(".")[0] in ("experiments", "data", "scripts")], (
            source
        )


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("portfolio/task.py", "from experiments.denoising.problem import differencing"),
        ("bilinear/series.py", "from experiments.across_studies import scaling"),
        ("report/style.py", "from experiments.multilabel import series"),
        ("numerics/blocks.py", "from experiments.run import folders"),
        ("run/trainer.py", "def late():\n    from experiments.sweep.studies import load"),
        ("sweep/pool.py", "import experiments.report.page"),
        ("denoising/tables/mse.py", "from experiments.denoising.figures import figure_4b"),
        ("denoising/figures/figure_4b.py", "from experiments.denoising.tables.mse import summarize"),
        ("models/mlp.py", "import scripts.figures"),
    ],
)
def test_the_rules_see_what_they_should(monkeypatch, tmp_path, place, line):
    source = tmp_path / "experiments" / place
    source.parent.mkdir(parents=True)
    source.write_text(f"{line}\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert len(forbidden(source)) == 1


def test_every_study_has_the_same_rooms():
    for study in STUDIES:
        folder = ROOT / "experiments" / study
        rooms = {path.name for path in folder.iterdir()}
        assert {"problem.py", "task.py", "claims.py", "figures", "tables"} <= rooms, study
