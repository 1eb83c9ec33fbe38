"""Sweeps: the runs of a study as Slurm job arrays, detached from the terminal.

The state of a run is in its folder alone. A submission, a folder under <paths.runs>/sweeps, only records which task of
which array executes it. So a sweep can be submitted in parts, repeatedly, and beside `make reproduce`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from experiments.run import configuration, folders
from experiments.run.interruption import STOP_CODES, StopRequest
from experiments.sweep import slurm, studies
from experiments.sweep.metrics import collect
from experiments.sweep.pool import THREAD_VARIABLES, attempt, run_overrides
from experiments.sweep.studies import StudyRun
from foldopt.checks import require_whole

STATES = ("finished", "running", "queued", "failed", "stopped", "missing")


@dataclass(frozen=True)
class Submission:
    """One job array. tasks: for each task the folders of its runs, in the order of execution."""

    folder: Path
    tasks: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The name of the array in Slurm, which is also that of its folder."""
        return self.folder.name

    @property
    def cancelled(self) -> bool:
        """Whether the array was ended by `cancel`."""
        return (self.folder / "cancelled").exists()


@dataclass(frozen=True)
class RunState:
    """The state of a run, one of STATES, with details for the user."""

    run: StudyRun
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Sweep:
    """A study in a profile, and its submissions, oldest first."""

    study: str
    profile: str
    planned: tuple[StudyRun, ...]
    folder: Path

    @classmethod
    def of(cls, study: str, profile: str, series: set[str] | None = None, mode: str | None = None) -> Sweep:
        """Return the sweep of a study, named as `studies.load` takes it, in `profile`; of some `series` only, if given.

        mode: of W&B, for the runs that are submitted; None: as the study says.
        """
        loaded = studies.load(study)
        planned = tuple(studies.expand(loaded, profile, series, mode))
        root = configuration.ROOT / planned[0].config.paths.runs / "sweeps"
        return cls(loaded.name, profile, planned, root / f"{loaded.name}-{profile}")

    def submissions(self) -> list[Submission]:
        """Return all job arrays submitted for this sweep, oldest first."""
        contents = [(path.parent, json.loads(path.read_text())) for path in sorted(self.folder.glob("*/tasks.json"))]
        return [
            Submission(folder, tuple(tuple(run["folder"] for run in task) for task in tasks))
            for folder, tasks in contents
        ]

    def states(self) -> list[RunState]:
        """Return the state of each planned run, from the run folders and one call of squeue."""
        submissions = self.submissions()
        places = {
            folder: (submission, index)
            for submission in submissions
            for index, task in enumerate(submission.tasks)
            for folder in task
        }
        queue = {(task.name, task.index): task for task in slurm.tasks([s.name for s in submissions])}
        return [_state(run, places.get(str(run.folder)), queue) for run in self.planned]

    def submit(self, chosen: Sequence[StudyRun], launcher: DictConfig, runs_per_job: int = 1) -> list[Submission]:
        """Submit these runs, `runs_per_job` in each job, in as few arrays as the cluster allows; return at once."""
        require_whole("runs_per_job", runs_per_job, 1)
        jobs = [chosen[i : i + runs_per_job] for i in range(0, len(chosen), runs_per_job)]
        size = slurm.max_array_size()
        return [self._submit(jobs[i : i + size], launcher) for i in range(0, len(jobs), size)]

    def _submit(self, jobs: Sequence[Sequence[StudyRun]], launcher: DictConfig) -> Submission:
        resources = slurm.options(launcher)
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
        folder = self.folder / f"{self.study}-{self.profile}-{stamp}"
        folder.mkdir(parents=True)
        tasks = [
            [{"label": run.label, "overrides": run.overrides, "folder": str(run.folder)} for run in job] for job in jobs
        ]
        folders.write_atomically(folder / "tasks.json", json.dumps(tasks, indent=1) + "\n")
        array = f"0-{len(jobs) - 1}%{launcher.array_parallelism}"
        options = [
            *(f"--job-name={folder.name}", f"--array={array}", "--requeue", "--open-mode=append"),
            *(f"--output={shlex.quote(f'{folder}/%a.log')}", *resources),
        ]
        script = [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            f"cd {shlex.quote(str(configuration.ROOT))}",
            *(launcher.setup or ()),
            *(f"export {name}=1" for name in THREAD_VARIABLES),
            "# exec: Slurm's warning before the time limit goes to this process",
            f"exec {shlex.quote(sys.executable)} -m scripts.sweep work {shlex.quote(str(folder))}",
        ]
        folders.write_atomically(folder / "job.sh", "\n".join(script) + "\n")
        try:
            slurm.submit(folder / "job.sh")
        except slurm.SlurmError:
            shutil.rmtree(folder)
            raise
        return Submission(folder, tuple(tuple(str(run.folder) for run in job) for job in jobs))

    def cancel(self) -> list[Submission]:
        """Cancel the sweep's jobs in the queue and return their arrays; active runs stop where they can resume."""
        submissions = self.submissions()
        active = {task.name for task in slurm.tasks([s.name for s in submissions])}
        ended = [submission for submission in submissions if submission.name in active]
        for submission in ended:
            (submission.folder / "cancelled").touch()
        slurm.cancel([submission.name for submission in ended])
        return ended

    def collect(self) -> tuple[Path, int]:
        """Write the metrics of all finished runs, a row per run, epoch and split; return the file and their number."""
        finished = [run for run in self.planned if folders.status(run.folder) == "finished"]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.csv"
        folders.write_atomically(path, collect(finished).to_csv(index=False) if finished else "")
        return path, len(finished)


def _state(
    run: StudyRun, place: tuple[Submission, int] | None, queue: dict[tuple[str, int], slurm.ArrayTask]
) -> RunState:
    found = folders.status(run.folder)
    if found == "finished":
        return RunState(run, "finished")
    task = queue.get((place[0].name, place[1])) if place else None
    if task is not None:
        running = task.state == "RUNNING" and found == "interrupted"
        reason = "" if task.reason == "None" else f": {task.reason}"
        return RunState(run, "running" if running else "queued", f"{task.state}{reason} {task.nodes}".strip())
    if found == "failed":
        return RunState(run, "failed", f"{folders.load_summary(run.folder)['error']} (see {run.folder / 'error.txt'})")
    if place is not None and not place[0].cancelled:
        return RunState(run, "failed", f"its job ended without it, see {place[0].folder / f'{place[1]}.log'}")
    return RunState(run, "missing" if place is None and found == "missing" else "stopped")


def work(folder: Path, index: int) -> int:
    """Execute the runs of one task of an array, one after the other; return its exit code.

    If another job still executes a run, for example after the loss of a node, this one waits for it. After SIGTERM or
    SIGUSR1 the run stops where it can resume, and the task asks to be queued again, unless it was cancelled or Slurm
    queues it again anyway.
    """
    failed = []
    with StopRequest() as stop:
        for run in json.loads((folder / "tasks.json").read_text())[index]:
            code, reason = attempt(partial(run_overrides, wait=True), run["overrides"], Path(run["folder"]))
            if code in STOP_CODES or stop.signal is not None:
                print("Queued again." if slurm.requeue() else "Slurm is ending this job.", flush=True)
                return code or stop.exit_code
            if code:
                failed.append(run["label"])
                print(f"FAILED {run['label']}: {reason}", flush=True)
    return 1 if failed else 0
