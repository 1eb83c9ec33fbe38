"""Run folders: where a run lives, and the one way to read and write what its folder holds.

A folder holds config.yaml, metrics.csv (one row per epoch and split), summary.json, checkpoint.pt, log.txt and, after
a failure, error.txt.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from experiments.run import configuration
from foldopt.errors import FoldoptError, InputError

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


class StorageError(FoldoptError, OSError):
    """A file cannot be written; says what to do, and that nothing written before is lost."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise StorageError in the place of what the system says when `path` cannot be written inside."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}). Make room on its disk, make it writable, or choose "
            "another paths.runs; the same command goes on from what was written before."
        ) from error


def of(cfg: DictConfig) -> Path:
    """Return the folder of a run; equal configurations share it."""
    name = f"{cfg.backend.name}-{cfg.model.name}-seed{cfg.seed}-{configuration.identity(cfg)[:12]}"
    return configuration.ROOT / cfg.paths.runs / cfg.task.name / name


def status(path: Path) -> str:
    """Return missing, interrupted, failed or finished."""
    with contextlib.suppress(InputError):  # a summary that cannot be read is made again from the checkpoint
        return load_summary(path)["status"]
    begun = any((path / name).is_file() for name in ("config.yaml", "checkpoint.pt", "summary.json"))
    return "interrupted" if begun else "missing"


def load_summary(path: Path) -> dict[str, Any]:
    """Return summary.json of a run folder. Raises InputError where there is none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        return {"status": summary["status"], **summary}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'summary.json'} cannot be read ({error}); run this configuration first.") from error


def load_metrics(path: Path) -> pd.DataFrame:
    """Return metrics.csv of a run folder.

    Raises InputError where there is none, or where it is not whole: a row cut off, or rows that summary.json counts.
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old or the new content and nothing between.

    Raises StorageError where it cannot be written; the old content then stays.
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
            temporary.unlink(missing_ok=True)  # what a full disk cannot hold would only fill it further
            raise
