"""Studies: a YAML file under conf/study names the runs of one figure; expanded here into run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data import cifar100
from experiments.run import configuration, folders, tracking
from foldopt.errors import InputError

PROFILES = ("smoke", "default", "paper")
REQUIRED = {"name", "title", "base", "grid", "series", "profiles"}
OPTIONAL = {"outputs", "paired", "measurements", "claims", "figures", "tables"}
STUDY_FOLDER = configuration.CONF / "study"
# What a profile may need: whether it is at hand, and how that is said.
NEEDS: Mapping[str, tuple[Callable[[], bool], str]] = {
    "cuda": (torch.cuda.is_available, "a CUDA GPU"),
    "cifar100": (cifar100.available, "CIFAR-100 in data/cache"),
}


@dataclass(frozen=True)
class Profile:
    """One size of a study: the number of seeds, overrides, and which series run on which parts of the grid and seeds.

    needs: what must be at hand for this size to be chosen without being asked for, see `NEEDS`.
    """

    seeds: int
    overrides: tuple[str, ...]
    series: Mapping[str, tuple[Mapping[str, tuple[Any, ...]], ...]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairing:
    """What a study compares by paired tests: the column `value` within each group `by`, over pairs of equal `unit`.

    comparisons: pairs (series, against). rows: the dotted path of the function that picks the rows to compare from the
    metrics of all runs.
    """

    value: str
    by: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]
    unit: str = "seed"
    rows: str = "experiments.report.aggregation.last_test_rows"


@dataclass(frozen=True)
class Study:
    """A study as its YAML file states it, which is all there is to register.

    outputs: modules whose `make` writes a figure or table from the finished runs. paired: what
    `experiments.report.paired` compares. measurements: by make target, modules whose `make` measures something without
    training. claims: the module whose CLAIMS of the paper are judged. figures, tables: titles in the report by file
    name.
    """

    name: str
    title: str
    base: tuple[str, ...]
    grid: Mapping[str, tuple[Any, ...]]
    series: Mapping[str, tuple[str, ...]]
    titles: Mapping[str, str]
    profiles: Mapping[str, Profile]
    outputs: tuple[str, ...] = ()
    paired: Pairing | None = None
    measurements: Mapping[str, str] = field(default_factory=dict)
    claims: str | None = None
    figures: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The make target that writes the study's figures and tables."""
        return self.name.replace("_", "-")

    def profile(self, name: str) -> Profile:
        """Return the profile called `name`; InputError lists those that exist."""
        if name not in self.profiles:
            raise InputError(f"study {self.name} has no profile {name!r}; choose one of {', '.join(self.profiles)}")
        return self.profiles[name]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: its place in the grid, and the configuration and folder that follow from it."""

    study: str
    series: str
    label: str
    point: Mapping[str, Any]
    seed: int
    overrides: tuple[str, ...]
    config: DictConfig = field(repr=False, compare=False)
    folder: Path = field(compare=False)


def profile_at_hand(study: Study) -> tuple[str, str | None]:
    """Return the profile of `study` for this machine and its data, and why; no reason where there is no choice.

    That is "paper" where all that it needs is here, else "default".
    """
    needs = study.profiles["paper"].needs if "paper" in study.profiles else ()
    if not needs:
        return "default", None
    missing = [said for found, said in (NEEDS[need] for need in needs) if not found()]
    if missing:
        return "default", f"profile default, without {' and '.join(missing)}"
    return "paper", f"profile paper, with {' and '.join(NEEDS[need][1] for need in needs)}"


def axis(key: str) -> str:
    """Return the short name of a grid key, e.g. degree for task.degree."""
    return key.rpartition(".")[2]


def names() -> list[str]:
    """Return the names of all studies under conf/study."""
    return sorted(path.stem for path in STUDY_FOLDER.glob("*.yaml"))


def load(name: str) -> Study:
    """Read and check conf/study/<name>.yaml; InputError names the key that is wrong."""
    path = STUDY_FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"study={name!r} does not exist; choose one of {', '.join(names())}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: expected a mapping with the keys {sorted(REQUIRED)}, got {content!r}")
    return parse({str(key): value for key, value in content.items()}, source=path.name)


def parse(raw: Mapping[str, Any], source: str) -> Study:
    """Turn the content of a study file into a Study; `source` is the file's name for error messages."""
    if not REQUIRED <= set(raw) <= REQUIRED | OPTIONAL:
        raise InputError(
            f"{source}: expected the keys {sorted(REQUIRED)}, and perhaps {sorted(OPTIONAL)}, got {sorted(raw)}"
        )
    grid = {key: tuple(values) for key, values in raw["grid"].items()}
    profiles = {}
    for profile_name, content in raw["profiles"].items():
        places = {**grid, "seed": range(int(content["seeds"]))}
        series = {name: part if isinstance(part, list) else [part] for name, part in content["series"].items()}
        for name, parts in series.items():
            for part in parts:
                _check_part(f"{source}: profiles.{profile_name}.series.{name}", name, part, raw["series"], places)
        profiles[profile_name] = Profile(
            seeds=int(content["seeds"]),
            overrides=tuple(content.get("overrides", ())),
            series={
                name: tuple({key: tuple(values) for key, values in part.items()} for part in parts)
                for name, parts in series.items()
            },
            needs=tuple(content.get("needs", ())),
        )
        if unknown := set(profiles[profile_name].needs) - set(NEEDS):
            raise InputError(f"{source}: profiles.{profile_name}.needs={sorted(unknown)}; choose from {sorted(NEEDS)}")
    return Study(
        name=raw["name"],
        title=raw["title"],
        base=tuple(raw["base"]),
        grid=grid,
        series={series: tuple(content["overrides"]) for series, content in raw["series"].items()},
        titles={series: content["title"] for series, content in raw["series"].items()},
        profiles=profiles,
        paired=_pairing(raw["paired"], source) if "paired" in raw else None,
        **{key: raw[key] for key in ("measurements", "claims", "figures", "tables") if key in raw},
        outputs=tuple(raw.get("outputs", ())),
    )


def _pairing(raw: Mapping[str, Any], source: str) -> Pairing:
    try:
        pairs = tuple((series, against) for series, against in raw["comparisons"])
        return Pairing(**{**raw, "by": tuple(raw["by"]), "comparisons": pairs})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: paired={dict(raw)}: expected value, by (a list) and comparisons (pairs of series), and perhaps "
            f"unit and rows: {error}"
        ) from error


def _check_part(
    where: str, series: str, part: Mapping[str, Any], known: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> None:
    if series not in known:
        raise InputError(f"{where}: no such series; choose from {sorted(known)}")
    for key, values in part.items():
        if key not in grid:
            raise InputError(f"{where}: {key} is neither seed nor a key of the grid {sorted(grid)}")
        if outside := [value for value in values if value not in grid[key]]:
            raise InputError(f"{where}: {key}={outside} is not among {list(grid[key])}")


def expand(
    study: Study, profile: str = "default", series: set[str] | None = None, mode: str | None = None
) -> list[StudyRun]:
    """Return the runs of `study` in `profile`, seed by seed so that every series advances evenly.

    `series` restricts the runs to the named series; `mode` is that of W&B, None: the study's own. Two runs that share a
    folder raise InputError, as one would silently stand for the other.
    """
    size = study.profile(profile)
    if series is not None and (unknown := series - set(size.series)):
        raise InputError(
            f"series={sorted(unknown)} is not in {study.name}/{profile}; choose from {sorted(size.series)}"
        )
    expanded: list[StudyRun] = []
    composed: dict[tuple[str, ...], DictConfig] = {}
    for seed in range(size.seeds):
        for values in product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            place = {**point, "seed": seed}
            for name, parts in size.series.items():
                wanted = series is None or name in series
                if wanted and any(all(place[key] in some for key, some in part.items()) for part in parts):
                    expanded.append(_study_run(study, profile, name, point, seed, mode, composed))
    _check_folders(expanded)
    return expanded


def _study_run(
    study: Study,
    profile: str,
    series: str,
    point: Mapping[str, Any],
    seed: int,
    mode: str | None,
    composed: dict[tuple[str, ...], DictConfig],
) -> StudyRun:
    """Return one run; `composed` keeps the configuration of each place, which is slow to compose, for all seeds."""
    place = [f"{key}={value}" for key, value in point.items()]
    seedless = (*study.base, *study.series[series], *place, *study.profile(profile).overrides)
    if seedless not in composed:
        composed[seedless] = configuration.compose(list(seedless))
    overrides, config = (*seedless, f"seed={seed}"), composed[seedless].copy()
    config.seed = seed
    config.tracking.mode = config.tracking.mode if mode is None else mode
    places = [f"{axis(key)}={value}" for key, value in point.items()]
    if mode is not None or config.tracking.mode != "disabled":
        overrides += tracking.label(config.tracking, study.name, profile, series, places)
    label = " ".join([series, *places, f"seed={seed}"])
    return StudyRun(study.name, series, label, point, seed, overrides, config, folders.of(config))


def _check_folders(expanded: list[StudyRun]) -> None:
    owners: dict[Path, str] = {}
    for run in expanded:
        if run.folder in owners:
            raise InputError(
                f"study {run.study}: {owners[run.folder]!r} and {run.label!r} have the same configuration "
                f"(folder {run.folder}); their overrides must differ in a key of a run's identity"
            )
        owners[run.folder] = run.label
