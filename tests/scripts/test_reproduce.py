import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from experiments.report import reproduction
from experiments.report.artifacts import Artifacts
from experiments.run import folders
from experiments.sweep import studies
from experiments.sweep.pool import Report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[str]:
    """Replace every maker of outputs by one that only notes its call."""
    made = []
    makers = (lambda study, planned, artifacts, command, run_command: made.append(command),)
    monkeypatch.setattr(reproduction, "FIGURES", {"figure_4c": makers, "portfolio_settings": makers})
    measured = {"figure_4c": {"solver-table": lambda profile, command: made.append(command) or Artifacts(tmp_path)}}
    monkeypatch.setattr(reproduction, "MEASUREMENTS", measured)
    monkeypatch.setattr(reproduction, "provenance", lambda planned: "{}\n")
    monkeypatch.setattr(reproduction, "output_root", lambda profile: tmp_path)
    return made


def executing(monkeypatch, **outcome) -> None:
    def execute(planned, *, workers, console):
        fields = {"failed": [(planned[0], "boom")]} if outcome.get("fails") else {"skipped": list(planned)}
        return Report(**fields, stopped_by=outcome.get("stopped_by"))

    monkeypatch.setattr(reproduction, "execute", execute)


def test_finished_studies_get_their_outputs(monkeypatch, made, console):
    executing(monkeypatch)
    assert reproduction.reproduce(["figure_4c"], "smoke", 1, console) == 0
    assert made == ["make figure-4c PROFILE=smoke", "make solver-table PROFILE=smoke"]
    assert "Nothing to do: all" in console.file.getvalue()


def test_a_study_with_failed_runs_gets_no_figure_and_the_exit_code_says_so(monkeypatch, made, console):
    executing(monkeypatch, fails=True)
    assert reproduction.reproduce(["figure_4c"], "default", 1, console) == 1
    assert made == ["make solver-table"]
    assert "FAILED" in console.file.getvalue()


def test_a_figure_that_cannot_be_made_is_explained_and_stops_no_other(monkeypatch, made, console):
    def broken(study, planned, artifacts, command, run_command):
        raise KeyError("centred_filter")

    executing(monkeypatch)
    monkeypatch.setitem(reproduction.FIGURES, "figure_4c", (broken,))
    assert reproduction.reproduce(["figure_4c", "portfolio_settings"], "default", 1, console) == 1
    assert made == ["make portfolio-settings", "make solver-table"]
    said = console.file.getvalue()
    assert "No figures or tables of figure_4c:" in said
    assert "KeyError: 'centred_filter'" in said


def test_a_stop_makes_nothing(monkeypatch, made, console):
    executing(monkeypatch, stopped_by=2)
    assert reproduction.reproduce(["figure_4c"], "default", 1, console) == 130
    assert made == []


def test_figures_of_missing_runs_say_how_to_make_them(monkeypatch, console):
    monkeypatch.setattr(folders, "status", lambda folder: "missing")
    assert reproduction.make_figures(["figure_4c"], "smoke", console) == 1
    assert "Make them with: make reproduce PROFILE=smoke" in console.file.getvalue()


def test_every_study_has_outputs_and_every_make_target_exists():
    assert set(reproduction.FIGURES) == set(studies.names())
    makefile = (ROOT / "Makefile").read_text()
    for target in (
        "reproduce",
        "figures",
        *reproduction.measurements(),
        *(name.replace("_", "-") for name in studies.names()),
    ):
        assert f"\n{target}: " in makefile


@pytest.mark.parametrize("script", ["reproduce", "figures", "measure"])
def test_scripts_explain_themselves(script):
    environment = {**os.environ, "COLUMNS": "110"}
    command = [sys.executable, "-m", f"scripts.{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "--profile {smoke,default,paper}" in done.stdout
