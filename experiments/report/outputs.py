"""The argument of the `make` functions of figures and tables, and the lookup of the modules that a study names."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from experiments.report.artifacts import Artifacts
from experiments.run.configuration import ROOT
from experiments.sweep.metrics import collect, require_finished
from experiments.sweep.studies import Study, StudyRun
from foldopt.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class StudyOutputs:
    """A study whose figures and tables are made from its runs.

    Attributes:
        study: The study.
        planned: Its runs in `profile`.
        profile: The profile.
        artifacts: Writes the files.
    """

    study: Study
    planned: Sequence[StudyRun]
    profile: str
    artifacts: Artifacts

    @property
    def command(self) -> str:
        """The make command of these figures and tables, which stands in their captions."""
        return make_command(self.study.target, self.profile, self.study.config_dir)

    @property
    def suffix(self) -> str:
        """The end of file names: "_stand_in" if the images stand in for CIFAR-100, else empty."""
        return "_stand_in" if self.planned[0].config.task.get("data") == "stand_in" else ""

    def require_finished(self) -> None:
        """Raise MissingRunsError, with the command that makes them, unless all runs are finished."""
        require_finished(self.planned, make_command("reproduce", self.profile, self.study.config_dir))

    def metrics(self) -> pd.DataFrame:
        """Return the metrics of all runs, see `collect`. Raises MissingRunsError unless all are finished."""
        self.require_finished()
        return collect(self.planned)


@dataclass(frozen=True)
class Measurement:
    """What is measured without training: its make target, its size, and where its table or figure is written.

    config_dir: of the study that has the measurement, see `Study`.
    """

    target: str
    profile: str
    artifacts: Artifacts
    config_dir: Path | None = None

    @property
    def command(self) -> str:
        """The make command of this measurement, which stands in its captions."""
        return make_command(self.target, self.profile, self.config_dir)

    def settings(self, profiles: Mapping[str, T]) -> T:
        """Return the settings of this profile. Raises InputError, with the existing profiles, if there are none."""
        if self.profile not in profiles:
            raise InputError(f"profile={self.profile!r} does not exist; choose one of {', '.join(profiles)}")
        return profiles[self.profile]


def make_command(target: str, profile: str, config_dir: Path | None = None) -> str:
    """Return the make command of `target` in `profile`; config_dir: the user's configurations, see `Study`."""
    options = [] if profile == "default" else [f"PROFILE={profile}"]
    if config_dir is not None:
        options.append(f"CONFIG_DIR={shlex.quote(os.path.relpath(config_dir, ROOT))}")
    return " ".join(["make", target, *options])


def member(path: str, study: str) -> Any:
    """Return the member of a module by its dotted path in a study's YAML. Raises InputError if it is not there."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"study {study} needs {path}, which cannot be imported: {error}. For a module of your own, put its folder "
            "on PYTHONPATH."
        ) from error


def make_outputs(outputs: StudyOutputs) -> None:
    """Call `make` of each module that the study's YAML lists under `outputs`, to write its figures and tables."""
    makers: list[Callable[[StudyOutputs], None]] = [
        member(f"{module}.make", outputs.study.name) for module in outputs.study.outputs
    ]
    for maker in makers:
        maker(outputs)
