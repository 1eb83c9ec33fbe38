"""The checkpoint of a run: weights, optimizer, schedule, random state and metrics, from which it resumes exactly."""

from __future__ import annotations

import csv
import io
import os
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from experiments.run.folders import COLUMNS, DAMAGED, storing, write_atomically
from foldopt.errors import InputError

Row = dict[str, Any]


class Checkpoint:
    """checkpoint.pt and metrics.csv of one run folder, kept in step.

    Metrics are appended before the checkpoint is replaced. A kill between the two leaves rows of an epoch that will
    run again, and `restore` drops them.

    columns: the columns that the task adds to `COLUMNS`. parts: objects with a state_dict, such as the model, by name.
    """

    def __init__(self, folder: Path, columns: tuple[str, ...] = (), **parts: Any) -> None:
        self.path, self.metrics, self.parts = folder / "checkpoint.pt", folder / "metrics.csv", parts
        self.columns, self.rows = (*COLUMNS, *columns), 0

    def save(self, epoch: int, seconds: float, rows: list[Row], begun: dict[str, Any] | None = None) -> None:
        """Append the rows of an epoch to metrics.csv, then replace the checkpoint by the state after it.

        epoch: the last complete one. seconds: spent on training so far. begun: what was done of the next epoch when
        the run was stopped, in plain numbers.
        """
        with storing(self.metrics), self.metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(rows)
        content = {
            "epoch": epoch,
            "rows": self.rows,
            "seconds": seconds,
            "begun": begun,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        buffer = io.BytesIO()  # torch.save itself reports a full disk without naming it
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())

    def restore(self, device: torch.device) -> tuple[int, float, dict[str, Any] | None]:
        """Load the last checkpoint; return its epoch, the seconds of training until then, and what was begun after it.

        Returns (-1, 0, None) if there is no checkpoint. Raises InputError if it or metrics.csv is damaged.
        """
        if not self.path.is_file():
            self.metrics.unlink(missing_ok=True)
            return -1, 0.0, None
        content = load(self.path, self.parts)
        torch.set_rng_state(content["rng"])
        if device.type == "cuda" and len(content["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["rng_cuda"])
        self._drop_rows_after(content["epoch"], content.get("rows"))
        return content["epoch"], content["seconds"], content.get("begun")

    def _drop_rows_after(self, epoch: int, expected: int | None) -> None:
        try:
            with self.metrics.open(newline="") as file:
                read = [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdigit()]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.metrics} cannot be read ({error}). {DAMAGED}") from error
        rows = [row for row in read if int(row["epoch"]) <= epoch and None not in row.values()]
        if expected not in (None, len(rows)):
            raise InputError(f"{self.metrics} has {len(rows)} of the {expected} rows up to epoch {epoch}. {DAMAGED}")
        self.rows = len(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics, text.getvalue())


def load(path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Load the state of each of the `parts` from a checkpoint; return the checkpoint's content.

    Nothing in the file is executed (weights_only). Raises FileNotFoundError if there is no file, and InputError if it
    is damaged or has the state of other parts.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content[name])
        itemgetter("epoch", "seconds", "rng")(content)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes make torch raise errors of many types
        first = str(error).strip().splitlines()[:1]
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {''.join(first)}). {DAMAGED}") from error
    return content
