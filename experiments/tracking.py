"""Weights & Biases beside the run folder: offline by default, never a reason to lose a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, ListConfig, OmegaConf

from foldopt.checks import require_positive, require_type
from foldopt.errors import InputError

MODES = ("offline", "online", "disabled")
log = logging.getLogger("foldopt.run")


def check(tracking: DictConfig) -> None:
    """Raise InputError for settings of W&B that cannot be."""
    if tracking.mode not in MODES:
        raise InputError(f"tracking.mode={tracking.mode!r} is unknown; choose one of {MODES}.")
    require_positive("tracking.init_timeout", tracking.init_timeout)
    for name, kind in (("project", str), ("entity", str | None), ("group", str | None)):
        require_type(f"tracking.{name}", tracking[name], kind)
    if not (isinstance(tracking.tags, ListConfig) and all(isinstance(tag, str) for tag in tracking.tags)):
        raise InputError(f"tracking.tags={tracking.tags}: expected a list of texts, such as [first,second].")


class Tracker:
    """One W&B run. Where mode=online cannot be reached it goes on offline, so that `wandb sync` can send it later.

    The run's id follows from its identity, so that a resumed run continues the same W&B run; under an agent of a W&B
    sweep wandb takes the agent's id instead. Should W&B's service die, as by a signal to all processes of a job, then
    tracking ends, and a resumed run catches up.
    """

    def __init__(self, cfg: DictConfig, folder: Path, run_id: str) -> None:
        mode = cfg.tracking.mode
        self._run = None
        if mode == "disabled":
            return
        import wandb

        try:
            try:
                self._run = self._start(wandb, cfg, folder, run_id, mode)
            except (wandb.errors.CommError, wandb.errors.UsageError, TimeoutError) as error:
                if mode != "online":
                    raise
                log.warning("W&B cannot be reached (%s); this run is tracked offline, send it later: wandb sync", error)
                wandb.teardown()  # its service still holds the run's id
                self._run = self._start(wandb, cfg, folder, run_id, "offline")
        except (OSError, wandb.errors.Error) as error:
            log.warning("W&B cannot track this run (%s); it goes on without, and metrics.csv has all of it", error)

    @staticmethod
    def _start(wandb: Any, cfg: DictConfig, folder: Path, run_id: str, mode: str) -> Any:
        t = cfg.tracking
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=t.init_timeout, x_disable_stats=True, x_disable_meta=True
        )
        return wandb.init(
            project=t.project,
            entity=t.entity,
            group=t.group,
            tags=list(t.tags),
            name=folder.name,
            id=run_id[:12],
            resume="allow" if mode == "online" else None,
            dir=folder,
            mode=mode,
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=settings,
        )

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log the rows of one epoch as <split>/<column>."""
        if self._run is None:
            return
        values = {f"{r['split']}/{k}": v for r in rows for k, v in r.items() if k not in ("split", "epoch")}
        with self._unless_lost():
            self._run.log({**values, "epoch": rows[0]["epoch"]}, step=rows[0]["epoch"])

    def catch_up(self, metrics: pd.DataFrame) -> None:
        """Log those epochs of a metrics.csv that are not in the W&B run: offline all, as each start makes a file."""
        for epoch, part in metrics.groupby("epoch"):
            if self._run is not None and epoch >= self._run.step:
                self.log([row.dropna().to_dict() for _, row in part.iterrows()])

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 marks it finished."""
        if self._run is not None:
            with self._unless_lost():
                self._run.finish(exit_code=exit_code)
            self._run = None

    @contextlib.contextmanager
    def _unless_lost(self) -> Iterator[None]:
        import wandb

        try:
            yield
        except ConnectionError as error:
            log.warning("W&B's service has died (%s); metrics.csv goes on, and a resumed run catches up", error)
            self._run = None
            with contextlib.suppress(ConnectionError):  # what it has to say of the dead service
                wandb.teardown()
