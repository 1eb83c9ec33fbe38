"""Check that the committed tables follow from the run folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from experiments.report.artifacts import Artifacts, output_root
from experiments.report.outputs import StudyOutputs, make_outputs
from experiments.run import folders
from experiments.sweep import studies
from experiments.sweep.studies import Study, StudyRun

NUMBERS = (".csv", ".md")


def verify(names: Sequence[str], profile: str, console: Console) -> int:
    """Recompute the numbers of each study's figures and tables, and print those that differ from results/.

    Studies with unfinished runs cannot be checked and are named. Returns 1 if a number differs or if no study could be
    checked, else 0.
    """
    differing, checked = [], 0
    for name in names:
        study = studies.load(name)
        planned = studies.expand(study, profile)
        finished = sum(folders.status(run.folder) == "finished" for run in planned)
        if finished < len(planned):
            console.print(f"{study.name}: not checked, {finished} of {len(planned)} runs are here", markup=False)
            continue
        wrong = list(_differing(study, planned, profile))
        checked += 1
        differing += wrong
        said = "the same as in the run folders" if not wrong else f"differs in {', '.join(wrong)}"
        console.print(f"{study.name}: {said}", markup=False, soft_wrap=True)
    return int(bool(differing) or not checked)


def _differing(study: Study, planned: Sequence[StudyRun], profile: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        artifacts = Artifacts(Path(folder))
        make_outputs(StudyOutputs(study, planned, profile, artifacts))
        for path in artifacts.written:
            name = path.relative_to(artifacts.root)
            committed = output_root(profile) / name
            if path.suffix in NUMBERS and not (committed.is_file() and committed.read_bytes() == path.read_bytes()):
                yield str(name)
