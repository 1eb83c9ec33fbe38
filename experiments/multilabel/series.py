"""What the figures and tables of the multilabel study share: its reference series and what captions say."""

from __future__ import annotations

from collections.abc import Sequence

from data.noisy_labels import SOURCES
from experiments.report import style
from experiments.sweep.studies import StudyRun

EXACT, PERTURBED = "exact", "perturbed"


def title(planned: Sequence[StudyRun]) -> str:
    """Return what the images are."""
    source = SOURCES[planned[0].config.task.data]
    return source[0].upper() + source[1:]


def caption(planned: Sequence[StudyRun], command: str) -> str:
    """Return what was trained on what, and the command."""
    config = planned[0].config
    return (
        f"{title(planned)}: {config.task.n_train} training and {config.task.n_test} test images, label "
        f"noise {config.task.noise:g}; DenseNet {config.model.depth}-{config.model.growth}, SGD {config.train.lr:g}, "
        f"batch size {config.train.batch_size};\n{style.seeds_note(planned)}. Made by: {command}"
    )
