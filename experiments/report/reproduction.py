"""Reproduction of the results: run the studies, then make their figures, tables and measurements."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.report.artifacts import Artifacts, output_root
from experiments.report.outputs import Measurement, StudyOutputs, make_outputs, member
from experiments.run import configuration, folders, tracking
from experiments.sweep import studies
from experiments.sweep.pool import execute
from experiments.sweep.studies import Study, StudyRun
from foldopt.errors import FoldoptError, InputError


def make_figures(names: Sequence[str], profile: str, console: Console, mode: str | None = None) -> int:
    """Write figures and tables of the named studies from their run folders; return 1 if runs are missing, else 0.

    mode: W&B's mode; figures and tables are logged to W&B unless it is disabled. None: the mode of each study.
    """
    try:
        for name in names:
            study = studies.load(name)
            _outputs(study, studies.expand(study, profile, mode=mode), profile, console)
    except FoldoptError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    return 0


def reproduce(
    names: Sequence[str], profile: str | None, workers: int, console: Console, mode: str | None = None
) -> int:
    """Execute the named studies, then make their figures, tables and measurements.

    A study with failed runs gets no figures. Errors of one study's figures do not stop those of the others.

    Args:
        names: The studies.
        profile: The profile of all studies; None chooses one for each study by `studies.profile_at_hand`.
        workers: Number of processes that execute runs.
        console: Where progress is printed.
        mode: W&B's mode for the remaining runs and the figures; None: the mode of each study.

    Returns:
        The exit code: 0, the code of failed runs, or 128 + signal if a signal stopped the runs. In the last case the
        same call resumes them.
    """
    exit_code = 0
    chosen: dict[str, str] = {}
    for name in names:
        study = studies.load(name)
        chosen[name], why = (profile, None) if profile else studies.profile_at_hand(study)
        planned = studies.expand(study, chosen[name], mode=mode)
        said = why or f"profile {chosen[name]}"
        console.print(f"{study.title} ({study.name}, {said}): {len(planned)} runs", markup=False, soft_wrap=True)
        report = execute(planned, workers=workers, console=console)
        for line in report.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if report.stopped_by is not None:
            return report.exit_code
        if missing := len(report.failed) + len(report.elsewhere):
            exit_code = report.exit_code
            console.print(f"No figure of {study.name}: {missing} of its runs are not finished.", markup=False)
        else:
            exit_code |= _tried(study.name, console, _outputs, study, planned, chosen[name], console)
    for name in names:
        for target in studies.load(name).measurements:
            exit_code |= _tried(target, console, measure, target, chosen[name], console, [name])
    return exit_code


def _tried(what: str, console: Console, do: Callable[..., None], *arguments: object) -> int:
    """Call ``do(*arguments)`` and return 0; if it raises, print the traceback and return 1."""
    try:
        do(*arguments)
    except Exception:
        console.print(f"No figures or tables of {what}:", markup=False)
        console.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


def measure(target: str, profile: str, console: Console, names: Sequence[str] | None = None) -> None:
    """Make the measurement of a make target unless that was done before, and write its table or figure.

    names: of the studies among whose measurements it is; None for all of conf/study.
    """
    known = measurements(names)
    if target not in known:
        raise InputError(f"measurement={target!r} is in no study; choose one of {', '.join(known)}")
    console.print(f"Measuring: {target} (profile {profile})", markup=False)
    study = known[target]
    measurement = Measurement(target, profile, Artifacts(output_root(profile)), study.config_dir)
    member(f"{study.measurements[target]}.make", study.name)(measurement)
    _say(measurement.artifacts, console)


def measurements(names: Sequence[str] | None = None) -> dict[str, Study]:
    """Return the study of each measurement by its make target; names: of the studies, None for all of conf/study."""
    loaded = [studies.load(name) for name in (studies.names() if names is None else names)]
    return {target: study for study in loaded for target in study.measurements}


def _outputs(study: Study, planned: Sequence[StudyRun], profile: str, console: Console) -> None:
    torch.set_num_threads(1)  # as in the runs; more threads would change the last digits
    artifacts = Artifacts(output_root(profile))
    make_outputs(StudyOutputs(study, planned, profile, artifacts))
    if study.outputs:
        artifacts.write(f"provenance/{study.name}.json", provenance(planned).encode())
    _say(artifacts, console)
    _track(study, planned, profile, artifacts, console)


def _track(study: Study, planned: Sequence[StudyRun], profile: str, artifacts: Artifacts, console: Console) -> None:
    """Log the files to W&B if the study's runs are tracked."""
    config = planned[0].config
    files = [*artifacts.written, *artifacts.unchanged]
    folder = configuration.ROOT / config.paths.runs / "reports" / f"{study.name}-{profile}"
    common = [tag for tag in config.tracking.tags if all(tag in run.config.tracking.tags for run in planned)]
    settings = cast(DictConfig, OmegaConf.merge(config.tracking, {"job_type": "report", "tags": common}))
    if files and tracking.log_figures(settings, artifacts.root, files, folder):
        console.print(f"W&B: {len(files)} files of {study.name} are an artifact", markup=False)


def provenance(planned: Sequence[StudyRun]) -> str:
    """Return the versions, devices, commits and configurations of a study's finished runs as JSON, each value once."""
    summaries = [folders.load_summary(run.folder) for run in planned]
    versions = {name for summary in summaries for name in summary["versions"]}
    content = {
        "runs": len(summaries),
        "seeds": len({run.seed for run in planned}),
        "hours": round(sum(summary["seconds_wall"] for summary in summaries) / 3600, 2),
        "configurations": sorted(summary["identity"][:12] for summary in summaries),
        "commits": sorted({summary["git"]["commit"] for summary in summaries if summary["git"]}),
        "devices": sorted({summary["device"] for summary in summaries}),
        "threads": sorted({summary["threads"] for summary in summaries}),
        "python": sorted({summary["python"] for summary in summaries}),
        "versions": {
            name: sorted({summary["versions"].get(name) or "not installed" for summary in summaries})
            for name in sorted(versions)
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _say(artifacts: Artifacts, console: Console) -> None:
    for line in artifacts.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
