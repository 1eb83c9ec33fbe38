from collections import Counter

import pytest
import yaml

from experiments.run import configuration, folders
from experiments.sweep import studies
from foldopt.errors import InputError

RAW = {
    "name": "tiny",
    "title": "Tiny",
    "base": ["task=portfolio", "tracking.mode=disabled"],
    "grid": {"task.degree": [1, 3], "model": ["mlp", "mlp_bn"]},
    "series": {
        "fold": {"title": "fold", "overrides": ["backend=fold"]},
        "two_stage": {"title": "two-stage", "overrides": ["backend=two_stage"]},
    },
    "profiles": {
        "default": {
            "seeds": 3,
            "overrides": ["train.epochs=2"],
            "series": {"fold": {}, "two_stage": {"model": ["mlp"], "task.degree": [3]}},
        }
    },
}


def with_part(part: dict) -> dict:
    profile = {**RAW["profiles"]["default"], "series": {"fold": part}}
    return {**RAW, "profiles": {"default": profile}}


def test_expansion_is_grid_times_series_times_seeds_less_what_the_profile_leaves_out():
    expanded = studies.expand(studies.parse(RAW, "tiny.yaml"))
    assert Counter(run.series for run in expanded) == {"fold": 3 * 2 * 2, "two_stage": 3}
    assert all(run.point == {"task.degree": 3, "model": "mlp"} for run in expanded if run.series == "two_stage")


def test_overrides_reach_the_configuration():
    run = studies.expand(studies.parse(RAW, "tiny.yaml"))[-1]
    assert run.overrides == (
        "task=portfolio",
        "tracking.mode=disabled",
        "backend=fold",
        "task.degree=3",
        "model=mlp_bn",
        "train.epochs=2",
        "seed=2",
    )
    assert run.label == "fold degree=3 model=mlp_bn seed=2"
    assert (run.config.task.degree, run.config.train.epochs, run.config.seed) == (3, 2, 2)
    assert run.folder == folders.of(run.config)


def test_tracking_a_study_groups_its_runs_and_moves_none():
    untracked = studies.expand(studies.parse(RAW, "tiny.yaml"))
    tracked = studies.expand(studies.parse(RAW, "tiny.yaml"), mode="online")
    assert [run.folder for run in tracked] == [run.folder for run in untracked]
    assert folders.identity(tracked[0].config) == folders.identity(untracked[0].config)
    settings = configuration.compose(list(tracked[-1].overrides)).tracking
    assert settings == tracked[-1].config.tracking
    assert (settings.mode, settings.group, settings.job_type) == ("online", "tiny", "fold")
    assert settings.tags == ["fold", "default", "degree=3", "model=mlp_bn"], "of all seeds"
    assert all(run.config.tracking.group is None for run in untracked)


def test_a_study_keeps_its_own_group_and_tags():
    own = ["tracking.mode=offline", "tracking.group=mine", "tracking.tags=[first, second]"]
    run = studies.expand(studies.parse({**RAW, "base": [*RAW["base"], *own]}, "tiny.yaml"))[0]
    settings = configuration.compose(list(run.overrides)).tracking
    assert (settings.mode, settings.group, settings.job_type) == ("offline", "mine", "fold")
    assert settings.tags[:3] == ["first", "second", "fold"]


def test_what_a_study_has_for_wandb_is_checked():
    raw = {**RAW, "base": [*RAW["base"], "tracking.tags=mine"]}
    with pytest.raises(InputError, match=r"tracking.tags=mine: expected a list of texts"):
        studies.expand(studies.parse(raw, "tiny.yaml"), mode="offline")
    with pytest.raises(InputError, match=r"tracking.mode='sometimes' is unknown; choose one of"):
        studies.expand(studies.parse(RAW, "tiny.yaml"), mode="sometimes")


def test_series_can_be_restricted():
    study = studies.parse(RAW, "tiny.yaml")
    assert {run.series for run in studies.expand(study, series={"two_stage"})} == {"two_stage"}
    with pytest.raises(InputError, match=r"series=\['nonsense'\].*choose from"):
        studies.expand(study, series={"nonsense"})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**RAW, "extra": 1}, "expected the keys"),
        (with_part({"task.depth": [1]}), "task.depth is neither seed nor a key of the grid"),
        (with_part({"task.degree": [2]}), r"task.degree=\[2\] is not among"),
    ],
)
def test_a_wrong_study_file_is_named(raw, message):
    with pytest.raises(InputError, match=f"tiny.yaml: .*{message}|tiny.yaml: {message}"):
        studies.parse(raw, "tiny.yaml")


def test_unknown_study_and_profile_list_the_choices():
    with pytest.raises(InputError, match="figure_4c"):
        studies.load("nonsense")
    with pytest.raises(InputError, match="no profile 'huge'; choose one of default"):
        studies.expand(studies.parse(RAW, "tiny.yaml"), "huge")


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        ("study/tiny.yaml", "name: [", "tiny.yaml is no YAML"),
        ("study/tiny.yaml", "- fold", "tiny.yaml holds a list; expected keys with values"),
        ("study/tiny.yaml", "name: tiny", r"tiny.yaml: expected the keys \['base', 'grid'"),
        (
            "study/a-b.yaml",
            "{name: a-b, title: T, base: [], grid: {}, series: {}, profiles: {}}",
            "take letters, digits",
        ),
        ("tiny.yaml", "name: tiny", "move the file into a folder study/"),
    ],
)
def test_a_wrong_file_of_one_s_own_is_named(tmp_path, place, text, message):
    (tmp_path / "study").mkdir()
    (tmp_path / place).write_text(text)
    with pytest.raises(InputError, match=message):
        studies.load(str(tmp_path / place))


def test_a_file_of_one_s_own_finds_the_parts_in_its_folder(tmp_path):
    own = {**RAW, "grid": {**RAW["grid"], "model": ["mlp", "mine"]}}
    for name, content in {"study/tiny": own, "model/mine": {"_target_": "mine.Model", "name": "mine"}}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "study" / "tiny.yaml"
    assert studies.available(tmp_path)["tiny"] == str(path)
    study = studies.load(str(path))
    assert study.config_dir == tmp_path
    run = next(run for run in studies.expand(study) if run.point["model"] == "mine")
    assert run.config.model._target_ == configuration.compose(list(run.overrides)).model._target_ == "mine.Model"
    with pytest.raises(InputError, match=r"study tiny, series fold: .*Could not find 'model/mine'"):
        studies.expand(studies.parse(own, "tiny.yaml"))


def test_a_series_runs_on_every_part_of_a_list_once_each():
    parts = [{"task.degree": [1], "model": ["mlp"]}, {"task.degree": [1, 3], "model": ["mlp_bn"], "seed": [1]}]
    profile = {**RAW["profiles"]["default"], "seeds": 2, "series": {"fold": [*parts, parts[0]]}}
    expanded = studies.expand(studies.parse({**RAW, "profiles": {"default": profile}}, "tiny.yaml"))
    found = [(run.point["task.degree"], run.point["model"], run.seed) for run in expanded]
    assert sorted(found) == [(1, "mlp", 0), (1, "mlp", 1), (1, "mlp_bn", 1), (3, "mlp_bn", 1)]


def test_two_runs_of_one_configuration_are_refused():
    twin = {"title": "the same", "overrides": ["backend=fold"]}
    profile = {**RAW["profiles"]["default"], "series": {"fold": {}, "twin": {}}}
    raw = {**RAW, "series": {**RAW["series"], "twin": twin}, "profiles": {"default": profile}}
    with pytest.raises(InputError, match="have the same configuration"):
        studies.expand(studies.parse(raw, "tiny.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", studies.names())
@pytest.mark.parametrize("profile", studies.PROFILES)
def test_every_study_composes_in_every_profile(name, profile):
    study = studies.load(name)
    expanded = studies.expand(study, profile)
    assert study.name == name
    assert len({run.label for run in expanded}) == len(expanded)
    assert len({run.folder for run in expanded}) == len(expanded)


def test_figure_4c_has_five_seeds_everywhere_and_its_slow_peers_three_on_a_part():
    expanded = studies.expand(studies.load("figure_4c"))
    places = Counter((run.series, run.point["task.degree"], run.point["model"]) for run in expanded)
    slow = ("fold_gurobi", "cvxpylayers_paper", "cvxpylayers_normalized")
    assert {count for (series, *_), count in places.items() if series in slow} == {3}
    assert {count for (series, *_), count in places.items() if series not in slow} == {5}
    everywhere = {(degree, model) for degree in (1, 2, 3) for model in ("mlp", "mlp_bn")}
    missing = {"fold": set(), "cvxpylayers_paper": {(1, "mlp_bn"), (2, "mlp_bn")}, "two_stage": set()}
    for series, without in missing.items():
        assert {(degree, model) for name, degree, model in places if name == series} == everywhere - without
