"""Kills, full disks, damaged files: what a run had written is kept, and its end is that of a run never disturbed."""

import contextlib
import io
import itertools
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from experiments.report.artifacts import Artifacts
from experiments.run import configuration, folders
from experiments.run.checkpoint import Checkpoint
from experiments.run.components import trained
from experiments.run.execution import execute
from experiments.sweep.pool import execute as execute_all
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError
from tests.drawn import properties

pytestmark = pytest.mark.slow

QUICK = ["task.n_train=16", "task.n_val=4", "task.n_test=4", "train.epochs=3", "train.batch_size=8", "device=cpu"]
RUNS = 26  # of two kills each
parts = st.floats(0, 1)


def composed(path, *overrides):
    return configuration.compose([*QUICK, "tracking.mode=disabled", f"paths.runs={path}", *overrides])


def quiet():
    return Console(file=io.StringIO(), width=300)


def untimed(folder):
    frame = folders.load_metrics(folder)
    return frame.drop(columns=[name for name in frame if name.startswith("seconds_")])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cfg = composed(tmp_path_factory.mktemp("undisturbed"))
    assert execute(cfg, quiet()) == 0
    return folders.of(cfg)


def in_child(call):
    """Run `call` in a fork of this process; return its wait status."""
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            code = call()
        os._exit(code)
    return os.waitpid(child, 0)[1]


def dying(events, torn=0.0):
    """Kill this process by SIGKILL at its `events`-th file operation; of what a sync was to save, a part is written."""
    countdown, sync, saved = itertools.count(1), os.fsync, {}

    def die_at(event, arguments):
        if event == "open" and os.path.exists(arguments[0]):
            found = os.stat(arguments[0])
            saved[found.st_ino] = found.st_size if arguments[1] == "a" else 0
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and next(countdown) == events:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor):
        if next(countdown) == events:
            found = os.fstat(descriptor)
            least = saved.get(found.st_ino, 0)
            os.ftruncate(descriptor, least + int(torn * (found.st_size - least)))
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(die_at)


def finished_equal(cfg, undisturbed):
    """Bring the run to its end and compare."""
    console = quiet()
    assert execute(cfg, console) == 0, console.file.getvalue()
    folder = folders.of(cfg)
    pd.testing.assert_frame_equal(untimed(folder), untimed(undisturbed), check_exact=True)
    ended, expected = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, undisturbed))
    for name, weight in expected["model"].items():
        assert torch.equal(ended["model"][name], weight)
    ended, expected = (folders.load_summary(path)["final"]["test"] for path in (folder, undisturbed))
    assert ended["regret"] == expected["regret"]


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["timer-file", "file-timer"])
@settings(properties, max_examples=RUNS // 2)
@given(moments=st.tuples(parts, parts), torn=parts)
def test_a_kill_at_any_moment_changes_no_number(tmp_path_factory, undisturbed, order, moments, torn):
    """Each run is killed twice: by a timer, mostly in computing, and while it opens, writes or renames a file."""
    cfg = composed(tmp_path_factory.mktemp("killed"))
    folder = folders.of(cfg)
    for by_timer, moment in zip(order, moments, strict=True):

        def run(by_timer=by_timer, moment=moment):
            if by_timer:
                signal.setitimer(signal.ITIMER_REAL, 0.005 + 0.25 * moment)
            else:
                dying(1 + int(45 * moment), torn)
            return execute(cfg, quiet())

        before = (folder / "summary.json").stat() if folders.status(folder) == "finished" else None
        status = in_child(run)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if before:
            assert (folder / "summary.json").stat() == before, "a finished run is not repeated"
        whole(folder)
    finished_equal(cfg, undisturbed)


def whole(folder):
    """Everything that a run reads is either absent or whole."""
    if (folder / "summary.json").is_file():
        assert folders.load_summary(folder)["status"] == "finished"
    if (folder / "config.yaml").is_file():
        assert (folder / "config.yaml").read_text().endswith("\n")
    if (folder / "checkpoint.pt").is_file():
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] >= 0
        trained(folder)


@pytest.mark.parametrize("events", range(1, 7))
def test_a_kill_while_a_figure_is_written_leaves_the_old_or_the_new_one(tmp_path, events):
    old, new = b"old" * 1000, b"new" * 5000
    Artifacts(tmp_path).write("figures/a.png", old)

    def write():
        dying(events, torn=0.3)
        Artifacts(tmp_path).write("figures/a.png", new)
        return 0

    in_child(write)
    assert (tmp_path / "figures/a.png").read_bytes() in (old, new)
    Artifacts(tmp_path).write("figures/a.png", new)
    assert (tmp_path / "figures/a.png").read_bytes() == new
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["a.png"]


@pytest.mark.parametrize("limit", [0, 300, 2000, 20_000])
def test_a_full_disk_is_said_and_costs_nothing(tmp_path, undisturbed, limit):
    """No file may grow beyond `limit` bytes: the system refuses as a full disk does, in the middle of a write."""
    cfg = composed(tmp_path)

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        console = quiet()
        code = execute(cfg, console)
        return code + ("cannot be written (File too large). Make room on its disk" in console.file.getvalue())

    assert os.WEXITSTATUS(in_child(run)) == 2
    folder = folders.of(cfg)
    assert folders.status(folder) in ("missing", "interrupted", "failed")
    assert list(folder.glob("*.new")) == []
    finished_equal(cfg, undisturbed)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    def run():
        if os.geteuid() == 0:
            os.setuid(65534)
        console = quiet()
        code = execute(composed(tmp_path / "locked" / "runs"), console)
        said = console.file.getvalue()
        return code + ("cannot be written (Permission denied)" in said and "choose another paths.runs" in said)

    (tmp_path / "locked").mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if os.access(parent, os.W_OK) and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    assert os.WEXITSTATUS(in_child(run)) == 2
    assert list((tmp_path / "locked").iterdir()) == []


def interrupted(tmp_path):
    """A run that was killed after its first checkpoint."""
    cfg = composed(tmp_path)
    folder = folders.of(cfg)

    def run():
        save = Checkpoint.save

        def save_and_die(self, epoch, *arguments):
            save(self, epoch, *arguments)
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoint.save = save_and_die
        return execute(cfg, quiet())

    assert os.WTERMSIG(in_child(run)) == signal.SIGKILL
    assert folders.status(folder) == "interrupted"
    return cfg, folder


def damage(path, kind):
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": content[: len(content) // 2],
            "garbage": bytes(255 - byte for byte in content),
            "flipped": content[:200] + bytes([content[200] ^ 255]) + content[201:],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "half", "garbage"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.csv"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, undisturbed, name, kind):
    cfg, folder = interrupted(tmp_path)
    damage(folder / name, kind)
    console = quiet()
    assert execute(cfg, console) == 1
    assert f"{folder / name}" in console.file.getvalue()
    assert "Restore it, or delete the folder" in console.file.getvalue()
    assert (folder / name).stat().st_size == {"empty": 0}.get(kind, (folder / name).stat().st_size), "left as it was"
    if name == "checkpoint.pt":
        with pytest.raises(InputError, match="cannot be read"):
            trained(folder)
    for path in folder.iterdir():
        path.unlink()
    finished_equal(cfg, undisturbed)


def test_a_metrics_file_that_lost_rows_is_not_read_as_whole(tmp_path, undisturbed):
    cfg = composed(tmp_path)
    assert execute(cfg, quiet()) == 0
    file = folders.of(cfg) / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"has 10 rows, but this run made 11"):
        folders.load_metrics(file.parent)
    file.write_text("".join(lines)[:-30])
    with pytest.raises(InputError, match="a row is cut off"):
        folders.load_metrics(file.parent)


def test_a_damaged_summary_is_made_again_from_the_checkpoint(tmp_path, undisturbed):
    cfg = composed(tmp_path)
    assert execute(cfg, quiet()) == 0
    folder = folders.of(cfg)
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    for text in ("", '{"status": "fin', "[]"):
        (folder / "summary.json").write_text(text)
        assert folders.status(folder) == "interrupted"
        finished_equal(cfg, undisturbed)
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint, "no epoch was repeated"


def test_killed_reproduction_and_workers_go_on_and_repeat_nothing(tmp_path, undisturbed):
    """SIGKILL to all processes of it, as a machine that goes down does, once a run is finished and another is not."""
    overrides = [*QUICK, "tracking.mode=disabled", f"paths.runs={tmp_path}"]
    configs = [composed(tmp_path, f"seed={seed}") for seed in range(2)]
    plan = [
        StudyRun("tiny", "fold", f"seed={seed}", {}, seed, (*overrides, f"seed={seed}"), cfg, folders.of(cfg))
        for seed, cfg in enumerate(configs)
    ]

    def reproduce():
        os.setsid()
        return execute_all(plan, workers=1, console=quiet()).exit_code

    child = os.fork()
    if child == 0:
        os._exit(reproduce())
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob("*/*/summary.json"))):
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished = {path: path.stat().st_mtime_ns for path in done}
    assert os.WEXITSTATUS(in_child(reproduce)) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == finished, "a finished run is not repeated"
    for seed in range(2):
        assert folders.load_summary(plan[seed].folder)["status"] == "finished"
    pd.testing.assert_frame_equal(untimed(plan[0].folder), untimed(undisturbed), check_exact=True)
