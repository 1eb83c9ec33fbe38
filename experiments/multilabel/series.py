"""The reference series of the multilabel study, and the captions of its figures and tables."""

from __future__ import annotations

from collections.abc import Sequence

from data.noisy_labels import SOURCES
from experiments.report import style
from experiments.sweep.studies import StudyRun

EXACT, PERTURBED = "exact", "perturbed"


def title(planned: Sequence[StudyRun]) -> str:
    """Return the name of the images for a title."""
    source = SOURCES[planned[0].config.task.data]
    return source[0].upper() + source[1:]


def setting(planned: Sequence[StudyRun]) -> str:
    """Return the data, the network and the training as text."""
    config = planned[0].config
    return (
        f"{title(planned)}: {config.task.n_train} training and {config.task.n_test} test images, label "
        f"noise {config.task.noise:g}; DenseNet {config.model.depth}-{config.model.growth}, SGD {config.train.lr:g}, "
        f"batch size {config.train.batch_size}"
    )


def caption(planned: Sequence[StudyRun], command: str) -> str:
    """Return the caption of a figure: the setting, the seeds and the command."""
    return f"{setting(planned)};\n{style.seeds_note(planned)}. Made by: {command}"
