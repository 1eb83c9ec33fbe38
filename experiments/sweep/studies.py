"""Studies: a YAML file, of conf/study or of the user's own, lists the runs of one figure; expanded here into runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data import cifar100
from experiments.run import configuration, folders, tracking
from foldopt.checks import require_whole
from foldopt.errors import InputError

PROFILES = ("smoke", "default", "paper")
REQUIRED = {"name", "title", "base", "grid", "series", "profiles"}
OPTIONAL = {"outputs", "paired", "measurements", "claims", "figures", "tables"}
STUDY_FOLDER = configuration.CONF / "study"
# What a profile may need: a function that looks for it, and its name in messages.
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
    """A study as its YAML file states it; nothing else has to list it.

    outputs: modules whose `make` writes a figure or table from the finished runs. paired: what
    `experiments.report.paired` compares. measurements: by make target, modules whose `make` measures something without
    training. claims: the module whose CLAIMS of the paper are judged. figures, tables: titles in the report by file
    name. config_dir: the user's folder of configurations, whose study/ holds the file; None for a study of conf/study.
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
    config_dir: Path | None = None

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
    """Return the names of all studies of conf/study."""
    return sorted(path.stem for path in STUDY_FOLDER.glob("*.yaml"))


def available(config_dir: Path | None = None) -> dict[str, str]:
    """Return what `load` takes for each study, by its name: those of conf/study, and those of the user's own folder.

    config_dir: the user's folder of configurations; every YAML file of its study/ is a study. Raises InputError if
    there is none, or if one has the name of a study of conf/study.
    """
    found = {name: name for name in names()}
    if config_dir is None:
        return found
    own = {path.stem: str(path) for path in sorted((config_dir.absolute() / "study").glob("*.yaml"))}
    if not own:
        raise InputError(f"--config-dir {config_dir}: there is no study/<name>.yaml in this folder; add one.")
    if twice := sorted(set(own) & set(found)):
        raise InputError(f"--config-dir {config_dir}: conf/study has a study {twice[0]!r} too; rename yours.")
    return found | own


def load(study: str) -> Study:
    """Read and check a study: conf/study/<study>.yaml, or the YAML file at the path `study`.

    Raises InputError that names the file and the key that is wrong.
    """
    own = study.endswith(".yaml")
    path = Path(study).absolute() if own else STUDY_FOLDER / f"{study}.yaml"
    if not path.is_file():
        raise InputError(f"study={study!r} does not exist; choose one of {', '.join(names())}, or the path of a file.")
    if own and path.parent.name != "study":
        raise InputError(f"study={study!r}: move the file into a folder study/ of your folder of configurations.")
    content: Any = OmegaConf.to_container(configuration.load_yaml(path))
    parsed = parse(content, source=path.name)
    if parsed.name != path.stem:
        raise InputError(f"{path.name}: name={parsed.name!r} differs from the file's name; change one of the two.")
    return replace(parsed, config_dir=path.parents[1]) if own else parsed


def parse(raw: Mapping[str, Any], source: str) -> Study:
    """Turn the content of a study file into a Study; `source` is the file's name for error messages."""
    _require_keys(source, raw, REQUIRED, OPTIONAL)
    if not re.fullmatch(r"\w+", str(raw["name"])):
        raise InputError(
            f"{source}: name={raw['name']!r}: take letters, digits and _ only, as it becomes a make target."
        )
    for key in ("base", "outputs"):
        _require_list(f"{source}: {key}", raw.get(key, []))
    for key in ("grid", "series", "profiles", "measurements", "figures", "tables"):
        _require_mapping(f"{source}: {key}", raw.get(key, {}))
    for key, values in raw["grid"].items():
        _require_list(f"{source}: grid.{key}", values)
    for series, content in raw["series"].items():
        _require_keys(f"{source}: series.{series}", content, {"title", "overrides"}, set())
        _require_list(f"{source}: series.{series}.overrides", content["overrides"])
    return Study(
        name=raw["name"],
        title=raw["title"],
        base=tuple(raw["base"]),
        grid={key: tuple(values) for key, values in raw["grid"].items()},
        series={series: tuple(content["overrides"]) for series, content in raw["series"].items()},
        titles={series: content["title"] for series, content in raw["series"].items()},
        profiles={name: _profile(raw, name, f"{source}: profiles.{name}") for name in raw["profiles"]},
        paired=_pairing(raw["paired"], source) if "paired" in raw else None,
        **{key: raw[key] for key in ("measurements", "claims", "figures", "tables") if key in raw},
        outputs=tuple(raw.get("outputs", ())),
    )


def _profile(raw: Mapping[str, Any], name: str, where: str) -> Profile:
    content = raw["profiles"][name]
    _require_keys(where, content, {"seeds", "series"}, {"overrides", "needs"})
    require_whole(f"{where}.seeds", content["seeds"], 1)
    for key in ("overrides", "needs"):
        _require_list(f"{where}.{key}", content.get(key, []))
    if unknown := set(content.get("needs", ())) - set(NEEDS):
        raise InputError(f"{where}.needs={sorted(unknown)}; choose from {sorted(NEEDS)}")
    _require_mapping(f"{where}.series", content["series"])
    places = {**raw["grid"], "seed": range(content["seeds"])}
    series = {}
    for chosen, parts in content["series"].items():
        if chosen not in raw["series"]:
            raise InputError(f"{where}.series.{chosen}: no such series; choose from {sorted(raw['series'])}")
        parts = parts if isinstance(parts, list) else [parts]
        for part in parts:
            _check_part(f"{where}.series.{chosen}", part, places)
        series[chosen] = tuple({key: tuple(values) for key, values in part.items()} for part in parts)
    return Profile(
        seeds=content["seeds"],
        overrides=tuple(content.get("overrides", ())),
        series=series,
        needs=tuple(content.get("needs", ())),
    )


def _require_mapping(where: str, content: Any) -> None:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: expected keys with values, got {content!r}")


def _require_keys(where: str, content: Any, required: set[str], optional: set[str]) -> None:
    _require_mapping(where, content)
    if not required <= set(content) <= required | optional:
        more = f", and perhaps {sorted(optional)}" if optional else ""
        raise InputError(f"{where}: expected the keys {sorted(required)}{more}, got {sorted(content)}")


def _require_list(where: str, content: Any) -> None:
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise InputError(f"{where}: expected a list, got {content!r}")


def _pairing(raw: Mapping[str, Any], source: str) -> Pairing:
    try:
        pairs = tuple((series, against) for series, against in raw["comparisons"])
        return Pairing(**{**raw, "by": tuple(raw["by"]), "comparisons": pairs})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: paired={dict(raw)}: expected value, by (a list) and comparisons (pairs of series), and perhaps "
            f"unit and rows: {error}"
        ) from error


def _check_part(where: str, part: Any, places: Mapping[str, Sequence[Any]]) -> None:
    """Raise InputError unless a part of the grid and the seeds, {key: values}, lies inside `places`."""
    _require_mapping(where, part)
    for key, values in part.items():
        if key not in places:
            raise InputError(f"{where}: {key} is neither seed nor a key of the grid {sorted(places)}")
        _require_list(f"{where}.{key}", values)
        if outside := [value for value in values if value not in places[key]]:
            raise InputError(f"{where}: {key}={outside} is not among {list(places[key])}")


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
    seedless = (*_search(study), *study.base, *study.series[series], *place, *study.profile(profile).overrides)
    if seedless not in composed:
        try:
            composed[seedless] = configuration.compose(list(seedless))
        except HydraException as error:
            raise InputError(f"study {study.name}, series {series}: {error}") from error
    overrides, config = (*seedless, f"seed={seed}"), composed[seedless].copy()
    config.seed = seed
    config.tracking.mode = config.tracking.mode if mode is None else mode
    places = [f"{axis(key)}={value}" for key, value in point.items()]
    if mode is not None or config.tracking.mode != "disabled":
        overrides += tracking.label(config.tracking, study.name, profile, series, places)
    label = " ".join([series, *places, f"seed={seed}"])
    return StudyRun(study.name, series, label, point, seed, overrides, config, folders.of(config))


def _search(study: Study) -> tuple[str, ...]:
    """Return the override by which Hydra also finds the tasks, models and backends in the study's own folder."""
    if study.config_dir is None:
        return ()
    return (f"hydra.searchpath={json.dumps([str(study.config_dir)], ensure_ascii=False)}",)


def _check_folders(expanded: list[StudyRun]) -> None:
    owners: dict[Path, str] = {}
    for run in expanded:
        if run.folder in owners:
            raise InputError(
                f"study {run.study}: {owners[run.folder]!r} and {run.label!r} have the same configuration "
                f"(folder {run.folder}); their overrides must differ in a key of a run's identity"
            )
        owners[run.folder] = run.label
