"""What a run needs to go on exactly where it was: weights, optimizer, random states, and the metrics so far."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.runs import COLUMNS, write_atomically

Row = dict[str, Any]


class Checkpoint:
    """checkpoint.pt and metrics.csv of one run folder, kept in step.

    Metrics are appended before the checkpoint is replaced; a kill between the two leaves rows of an epoch that will
    be run again, and `restore` drops them.
    """

    def __init__(self, folder: Path, **parts: nn.Module | torch.optim.Optimizer | Any) -> None:
        self.path, self.metrics, self.parts = folder / "checkpoint.pt", folder / "metrics.csv", parts

    def save(self, epoch: int, seconds: float, rows: list[Row], begun: dict[str, Any] | None = None) -> None:
        """Append the rows of an epoch to metrics.csv, then replace the checkpoint by the state after it.

        begun: what was done of the epoch after that, in plain numbers.
        """
        with self.metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        content = {
            "epoch": epoch,
            "seconds": seconds,
            "begun": begun,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        temporary = self.path.with_name("checkpoint.new")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def restore(self, device: torch.device) -> tuple[int, float, dict[str, Any] | None]:
        """Load the last checkpoint; return its epoch, the seconds spent until then, and what was begun after it.

        (-1, 0, None) if there is none.
        """
        if not self.path.is_file():
            self.metrics.unlink(missing_ok=True)
            return -1, 0.0, None
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        torch.set_rng_state(content["rng"])
        if device.type == "cuda" and len(content["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(content["rng_cuda"])
        self._drop_rows_after(content["epoch"])
        return content["epoch"], content["seconds"], content.get("begun")

    def _drop_rows_after(self, epoch: int) -> None:
        with self.metrics.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["epoch"].isdigit() and int(row["epoch"]) <= epoch]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.metrics, text.getvalue())
