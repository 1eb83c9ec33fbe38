"""Run studies on a Slurm cluster: submit them as job arrays and return; look, collect, cancel and retry later."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from experiments.run import configuration
from experiments.run.settings import TRACKING_MODES
from experiments.sweep import studies
from experiments.sweep.cluster import STATES, Sweep, work
from foldopt.errors import FoldoptError
from scripts import study_options

COMMANDS = {
    "submit": "submit every run that is neither finished nor in the queue, and return",
    "status": "count the runs by state, name those that run and those that failed",
    "collect": "write the metrics of all runs to one file, then figures and tables",
    "cancel": "end what is in the queue; running runs stop where they can be resumed",
    "retry": "submit again what was submitted and has ended unfinished",
}
SHOWN = 12


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; return the exit code."""
    available = study_options.available(arguments)
    options = parser(available).parse_args(arguments)
    if options.command == "work":
        return work(options.folder, int(os.environ["SLURM_ARRAY_TASK_ID"]))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        return max(_do(options, available[name], console) for name in options.study)
    except FoldoptError as error:
        console.print(f"error: {error}")
        return 1


def parser(available: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line; available: the studies, see `studies.available`, None for conf/study's."""
    known = studies.available() if available is None else available
    top = argparse.ArgumentParser(prog="scripts/sweep.py", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("study", nargs="+", choices=known, metavar="STUDY", help=f"one of {', '.join(known)}")
        study_options.add_config_dir(command)
        command.add_argument("--profile", default="default", choices=studies.PROFILES, help="size of the studies")
        command.add_argument("--series", action="append", help="of the study; default: all")
        if name in ("submit", "retry", "collect"):
            command.add_argument("--tracking", choices=TRACKING_MODES, help="by W&B; default: as the study says")
        if name in ("submit", "retry"):
            command.add_argument("--runs-per-job", type=int, default=1, help="one after the other; 1 where left out")
            command.add_argument(
                *("--slurm", "-s"),
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="instead of slurm.yaml's value",
            )
        if name == "retry":
            command.add_argument("--failed", action="store_true", help="only what failed, not what was cancelled")
    worker = commands.add_parser("work", description="what a job executes")
    worker.add_argument("folder", type=Path)
    return top


def _do(options: argparse.Namespace, study: str, console: Console) -> int:
    mode = getattr(options, "tracking", None)  # not an option of status and cancel
    sweep = Sweep.of(study, options.profile, set(options.series) if options.series else None, mode)
    match options.command:
        case "submit":
            return _submit(sweep, ("failed", "stopped", "missing"), options, console)
        case "retry":
            return _submit(sweep, ("failed",) if options.failed else ("failed", "stopped"), options, console)
        case "status":
            return _status(sweep, console)
        case "collect":
            return _collect(sweep, study, mode, console)
    ended = sweep.cancel()
    console.print(f"{sweep.study} ({options.profile}): {len(ended)} job arrays cancelled")
    return 0


def _submit(sweep: Sweep, states: tuple[str, ...], options: argparse.Namespace, console: Console) -> int:
    chosen = [state.run for state in sweep.states() if state.state in states]
    launcher = configuration.compose_launcher("slurm", options.slurm)
    for submission in sweep.submit(chosen, launcher, options.runs_per_job):
        console.print(f"submitted {len(submission.tasks)} jobs, logs in {submission.folder}")
    console.print(f"{sweep.study} ({sweep.profile}): {len(chosen)} of {len(sweep.planned)} runs submitted")
    return 0


def _status(sweep: Sweep, console: Console) -> int:
    states = sweep.states()
    count = Counter(state.state for state in states)
    parts = ", ".join(f"{count[name]} {name}" for name in STATES if count[name])
    console.print(f"{sweep.study} ({sweep.profile}): {len(states)} runs, {parts}")
    for reason, number in Counter(state.detail for state in states if state.state == "queued").items():
        console.print(f"  queued {number}: {reason}")
    for name in ("running", "failed"):
        named = [state for state in states if state.state == name]
        for state in named[:SHOWN]:
            console.print(f"  {name} {state.run.label}: {state.detail}")
        if len(named) > SHOWN:
            console.print(f"  {name}: {len(named) - SHOWN} more")
    return 1 if count["failed"] else 0


def _collect(sweep: Sweep, study: str, mode: str | None, console: Console) -> int:
    from experiments.report.reproduction import make_figures  # plots, which no other command needs

    path, finished = sweep.collect()
    console.print(f"{path}: the metrics of {finished} of {len(sweep.planned)} runs")
    if finished < len(sweep.planned):
        return max(1, _status(sweep, console))
    return make_figures([study], sweep.profile, console, mode)


if __name__ == "__main__":
    sys.exit(main())
