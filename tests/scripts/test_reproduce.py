import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from experiments.report import reproduction
from experiments.run import folders
from experiments.sweep import studies
from experiments.sweep.pool import Report
from foldopt.errors import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def broken(monkeypatch) -> set[str]:
    """Names of the studies whose outputs cannot be made."""

    def fails(outputs):
        raise KeyError("centred_filter")

    monkeypatch.setitem(sys.modules, "broken", SimpleNamespace(make=fails))
    return set()


@pytest.fixture
def made(monkeypatch, tmp_path, broken) -> list[str]:
    """Replace every maker of outputs by one that only notes its call."""
    made = []
    noted = SimpleNamespace(make=lambda given: made.append(given.command))
    monkeypatch.setitem(sys.modules, "noted", noted)
    load = studies.load

    def loaded(name):
        measured = {"solver-table": "noted"} if name == "figure_4c" else {}
        outputs = ("broken" if name in broken else "noted",)
        return dataclasses.replace(load(name), outputs=outputs, measurements=measured)

    monkeypatch.setattr(studies, "load", loaded)
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


def test_a_figure_that_cannot_be_made_is_explained_and_stops_no_other(monkeypatch, made, broken, console):
    executing(monkeypatch)
    broken.add("figure_4c")
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
    assert all(studies.load(name).outputs for name in studies.names())
    for name in studies.names():
        assert f"scripts.figures --study {name} --profile smoke" in recipe(studies.load(name).target)
    for target in reproduction.measurements():
        assert f"scripts.measure {target} --profile smoke" in recipe(target)
    assert "scripts.reproduce --profile smoke" in recipe("reproduce")


def recipe(target):
    command = ["make", "-n", "-o", ".venv/.installed", target, "PROFILE=smoke"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_unknown_measurement_is_named(console):
    with pytest.raises(InputError, match=r"measurement='solver' is in no study; choose one of .*solver-table"):
        reproduction.measure("solver", "smoke", console)


@pytest.mark.parametrize("script", ["reproduce", "figures", "measure"])
def test_scripts_explain_themselves(script):
    environment = {**os.environ, "COLUMNS": "110"}
    command = [sys.executable, "-m", f"scripts.{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "--profile {smoke,default,paper}" in done.stdout
