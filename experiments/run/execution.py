"""One run from configuration to exit code: folder, lock, log, signals, failures, summary."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.contracts.task import Task
from experiments.run import configuration, folders, tracking
from experiments.run.components import build, task_class
from experiments.run.interruption import BUSY, StopRequest
from experiments.run.tracking import Tracker
from experiments.run.trainer import Interrupted, Trainer, check_training
from foldopt.checks import require_type, require_whole
from foldopt.errors import FoldoptError, InputError

log = logging.getLogger("foldopt.run")
MOST_SEEDS = 2**40
LOCK_POLL_SECONDS = 2.0
PACKAGES = ("foldopt", "torch", "cvxpylayers", "diffcp", "scs", "clarabel", "gurobipy", "qpth", "hydra-core", "wandb")


class BusyError(InputError):
    """Another process executes this run."""


def execute(cfg: DictConfig, console: Console | None = None, wait: bool = False) -> int:
    """Bring one run to its end and return the exit code of ``python run.py``.

    0: finished, now or before. 1: failed, with the reason on the console, the traceback in error.txt. 130, 143 or 138:
    stopped by SIGINT, SIGTERM or SIGUSR1 at a point from which the same call goes on. 75: another process executes the
    run, unless `wait`: then until that process has ended.
    """
    console = console or Console()
    OmegaConf.resolve(cfg)  # once: what depends on files must not change during the run
    try:
        require_type("paths.runs", cfg.paths.runs, str)
    except InputError as error:
        _say(console, f"error: {error}")
        return 1
    path = folders.of(cfg)
    if folders.status(path) == "finished":
        _say(console, f"Nothing to do: this run is finished, see {_short(path)}")
        return 0
    try:
        for name, kind in (("device", str), ("progress", bool)):
            require_type(name, cfg[name], kind)
        device = resolve_device(cfg.device)
        require_whole("seed", cfg.seed, 0)
        if cfg.seed >= MOST_SEEDS:
            raise InputError(f"seed={cfg.seed}: take one below {MOST_SEEDS}.")
        require_whole("threads", cfg.threads, 1)
        if torch.get_num_threads() != cfg.threads:  # to set it makes LU unsafe for other libraries, see foldopt.batched
            torch.set_num_threads(cfg.threads)
        _set_determinism(cfg.deterministic)
        torch.manual_seed(cfg.seed)
        tracking.check(cfg.tracking)
        check_training(cfg.train)
        trainer = Trainer(cfg, build(cfg), path, device)
    except FoldoptError as error:
        _say(console, f"error: {error}")
        return 1
    with StopRequest(insist=True) as stop, _log_to(path / "log.txt"):
        try:
            with folders.storing(path):
                path.mkdir(parents=True, exist_ok=True)
            with _locked(path, stop if wait else None):
                if folders.status(path) == "finished":
                    _say(console, f"Nothing to do: this run is finished, see {_short(path)}")
                    return 0
                return _run(cfg, trainer, path, device, console, stop)
        except Interrupted:
            return stop.exit_code
        except BusyError as error:
            _say(console, f"error: {error}")
            return BUSY
        except FoldoptError as error:
            _say(console, f"error: {error}")
            return 1


def _run(
    cfg: DictConfig, trainer: Trainer, path: Path, device: torch.device, console: Console, stop: StopRequest
) -> int:
    folders.write_atomically(path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    with folders.storing(path):
        (path / "summary.json").unlink(missing_ok=True)
        (path / "error.txt").unlink(missing_ok=True)
    _say(console, f"{cfg.task.name} {cfg.backend.name} {cfg.model.name} seed={cfg.seed} on {device}: {_short(path)}")
    begun = datetime.now(UTC)
    tracker, code = None, 1
    try:
        tracker = Tracker(cfg, path, configuration.identity(cfg))
        seconds = trainer.fit(tracker, console, stop)
        final = _final(path, trainer.task)
        _write_summary(
            path, cfg, device, begun, "finished", seconds_wall=seconds, rows=trainer.checkpoint.rows, final=final
        )
        tracker.summarize(final)
        shown = ", ".join(f"{name} {final['test'][name]:.4g}" for name in trainer.task.columns if name in final["test"])
        _say(console, f"Finished in {seconds:.0f} s, test: {shown}")
        code = 0
    except Interrupted:
        code = stop.exit_code
        _say(console, "Interrupted; the same command goes on from here.")
        log.info("interrupted with exit code %d", code)
    except Exception as error:
        _say(console, f"error: {error}\nTraceback in {_short(path / 'error.txt')}")
        log.exception("failed")
        folders.write_atomically(path / "error.txt", traceback.format_exc())
        _write_summary(path, cfg, device, begun, "failed", error=f"{type(error).__name__}: {error}")
        if not isinstance(error, FoldoptError):
            raise
    finally:
        if tracker is not None:
            tracker.finish(code)
    return code


def resolve_device(name: str) -> torch.device:
    """Return the torch device called `name`, "auto" being CUDA if there is one; InputError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"nothing runs on {device.type}")
    except RuntimeError as error:
        raise InputError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:<number>.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r} is not there: {torch.cuda.device_count()} CUDA devices; use device=auto.")
    return device


def _set_determinism(wanted: bool) -> None:
    """Let torch use deterministic algorithms only; an operation that has none then raises."""
    if not isinstance(wanted, bool):
        raise InputError(f"deterministic={wanted}: expected true or false.")
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has none
    torch.use_deterministic_algorithms(wanted)


def best_validation(cfg: DictConfig) -> float:
    """Return the best validation of a finished run, smaller being better: what a search minimizes."""
    return float(validation(folders.load_metrics(folders.of(cfg)), task_class(cfg)).min())


def validation(frame: pd.DataFrame, task: Task | type[Task]) -> pd.Series[float]:
    """Return what a run is judged by, smaller being better, for each epoch after the start.

    That is the task's objective on validation samples, or minus it if more is better.
    """
    val = frame[(frame["split"] == "val") & (frame["epoch"] > 0)].set_index("epoch")[task.objective]
    return -val if task.maximize else val


def _final(path: Path, task: Task) -> dict[str, Any]:
    """Return the last metrics of each split, and those of validation and test at the epoch of the best validation."""
    frame = folders.load_metrics(path)
    last = {split: part.iloc[-1].dropna().to_dict() for split, part in frame.groupby("split")}
    best = frame[frame["epoch"] == validation(frame, task).idxmin()].set_index("split", drop=False)
    at_best = {f"{split}_at_best_val": best.loc[split].dropna().to_dict() for split in ("val", "test")}
    return {**last, **at_best}


def _write_summary(
    path: Path, cfg: DictConfig, device: torch.device, begun: datetime, status: str, **content: Any
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    summary = {
        "status": status,
        **content,
        "identity": configuration.identity(cfg),
        "started": begun.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        **made_with(),
    }
    folders.write_atomically(path / "summary.json", json.dumps(summary, indent=2) + "\n")


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
    """Return commit and whether tracked files differ from it; None outside a git checkout."""

    def output(*arguments: str) -> str:
        command = ["git", "-C", str(configuration.ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = output("status", "--porcelain", "--untracked-files=no")
        return {"commit": output("rev-parse", "HEAD"), "modified": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def _locked(path: Path, patience: StopRequest | None) -> Iterator[None]:
    """Hold the run's lock, waiting for it until `patience` is asked to stop; None: raise BusyError at once."""
    with folders.storing(path):
        file = (path / "lock").open("a+")
    with file:
        if not _try_lock(file, path):
            if patience is None:
                raise BusyError(f"another process is executing this run: {_holder(path)}; wait for it or stop it.")
            log.info("waiting for the process that executes this run: %s", _holder(path))
            while not _try_lock(file, path):
                if patience.signal is not None:
                    raise Interrupted
                time.sleep(LOCK_POLL_SECONDS)
        with folders.storing(path):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _try_lock(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"paths.runs: the file system of {path} does not lock files ({error}), so that two processes could execute "
            "one run; have it mounted with locks (Lustre: -o flock), or take another folder."
        ) from error
    return True


def _holder(path: Path) -> str:
    return f"{(path / 'lock').read_text() or 'it does not say which'} ({_short(path)})"


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send the run's log, warnings included, to a file while active."""
    handler = logging.FileHandler(path, delay=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    loggers = log, logging.getLogger("py.warnings")
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.close()


def _short(path: Path) -> str:
    return str(path.relative_to(configuration.ROOT)) if path.is_relative_to(configuration.ROOT) else str(path)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
