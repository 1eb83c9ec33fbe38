"""The summary of a run: its last and best metrics, and what made them, from metrics.csv to summary.json."""

from __future__ import annotations

import json
import logging
import platform
import socket
import subprocess
import traceback
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from omegaconf import DictConfig

from experiments.contracts.task import Task
from experiments.run import configuration, folders
from experiments.run.components import task_class

log = logging.getLogger("foldopt.run")
PACKAGES = ("foldopt", "torch", "cvxpylayers", "diffcp", "scs", "clarabel", "gurobipy", "qpth", "hydra-core", "wandb")


class Record:
    """Writes summary.json into a run's folder: by `finish`, or as a context manager for a run that fails.

    An Exception is recorded in summary.json, log.txt and error.txt, gets a note that names error.txt, and goes on. A
    run that is stopped (`Interrupted`) gets no summary.

    identity: of the run, see `folders.identity`.
    """

    def __init__(self, folder: Path, identity: str, device: torch.device) -> None:
        self._folder, self._identity, self._device = folder, identity, device
        self._started = datetime.now(UTC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception):
            log.error("failed", exc_info=error)
            text = "".join(traceback.format_exception(error))
            folders.write_atomically(self._folder / "error.txt", text)
            error.add_note(f"Traceback in {folders.shown(self._folder / 'error.txt')}")
            self._write("failed", error=f"{type(error).__name__}: {error}")

    def finish(self, task: Task, seconds: float, rows: int) -> dict[str, Any]:
        """Write the summary of a finished run and return its metrics, by split.

        Those are the last metrics of each split, and those of validation and test at the epoch of the best validation.
        seconds: spent on training. rows: of metrics.csv.
        """
        frame = folders.load_metrics(self._folder)
        last = {split: part.iloc[-1].dropna().to_dict() for split, part in frame.groupby("split")}
        best = frame[frame["epoch"] == _validation(frame, task).idxmin()].set_index("split", drop=False)
        at_best = {f"{split}_at_best_val": best.loc[split].dropna().to_dict() for split in ("val", "test")}
        final = {**last, **at_best}
        self._write("finished", seconds_wall=seconds, rows=rows, final=final)
        return final

    def _write(self, status: str, **content: Any) -> None:
        device = self._device
        name = platform.processor() or platform.machine()
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        summary = {
            "status": status,
            **content,
            "identity": self._identity,
            "started": self._started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "device": f"{device} ({name})",
            "threads": torch.get_num_threads(),
            **made_with(),
        }
        folders.write_atomically(self._folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def best_validation(cfg: DictConfig) -> float:
    """Return the best validation of a finished run, which a search minimizes: smaller is better."""
    return float(_validation(folders.load_metrics(folders.of(cfg)), task_class(cfg)).min())


def _validation(frame: pd.DataFrame, task: Task | type[Task]) -> pd.Series[float]:
    """Return the task's objective on validation samples after each epoch of training, negated if more is better."""
    val = frame[(frame["split"] == "val") & (frame["epoch"] > 0)].set_index("epoch")[task.objective]
    return -val if task.maximize else val


def made_with() -> dict[str, Any]:
    """Return the versions of Python and of the packages that numbers depend on, and the state of the git checkout."""
    versions = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "versions": versions, "git": _git()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return the commit and whether tracked files differ from it; None outside a git checkout."""
    try:
        changed = _git_output("status", "--porcelain", "--untracked-files=no")
        return {"commit": _git_output("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git_output(*arguments: str) -> str:
    command = ["git", "-C", str(configuration.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
