"""Executes the runs of a study in parallel worker processes, resumable, with one display."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path

from rich.console import Console

from experiments.run import configuration, folders
from experiments.run.interruption import BUSY, STOP_CODES, StopRequest
from experiments.sweep.progress import Display, TimeEstimate
from experiments.sweep.studies import StudyRun
from foldopt.errors import InputError

RunOne = Callable[[list[str]], int]
GRACE_SECONDS = 120.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass
class Report:
    """The outcome of the planned runs.

    failed: each failed run with the reason and the place of its traceback. elsewhere: runs that another process
    executes, on a cluster for example. unfinished: runs left to do after a stop.
    """

    skipped: list[StudyRun] = field(default_factory=list)
    finished: list[StudyRun] = field(default_factory=list)
    failed: list[tuple[StudyRun, str]] = field(default_factory=list)
    elsewhere: list[StudyRun] = field(default_factory=list)
    unfinished: list[StudyRun] = field(default_factory=list)
    stopped_by: int | None = None
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 all finished, 1 some failed, 128 + signal (130 for Ctrl-C) when stopped, 75 some executed elsewhere."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        return 1 if self.failed else BUSY if self.elsewhere else 0

    def lines(self) -> list[str]:
        """Return the summary, one sentence a line."""
        if not (self.finished or self.failed or self.elsewhere or self.unfinished):
            return [f"Nothing to do: all {len(self.skipped)} runs are finished."]
        text = [
            f"{len(self.finished)} runs finished in {self.seconds:.0f} s, "
            f"{len(self.skipped)} were finished before, {len(self.failed)} failed, "
            f"{len(self.unfinished)} are still to do."
        ]
        text += [f"FAILED {run.label}: {reason}" for run, reason in self.failed]
        text += [f"ELSEWHERE {run.label}: another process executes it" for run in self.elsewhere]
        if self.stopped_by is not None:
            name = signal.Signals(self.stopped_by).name
            text.append(f"Stopped by {name}; the same command goes on from where each run was.")
        return text


def run_overrides(overrides: list[str], wait: bool = False) -> int:
    """Execute one run in this process exactly as `python run.py <overrides>` does; return its exit code.

    wait: as for experiments.run.execution.execute.
    """
    from experiments.run.execution import execute as execute_run

    return execute_run(configuration.compose(overrides), wait=wait)


def _serve(pipe: connection.Connection, run_one: RunOne) -> None:
    """Worker process: execute runs one after the other until the pipe says None or its other end is gone."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while (task := pipe.recv()) is not None:
            overrides, folder = task
            with _output_to(folder / "output.txt"):
                code, reason = attempt(run_one, overrides, folder)
            pipe.send((code, reason))


def attempt(run_one: RunOne, overrides: list[str], folder: Path) -> tuple[int, str]:
    """Return the exit code of a run and the reason if it failed; the traceback of an exception goes to error.txt."""
    try:
        code = run_one(overrides)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        folders.write_atomically(folder / "error.txt", traceback.format_exc())
        return 1, f"{type(error).__name__}: {error} (traceback in {folder / 'error.txt'})"
    if code == 0 or code in STOP_CODES:
        return code, ""
    where = next((folder / name for name in ("error.txt", "output.txt", "log.txt") if (folder / name).exists()), folder)
    return code, f"exit code {code}, see {where}"


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send stdout and stderr of this process, C libraries included, to `path`; drop it when empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        if path.exists() and path.stat().st_size == 0:
            path.unlink()


class _Worker:
    """The parent's side of one worker process; `gpu` is the one that it sees, None: whatever there is."""

    def __init__(self, run_one: RunOne, gpu: str | None) -> None:
        context = get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote, run_one), daemon=True)
        self.run: StudyRun | None = None
        self.started, self.gpu = 0.0, gpu
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with thread_environment(), _environment(visible), _sigint_blocked():
            self.process.start()
        remote.close()

    def give(self, run: StudyRun) -> None:
        self.run, self.started = run, time.monotonic()
        self.pipe.send((list(run.overrides), run.folder))

    def result(self) -> tuple[int, str]:
        """Return exit code and reason of the current run; a dead process is a result too."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            return _shell_code(code), f"its worker process died with exit code {code}"

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    def dismiss(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)


def _shell_code(code: int | None) -> int:
    """Return the exit code that a shell gives a dead process: 128 + n after signal n, and never 0."""
    return 128 - code if code is not None and code < 0 else code or 1


def thread_environment(threads: int = 1) -> contextlib.AbstractContextManager[None]:
    """Let processes that are started inside use so many threads each."""
    return _environment(dict.fromkeys(THREAD_VARIABLES, str(threads)))


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Let a child inherit a blocked SIGINT: Ctrl-C then reaches only the parent, which stops the rest."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def execute(
    planned: Sequence[StudyRun],
    *,
    workers: int = 2,
    run_one: RunOne = run_overrides,
    console: Console | None = None,
) -> Report:
    """Bring every planned run to its end and report.

    Finished runs are skipped, interrupted ones resumed by `run_one`, failed ones tried again; one that fails
    does not stop the others. `run_one(overrides) -> exit code` must be importable: it runs in spawned worker
    processes of one thread each and, where there are GPUs, of one GPU each. SIGINT or SIGTERM ends the running
    runs at a resumable point, a second one kills them. Raises InputError for `workers` below 1.
    """
    if workers < 1:
        raise InputError(f"workers={workers} must be at least 1")
    console = console or Console()
    report = Report()
    estimate = TimeEstimate(workers)
    pending: deque[StudyRun] = deque()
    for run in planned:
        if folders.status(run.folder) == "finished":
            report.skipped.append(run)
            estimate.learn_from(run)
        else:
            pending.append(run)
    if not pending:
        return report
    begin = time.monotonic()
    with StopRequest() as stop, Display(console, len(planned), len(report.skipped), estimate) as display:
        _loop(pending, min(workers, len(pending)), run_one, report, display, stop)
    report.stopped_by = stop.signal if report.unfinished else None
    report.seconds = time.monotonic() - begin
    return report


def _loop(
    pending: deque[StudyRun],
    workers: int,
    run_one: RunOne,
    report: Report,
    display: Display,
    stop: StopRequest,
) -> None:
    gpus: Sequence[str | None] = _gpus() or [None]
    crew = [_Worker(run_one, gpus[number % len(gpus)]) for number in range(workers)]
    stop_sent: float | None = None
    try:
        while True:
            if stop.signal is None:
                _hand_out(crew, pending, run_one, display)
            busy = _busy(crew)
            if not busy:
                break
            if stop.signal is not None and stop_sent is None:
                stop_sent = time.monotonic()
                display.note("Stopping: each run saves its state and can be resumed. Once more to kill them.")
                for worker, _ in busy:
                    worker.process.terminate()
            if stop.count > 1 or (stop_sent is not None and time.monotonic() - stop_sent > GRACE_SECONDS):
                for worker, _ in busy:
                    worker.process.kill()
            for pipe in connection.wait([worker.pipe for worker, _ in busy], timeout=0.25):
                worker, run = next((worker, run) for worker, run in busy if worker.pipe is pipe)
                _settle(worker, run, stop, report, display)
            display.refresh(list(pending), [(run, worker.started) for worker, run in _busy(crew)])
    finally:
        report.unfinished.extend(pending)
        for worker in crew:
            worker.dismiss()
        for worker in crew:
            worker.process.join(timeout=10)
            if worker.alive:
                worker.process.kill()


def _busy(crew: Sequence[_Worker]) -> list[tuple[_Worker, StudyRun]]:
    return [(worker, worker.run) for worker in crew if worker.run is not None]


def _hand_out(crew: list[_Worker], pending: deque[StudyRun], run_one: RunOne, display: Display) -> None:
    for position, worker in enumerate(crew):
        if worker.run is None and pending:
            if not worker.alive:
                crew[position] = worker = _Worker(run_one, worker.gpu)
            run = pending.popleft()
            worker.give(run)
            display.started(run)


def _settle(worker: _Worker, run: StudyRun, stop: StopRequest, report: Report, display: Display) -> None:
    seconds = time.monotonic() - worker.started
    worker.run = None
    code, reason = worker.result()
    if code == 0 and (status := folders.status(run.folder)) != "finished":
        code, reason = 1, f"it returned 0 but its folder {run.folder} is {status}"
    if code == 0:
        report.finished.append(run)
        display.ended(run, "finished", seconds)
    elif code == BUSY:
        report.elsewhere.append(run)
        display.ended(run, "executed elsewhere", seconds)
    elif stop.signal is not None and (code in STOP_CODES or not worker.alive):
        report.unfinished.append(run)
        display.ended(run, "interrupted", seconds)
    else:
        report.failed.append((run, reason or f"it stopped by itself with exit code {code}"))
        display.ended(run, "failed", seconds, reason)
