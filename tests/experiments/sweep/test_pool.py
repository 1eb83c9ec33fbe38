import importlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments.run import folders
from experiments.sweep.pool import execute
from experiments.sweep.progress import TimeEstimate, duration
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]

FAKE_RUN = """
import json, os, signal, time
from pathlib import Path

def run_one(overrides):
    settings = dict(text.split("=", 1) for text in overrides)
    folder = Path(settings["folder"])
    with (folder / "calls.txt").open("a") as calls:
        calls.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    print("said by", settings["do"])
    match settings["do"]:
        case "raise":
            raise ValueError("deliberate")
        case "fail":
            return 3
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "lie":
            return 0
        case "elsewhere":
            return 75
        case "wait":
            def stop(number, frame):
                (folder / "checkpoint.pt").write_text("saved")
                raise SystemExit(143)
            signal.signal(signal.SIGTERM, stop)
            (folder / "running").touch()
            time.sleep(60)
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds_wall": 1.5}))
    return 0
"""


@pytest.fixture
def run_one(tmp_path, monkeypatch):
    (tmp_path / "fake_study_run.py").write_text(FAKE_RUN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_study_run", raising=False)
    return importlib.import_module("fake_study_run").run_one


def planned(root: Path, **does: str) -> list[StudyRun]:
    return [
        StudyRun("tiny", "fold", name, {}, 0, (f"do={do}", f"folder={root / name}"), None, root / name)
        for name, do in does.items()
    ]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_all_finish_in_one_long_lived_worker_and_a_second_call_does_nothing(tmp_path, run_one):
    plan = planned(tmp_path, a="work", b="work", c="work")
    console = quiet()
    report = execute(plan, workers=1, run_one=run_one, console=console)
    assert report.exit_code == 0
    assert [run.label for run in report.finished] == ["a", "b", "c"]
    assert console.file.getvalue().count("finished in") == 3
    assert (tmp_path / "a" / "output.txt").read_text() == "said by work\n"
    calls = [(tmp_path / name / "calls.txt").read_text().split() for name in "abc"]
    assert len({process for process, *_ in calls}) == 1
    assert {threads for _, threads, _ in calls} == {"1"}
    assert str(os.getpid()) not in {process for process, *_ in calls}

    again = execute(plan, workers=2, run_one=run_one, console=quiet())
    assert again.exit_code == 0
    assert again.lines() == ["Nothing to do: all 3 runs are finished."]
    assert all(len((tmp_path / name / "calls.txt").read_text().splitlines()) == 1 for name in "abc")


def test_failures_are_reported_and_do_not_stop_the_others(tmp_path, run_one):
    plan = planned(tmp_path, a="raise", b="fail", c="die", d="lie", e="work")
    report = execute(plan, workers=1, run_one=run_one, console=quiet())
    assert report.exit_code == 1
    assert [run.label for run in report.finished] == ["e"]
    reasons = {run.label: reason for run, reason in report.failed}
    assert "ValueError: deliberate" in reasons["a"]
    assert "ValueError: deliberate" in (tmp_path / "a" / "error.txt").read_text()
    assert "Traceback" in (tmp_path / "a" / "error.txt").read_text()
    assert "exit code 3" in reasons["b"]
    assert "died with exit code -9" in reasons["c"]
    assert "returned 0 but its folder" in reasons["d"]
    assert sum(line.startswith("FAILED") for line in report.lines()) == 4


def test_what_another_process_executes_is_left_to_it(tmp_path, run_one):
    report = execute(planned(tmp_path, a="elsewhere", b="work"), workers=1, run_one=run_one, console=quiet())
    assert report.exit_code == 75
    assert [run.label for run in report.elsewhere] == ["a"]
    assert "ELSEWHERE a: another process executes it" in report.lines()


def test_each_worker_gets_one_of_the_gpus_in_turn(tmp_path, run_one, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f6d")
    assert execute(planned(tmp_path, a="work", b="work", c="work"), workers=3, run_one=run_one).exit_code == 0
    gpus = [(tmp_path / name / "calls.txt").read_text().split()[2] for name in "abc"]
    assert sorted(gpus) == ["3", "3", "GPU-8f6d"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_leaves_resumable_runs(tmp_path, number, code):
    (tmp_path / "fake_study_run.py").write_text(FAKE_RUN)
    (tmp_path / "main.py").write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from experiments.sweep.pool import execute
        from experiments.sweep.studies import StudyRun
        from fake_study_run import run_one

        if __name__ == "__main__":
            root = Path({str(tmp_path)!r})
            plan = [StudyRun("tiny", "fold", n, {{}}, 0, ("do=wait", f"folder={{root / n}}"), None, root / n)
                    for n in "abc"]
            report = execute(plan, workers=2, run_one=run_one)
            print(*report.lines(), sep="\\n")
            sys.exit(report.exit_code)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not all((tmp_path / name / "running").exists() for name in "ab"):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command goes on" in output
    assert "3 are still to do" in output
    assert [folders.status(tmp_path / name) for name in "abc"] == ["interrupted", "interrupted", "missing"]


def test_estimate_learns_per_series():
    estimate = TimeEstimate(workers=2)
    assert estimate.remaining(["fold"], []) is None
    estimate.learn("fold", 2.0)
    estimate.learn("fold", 4.0)
    estimate.learn("two_stage", 1.0)
    assert estimate.expected("fold") == pytest.approx(3.0)
    assert estimate.expected("cvxpylayers") == pytest.approx(7 / 3)
    assert estimate.remaining(["fold", "fold", "two_stage"], [("fold", 2.0), ("two_stage", 5.0)]) == pytest.approx(4.0)
    assert estimate.remaining([], [("fold", 1.0)]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown time"), (5.4, "5 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_workers_must_be_positive():
    with pytest.raises(InputError, match="workers=0"):
        execute([], workers=0)
