"""Weights & Biases beside the run folder: offline by default; a failure of W&B never ends a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.run.interruption import Interrupted
from experiments.run.settings import LONGEST_TAG, check_tracking

log = logging.getLogger("foldopt.run")


def label(settings: DictConfig, study: str, profile: str, series: str, places: Sequence[str]) -> tuple[str, ...]:
    """Label a run in W&B as a part of its study: complete `settings`, and return them as overrides of run.py.

    The group becomes the study and the job type the series, unless `settings` have their own. Series, profile and
    `places` (the point of the grid) are added to the tags, so all seeds of a series have the same tags.
    """
    check_tracking(settings)
    settings.group = settings.group or study
    settings.job_type = settings.job_type or series
    settings.tags = _tags([*settings.tags, series, profile, *places])
    values = {name: settings[name] for name in ("mode", "group", "job_type")} | {"tags": list(settings.tags)}
    return tuple(f"tracking.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def _tags(tags: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))


class Tracker:
    """One W&B run, a context manager that closes it: finished, or failed after an exception.

    If mode=online finds no server, tracking goes on offline, and `wandb sync` can send the run later; it also sends
    what the server did not take in time. The W&B run's id follows from the run's identity, so a resumed run continues
    the same W&B run; under an agent of a W&B sweep, wandb takes the agent's id instead. If W&B's service dies, for
    example by a signal to all processes of a job, tracking ends, and a resumed run catches up.
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
                wandb.teardown()  # W&B's service still holds the run's id
                self._run = self._start(wandb, cfg, folder, run_id, "offline")
        except (OSError, wandb.errors.Error) as error:
            log.warning("W&B cannot track this run (%s); it goes on without, and metrics.csv has all of it", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if self._run is None:
            return
        exit_code = error.exit_code if isinstance(error, Interrupted) else int(error is not None)
        with self._unless_lost():
            try:
                self._run.finish(exit_code=exit_code)
            except TimeoutError:
                log.warning("W&B's server has not taken all of this run; it is kept, send it later: wandb sync")
        self._run = None

    @staticmethod
    def _start(wandb: Any, cfg: DictConfig, folder: Path, run_id: str, mode: str) -> Any:
        t = cfg.tracking
        chosen = [cfg[part].name for part in ("task", "backend", "model") if part in cfg]
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=t.init_timeout, x_disable_stats=True, x_disable_meta=True
        )
        settings.finish_timeout, settings.finish_timeout_raises = t.finish_timeout, True
        run = wandb.init(
            project=t.project,
            entity=t.entity,
            group=t.group,
            job_type=t.job_type,
            tags=_tags([*t.tags, *chosen]),
            name=folder.name,
            id=run_id[:12],
            resume="allow" if mode == "online" else None,
            dir=folder,
            mode=mode,
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=settings,
        )
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log the rows of one epoch, each value as <split>/<column>."""
        if self._run is None:
            return
        values = {f"{r['split']}/{k}": v for r in rows for k, v in r.items() if k not in ("split", "epoch")}
        with self._unless_lost():
            self._run.log({**values, "epoch": rows[0]["epoch"]}, step=rows[0]["epoch"])

    def catch_up(self, metrics: pd.DataFrame) -> None:
        """Log the epochs of a metrics.csv that the W&B run lacks; offline all of them, as each start makes a file."""
        for epoch, part in metrics.groupby("epoch"):
            if self._run is not None and epoch >= self._run.step:
                self.log([row.dropna().to_dict() for _, row in part.iterrows()])

    def summarize(self, final: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the final metrics of summary.json into the W&B run's summary, each as <group>/<column>."""
        if self._run is None:
            return
        values = {f"{group}/{name}": v for group, metrics in final.items() for name, v in metrics.items()}
        with self._unless_lost():
            self._run.summary.update({k: v for k, v in values.items() if not k.endswith("/split")})

    def log_files(self, name: str, kind: str, files: Mapping[str, Path]) -> bool:
        """Log files as one W&B artifact of type `kind`, by their names in it; return whether W&B took them."""
        if self._run is None:
            return False
        import wandb

        try:
            artifact = wandb.Artifact(name, kind)
            for title, path in files.items():
                artifact.add_file(str(path), title, skip_cache=True, policy="immutable")
            self._run.log_artifact(artifact)
        except (OSError, ValueError, wandb.errors.Error) as error:
            log.warning("W&B cannot take %s (%s); the files are where they were", name, error)
            return False
        return True

    @contextlib.contextmanager
    def _unless_lost(self) -> Iterator[None]:
        import wandb

        try:
            yield
        except ConnectionError as error:
            log.warning("W&B's service has died (%s); metrics.csv goes on, and a resumed run catches up", error)
            self._run = None
            with contextlib.suppress(ConnectionError):  # wandb reports the dead service once more
                wandb.teardown()


def log_figures(settings: DictConfig, root: Path, files: Sequence[Path], folder: Path) -> bool:
    """Log a study's figures and tables, `files` under `root`, as an artifact of a separate W&B run.

    The run is called after `folder`, which keeps it with copies of the files, because those under `root` may have
    changed when `wandb sync` sends the run. Offline, the same files are logged once; online they are offered again, and
    the server recognizes them. Returns whether they were logged.
    """
    if settings.mode == "disabled":
        return False
    contents = {str(path.relative_to(root)): path.read_bytes() for path in sorted(files)}
    digest = hashlib.sha256(folder.name.encode())
    for title, content in contents.items():
        digest.update(title.encode() + hashlib.sha256(content).digest())
    run_id = digest.hexdigest()
    copies = folder / "files" / run_id[:12]
    if settings.mode == "offline" and any(folder.glob(f"wandb/*run-*-{run_id[:12]}")):
        return False
    try:
        for title, content in contents.items():
            (copies / title).parent.mkdir(parents=True, exist_ok=True)
            (copies / title).write_bytes(content)
    except OSError as error:
        log.warning("W&B gets no figures: %s cannot be written (%s)", copies, error)
        return False
    with Tracker(OmegaConf.create({"tracking": settings}), folder, run_id) as tracker:
        taken = tracker.log_files(folder.name, "figures", {title: copies / title for title in contents})
    import wandb

    with contextlib.suppress(OSError, wandb.errors.Error):
        wandb.teardown()  # worker processes that start later must not use this process's service
    return taken
