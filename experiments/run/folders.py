"""Run folders: where a run lives, how one process takes it, and the one way to read and write its files.

A folder holds config.yaml, metrics.csv (one row per epoch and split), summary.json, checkpoint.pt, log.txt and, after
a failure, error.txt.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.run import configuration
from experiments.run.interruption import Interrupted, StopRequest
from foldopt.checks import require_type
from foldopt.errors import FoldoptError, InputError

log = logging.getLogger("foldopt.run")
LOCK_POLL_SECONDS = 2.0
DAMAGED = "Restore it, or delete the folder to execute this run anew."
COLUMNS = (  # of every task; those of its own follow
    "epoch",
    "split",
    "loss",
    "seconds_network",
    "seconds_solve",
    "seconds_backward",
    "seconds_epoch",
    "samples",
    "zero_gradient_fraction",
    "solver_failures",
    "adjoint_products",
    "gradient_error",
    "gradient_error_max",
)
NOT_IDENTITY = ("device", "deterministic", "paths", "progress", "tracking")
# Keys that were added after runs had been made without them, with the value that means the same as leaving them out.
# It is also the default of the argument, so that those runs can still be built.
ADDED: Mapping[str, Any] = {
    "backend.forward_tol": None,
    "task.csv": None,
    "task.digest": None,
    "task.date": None,
    "task.returns": None,
    "task.features": None,
    "task.max_gap": None,
    "task.lags": 1,
    "task.feature_lag": 1,
    "task.val_share": 0.15,
    "task.test_share": 0.3,
    "task.folds": 1,
    "task.fold": 0,
    "task.risk": 1.2,
}


class StorageError(FoldoptError, OSError):
    """A file cannot be written; says what to do, and that nothing written before is lost."""


class BusyError(InputError):
    """Another process executes this run."""


def sha256_of_file(path: Any) -> str | None:
    """Return the SHA-256 of a file's content, None if it cannot be read or the path is no text."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if isinstance(path, str) else None
    return None


OmegaConf.register_new_resolver("sha256", sha256_of_file, replace=True)


def identity(cfg: DictConfig) -> str:
    """Return the hash of all settings that the numbers of a run depend on; device and paths are not among them."""
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, absent in ADDED.items():
        group, _, name = key.partition(".")
        if content[group].get(name, absent) == absent:
            content[group].pop(name, None)
    kept = {key: _without_targets(value) for key, value in content.items() if key not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_targets(value: Any) -> Any:
    """Return a value of a configuration without `_target_`: a run stays the same run when its classes move."""
    if isinstance(value, dict):
        return {key: _without_targets(inner) for key, inner in value.items() if key != "_target_"}
    return value


def of(cfg: DictConfig) -> Path:
    """Return the folder of a run; configurations of equal identity share it. InputError if paths.runs is no text."""
    require_type("paths.runs", cfg.paths.runs, str)
    name = f"{cfg.backend.name}-{cfg.model.name}-seed{cfg.seed}-{identity(cfg)[:12]}"
    return configuration.ROOT / cfg.paths.runs / cfg.task.name / name


def shown(path: Path) -> str:
    """Return a path as messages show it: relative to the project's root if it is inside."""
    return str(path.relative_to(configuration.ROOT)) if path.is_relative_to(configuration.ROOT) else str(path)


def status(path: Path) -> str:
    """Return missing, interrupted, failed or finished."""
    with contextlib.suppress(InputError):  # a summary that cannot be read is made again from the checkpoint
        return load_summary(path)["status"]
    begun = any((path / name).is_file() for name in ("config.yaml", "checkpoint.pt", "summary.json"))
    return "interrupted" if begun else "missing"


def load_summary(path: Path) -> dict[str, Any]:
    """Return summary.json of a run folder. Raises InputError if there is none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        return {"status": summary["status"], **summary}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'summary.json'} cannot be read ({error}); run this configuration first.") from error


def load_metrics(path: Path) -> pd.DataFrame:
    """Return metrics.csv of a run folder.

    Raises InputError if it is missing or incomplete: if a row is cut off, or if summary.json counts other rows.
    """
    file = path / "metrics.csv"
    try:
        text = file.read_text()
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist; run this configuration first.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text ({error}). {DAMAGED}") from error
    header, *lines = text.split("\n")
    if not header or lines[-1:] != [""] or any(line.count(",") != header.count(",") for line in lines[:-1]):
        raise InputError(f"{file} is not whole: a row is cut off. {DAMAGED}")
    frame = pd.read_csv(io.StringIO(text))
    counted = load_summary(path).get("rows") if (path / "summary.json").is_file() else None
    if counted not in (None, len(frame)):
        raise InputError(f"{file} has {len(frame)} rows, but this run made {counted}. {DAMAGED}")
    return frame


@contextlib.contextmanager
def opened(path: Path, patience: StopRequest | None) -> Iterator[None]:
    """Create a run's folder, hold its lock and send the log to its log.txt while active.

    patience: wait for another process that holds the lock, until a stop is requested; None raises BusyError at once.
    """
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
    with _log_to(path / "log.txt"), _locked(path, patience):
        yield


@contextlib.contextmanager
def _locked(path: Path, patience: StopRequest | None) -> Iterator[None]:
    with storing(path):
        file = (path / "lock").open("a+")
    with file:
        if not _try_lock(file, path):
            if patience is None:
                raise BusyError(f"another process is executing this run: {_holder(path)}; wait for it or stop it.")
            log.info("waiting for the process that executes this run: %s", _holder(path))
            while not _try_lock(file, path):
                if patience.signal is not None:
                    raise Interrupted(patience.exit_code)
                time.sleep(LOCK_POLL_SECONDS)
        with storing(path):
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
    return f"{(path / 'lock').read_text() or 'it does not say which'} ({shown(path)})"


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


def begin(path: Path, cfg: DictConfig) -> str:
    """Write config.yaml, remove summary.json and error.txt of an attempt that failed; return the run's identity."""
    write_atomically(path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    with storing(path):
        (path / "summary.json").unlink(missing_ok=True)
        (path / "error.txt").unlink(missing_ok=True)
    return identity(cfg)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the system's errors about writing to `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}). Make room on its disk, make it writable, or choose "
            "another paths.runs; the same command goes on from what was written before."
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old or the new content, even if this process is killed meanwhile.

    Raises StorageError if it cannot be written; the old content then stays.
    """
    temporary = path.with_name(path.name + ".new")
    with storing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk the partial file only takes room
            raise
