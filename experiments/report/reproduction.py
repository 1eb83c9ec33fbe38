"""From an empty results folder to figures and tables: the outputs of each study and how they are made."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from experiments.across_studies import forward_tolerance, linear_solvers, scaling
from experiments.bilinear.figures import figure_4a
from experiments.bilinear.figures import stepsize as bilinear_stepsize
from experiments.bilinear.tables import certificates as bilinear_certificates
from experiments.bilinear.tables import regret as bilinear_regret
from experiments.bilinear.tables import smoothing_strength
from experiments.denoising.figures import denoised_signals, figure_4b, figure_6, unrolling_cost
from experiments.denoising.tables import cost as denoising_cost
from experiments.denoising.tables import mse as denoising
from experiments.multilabel.figures import figure_3, figure_7, stand_in_images
from experiments.multilabel.tables import accuracy as multilabel_accuracy
from experiments.multilabel.tables import layer_share
from experiments.multilabel.tables import layers as topk_layers
from experiments.portfolio.figures import figure_4c
from experiments.portfolio.tables import final_regret, solver_accuracy
from experiments.report import paired
from experiments.report.artifacts import Artifacts, output_root
from experiments.run import configuration, folders, tracking
from experiments.sweep import studies
from experiments.sweep.pool import execute
from experiments.sweep.studies import Study, StudyRun
from foldopt.errors import FoldoptError

Maker = Callable[[Study, Sequence[StudyRun], Artifacts, str, str], None]
FIGURES: Mapping[str, Sequence[Maker]] = {
    "bilinear_kappa": (smoothing_strength.make,),
    "figure_4a": (figure_4a.make, bilinear_regret.make, bilinear_stepsize.make, paired.make),
    "figure_4b": (figure_4b.make, denoising.make, denoised_signals.make, paired.make),
    "figure_4c": (figure_4c.make, final_regret.make, paired.make),
    "figure_6": (figure_6.make, paired.make),
    "figure_7": (figure_7.make, multilabel_accuracy.make, stand_in_images.make, paired.make),
    "forward_tolerance": (forward_tolerance.make,),
    "portfolio_settings": (final_regret.make,),
}
# What is measured without training anything, by the study that it belongs to.
MEASUREMENTS: Mapping[str, Mapping[str, Callable[[str, str], Artifacts]]] = {
    "figure_4a": {"bilinear-certificates": bilinear_certificates.make},
    "figure_4b": {"denoising-cost": denoising_cost.make, "unrolling-cost": unrolling_cost.make},
    "figure_4c": {
        "solver-table": solver_accuracy.make,
        "linear-solvers": linear_solvers.make,
        "scaling": scaling.make,
    },
    "figure_7": {"figure-3": figure_3.make, "topk-layers": topk_layers.make, "layer-share": layer_share.make},
}


def make_command(target: str, profile: str) -> str:
    """Return the make command of `target` in `profile`."""
    return f"make {target}" if profile == "default" else f"make {target} PROFILE={profile}"


def make_figures(names: Sequence[str], profile: str, console: Console, mode: str | None = None) -> int:
    """Write figures and tables of the named studies from run folders; return 1 when runs are missing.

    mode: of W&B, which gets them too where it is on; None: as each study says.
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
    """Execute the named studies, then make their figures, tables and measurements; return the exit code.

    profile: None chooses by what is at hand, for each study, see `studies.profile_at_hand`. mode: of W&B, for the
    runs that are left to do and for the figures; None: as each study says. A study with failed runs gets no figure, the
    others do; a figure that cannot be made stops no other. 128 + signal when stopped: the same call goes on from there.
    """
    exit_code = 0
    chosen: dict[str, str] = {}
    for name in names:
        study = studies.load(name)
        chosen[name], why = (profile, None) if profile else studies.profile_at_hand(study)
        planned = studies.expand(study, chosen[name], mode=mode)
        said = why or f"profile {chosen[name]}"
        console.print(f"{study.title} ({name}, {said}): {len(planned)} runs", markup=False, soft_wrap=True)
        report = execute(planned, workers=workers, console=console)
        for line in report.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if report.stopped_by is not None:
            return report.exit_code
        if missing := len(report.failed) + len(report.elsewhere):
            exit_code = report.exit_code
            console.print(f"No figure of {name}: {missing} of its runs are not finished.", markup=False)
        else:
            exit_code |= _tried(name, console, _outputs, study, planned, chosen[name], console)
    for name in names:
        for target in MEASUREMENTS.get(name, ()):
            exit_code |= _tried(target, console, measure, target, chosen[name], console)
    return exit_code


def _tried(what: str, console: Console, do: Callable[..., None], *arguments: Any) -> int:
    """Call ``do(*arguments)``; where it fails show why and return 1, so that what does not depend on it is made."""
    try:
        do(*arguments)
    except Exception:
        console.print(f"No figures or tables of {what}:", markup=False)
        console.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


def measure(target: str, profile: str, console: Console) -> None:
    """Make the measurement of a make target unless that was done before, and write its table or figure."""
    makers = {target: maker for group in MEASUREMENTS.values() for target, maker in group.items()}
    console.print(f"Measuring: {target} (profile {profile})", markup=False)
    _say(makers[target](profile, make_command(target, profile)), console)


def measurements() -> list[str]:
    """Return the make targets of all measurements."""
    return [target for group in MEASUREMENTS.values() for target in group]


def _outputs(study: Study, planned: Sequence[StudyRun], profile: str, console: Console) -> None:
    torch.set_num_threads(1)  # as the runs: more would change digits, and wait for each other beside other work
    artifacts = Artifacts(output_root(profile))
    command = make_command(study.name.replace("_", "-"), profile)
    makers = FIGURES.get(study.name, ())
    for maker in makers:
        maker(study, planned, artifacts, command, make_command("reproduce", profile))
    if makers:
        artifacts.write(f"provenance/{study.name}.json", provenance(planned).encode())
    _say(artifacts, console)
    _track(study, planned, profile, artifacts, console)


def _track(study: Study, planned: Sequence[StudyRun], profile: str, artifacts: Artifacts, console: Console) -> None:
    """Log what was made to W&B where the study's runs are tracked."""
    config = planned[0].config
    files = [*artifacts.written, *artifacts.unchanged]
    folder = configuration.ROOT / config.paths.runs / "reports" / f"{study.name}-{profile}"
    common = [tag for tag in config.tracking.tags if all(tag in run.config.tracking.tags for run in planned)]
    settings = OmegaConf.merge(config.tracking, {"job_type": "report", "tags": common})
    if files and tracking.log_figures(settings, artifacts.root, files, folder):
        console.print(f"W&B: {len(files)} files of {study.name} are an artifact", markup=False)


def provenance(planned: Sequence[StudyRun]) -> str:
    """Return what the finished runs of a study were made with, as JSON: each value that occurs, once."""
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
