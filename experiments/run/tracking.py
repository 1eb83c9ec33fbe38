"""Weights & Biases beside the run folder: offline by default, never a reason to lose a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, ListConfig, OmegaConf

from foldopt.checks import require_positive, require_type
from foldopt.errors import InputError

MODES = ("offline", "online", "disabled")
LONGEST_TAG = 64  # for wandb
log = logging.getLogger("foldopt.run")


def check(tracking: DictConfig) -> None:
    """Raise InputError for settings of W&B that cannot be."""
    if tracking.mode not in MODES:
        raise InputError(f"tracking.mode={tracking.mode!r} is unknown; choose one of {MODES}.")
    require_positive("tracking.finish_timeout", tracking.finish_timeout)
    require_positive("tracking.init_timeout", tracking.init_timeout)
    for name, kind in (("project", str), *((name, str | None) for name in ("entity", "group", "job_type"))):
        require_type(f"tracking.{name}", tracking[name], kind)
    if not (isinstance(tracking.tags, ListConfig) and all(isinstance(tag, str) for tag in tracking.tags)):
        raise InputError(f"tracking.tags={tracking.tags}: expected a list of texts, such as [first,second].")
    if wrong := [tag for tag in tracking.tags if not 1 <= len(tag) <= LONGEST_TAG]:
        raise InputError(f"tracking.tags={wrong}: W&B takes tags of 1 to {LONGEST_TAG} characters.")


def label(settings: DictConfig, study: str, profile: str, series: str, places: Sequence[str]) -> tuple[str, ...]:
    """Let W&B show a run as part of its study: complete `settings`, and return them as overrides of run.py.

    The group is the study and the job type the series, unless `settings` have their own; the tags are those there and
    the series, the profile and the places in the grid, so that seeds have the same ones.
    """
    check(settings)
    settings.group = settings.group or study
    settings.job_type = settings.job_type or series
    settings.tags = _tags([*settings.tags, series, profile, *places])
    values = {name: settings[name] for name in ("mode", "group", "job_type")} | {"tags": list(settings.tags)}
    return tuple(f"tracking.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())


def _tags(tags: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))


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

    def summarize(self, final: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the groups of metrics of summary.json's `final` into the W&B run's summary, as <group>/<column>."""
        if self._run is None:
            return
        values = {f"{group}/{name}": v for group, metrics in final.items() for name, v in metrics.items()}
        with self._unless_lost():
            self._run.summary.update({k: v for k, v in values.items() if not k.endswith("/split")})

    def log_files(self, name: str, kind: str, files: Mapping[str, Path]) -> bool:
        """Log files, by the names that they get, as one W&B artifact of type `kind`; return whether W&B took them."""
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

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 marks it finished. What the server does not take in time stays for `wandb sync`."""
        if self._run is not None:
            with self._unless_lost():
                try:
                    self._run.finish(exit_code=exit_code)
                except TimeoutError:
                    log.warning("W&B's server has not taken all of this run; it is kept, send it later: wandb sync")
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


def log_figures(settings: DictConfig, root: Path, files: Sequence[Path], folder: Path) -> bool:
    """Log a study's figures and tables, `files` under `root`, as an artifact of a W&B run of its own.

    `folder` keeps the run, whose name is its own, with copies of the files: those under `root` may be others when
    `wandb sync` sends it. Offline the same files are logged once; online they are offered again, and the server knows
    them. Returns whether they were logged.
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
    tracker = Tracker(OmegaConf.create({"tracking": settings}), folder, run_id)
    taken = tracker.log_files(folder.name, "figures", {title: copies / title for title in contents})
    tracker.finish(0)
    import wandb

    with contextlib.suppress(OSError, wandb.errors.Error):
        wandb.teardown()  # worker processes that are started later are to have a service of their own, not this one
    return taken
