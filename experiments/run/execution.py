"""One run from its configuration to its summary; `execute` tells the whole story."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.run import folders, settings
from experiments.run.checkpoint import Checkpoint
from experiments.run.components import build
from experiments.run.folders import BusyError
from experiments.run.interruption import BUSY, Interrupted, StopRequest
from experiments.run.summary import Record
from experiments.run.tracking import Tracker
from experiments.run.trainer import Trainer
from foldopt.errors import FoldoptError


def execute(cfg: DictConfig, console: Console | None = None, wait: bool = False) -> int:
    """Bring one run to its end and return the exit code of ``python run.py``.

    0: finished, now or before. 1: failed, with the reason on the console and, once training has begun, the traceback
    in error.txt. 130, 143 or 138: stopped by SIGINT, SIGTERM or SIGUSR1; the same call goes on from there. 75: another
    process executes the run; with `wait`, the call waits until that process has ended. An error that is no
    FoldoptError is recorded and raised again.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    OmegaConf.resolve(cfg)  # once: what depends on files must not change during the run
    try:
        folder = folders.of(cfg)
        if folders.status(folder) == "finished":
            say(f"Nothing to do: this run is finished, see {folders.shown(folder)}")
            return 0
        device = settings.prepare(cfg)
        parts = build(cfg, device)
        with StopRequest(insist=True) as stop, folders.opened(folder, stop if wait else None):
            if folders.status(folder) == "finished":
                say(f"Nothing to do: another process finished this run, see {folders.shown(folder)}")
                return 0
            name = f"{cfg.task.name} {cfg.backend.name} {cfg.model.name} seed={cfg.seed} on {device}"
            say(f"{name}: {folders.shown(folder)}")
            identity = folders.begin(folder, cfg)
            with Record(folder, identity, device) as record, Tracker(cfg, folder, identity) as tracker:
                trainer = Trainer(cfg, parts, device)
                checkpoint = Checkpoint(folder, parts.task.columns, **trainer.state)
                seconds = trainer.fit(checkpoint, tracker, console, stop)
                final = record.finish(parts.task, seconds, checkpoint.rows)
                tracker.summarize(final)
        metrics = [f"{name} {final['test'][name]:.4g}" for name in parts.task.columns if name in final["test"]]
        say(f"Finished in {seconds:.0f} s, test: {', '.join(metrics)}")
        return 0
    except Interrupted as stopped:
        say("Interrupted; the same command goes on from here.")
        return stopped.exit_code
    except Exception as error:
        say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        if not isinstance(error, FoldoptError):
            raise
        return BUSY if isinstance(error, BusyError) else 1
