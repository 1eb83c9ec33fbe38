import pytest
from omegaconf import open_dict

from experiments.run import components, configuration, folders
from foldopt.errors import InputError


@pytest.mark.parametrize("group", ["task", "model", "backend", "linear_solver", "tracking"])
def test_every_configuration_composes(group):
    for path in (configuration.CONF / group).glob("*.yaml"):
        cfg = configuration.compose([f"{group}={path.stem}"])
        assert group == "tracking" or cfg[group].name == path.stem


def test_identity_follows_what_the_numbers_depend_on():
    base = folders.identity(configuration.compose([]))
    for same in (
        "device=cpu",
        "deterministic=true",
        "paths.runs=elsewhere",
        "progress=false",
        "tracking.mode=disabled",
    ):
        assert folders.identity(configuration.compose([same])) == base
    for other in ("seed=1", "task.degree=2", "backend=two_stage", "linear_solver=gmres", "train.lr=0.1", "threads=2"):
        assert folders.identity(configuration.compose([other])) != base


def test_identity_does_not_depend_on_where_a_class_lives():
    cfg = configuration.compose(["task=denoising", "model=operator"])
    moved = cfg.copy()
    for group in ("task", "model", "backend", "optimizer"):
        moved[group]._target_ = f"another_package.{group}.Moved"
    assert folders.identity(moved) == folders.identity(cfg)
    moved.task.name = "another"  # what a configuration is called still counts
    assert folders.identity(moved) != folders.identity(cfg)


def test_folders_say_what_is_in_them(tmp_path):
    cfg = configuration.compose([f"paths.runs={tmp_path}", "model=mlp_bn", "seed=4"])
    folder = folders.of(cfg)
    assert folder.parent == tmp_path / "portfolio"
    assert folder.name.startswith("fold-mlp_bn-seed4-")
    assert folders.status(folder) == "missing"
    folder.mkdir(parents=True)
    folders.write_atomically(folder / "config.yaml", "a: 1\n")
    assert folders.status(folder) == "interrupted"
    folders.write_atomically(folder / "summary.json", '{"status": "finished"}')
    assert folders.status(folder) == "finished"
    assert [path.name for path in folder.glob("*.new")] == []


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics.csv does not exist; run this configuration first"):
        folders.load_metrics(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary.json cannot be read"):
        folders.load_summary(tmp_path)


def test_an_option_that_came_later_keeps_the_identity_of_runs_made_without_it():
    cfg = configuration.compose(["task=denoising", "model=operator", "task.weight=2"])
    older = cfg.copy()
    with open_dict(older):
        del older.backend["forward_tol"]
    assert components.build(older).task.n_inputs == 100
    assert folders.identity(older) == folders.identity(cfg)
    cfg.backend.forward_tol = 1e-3
    assert folders.identity(older) != folders.identity(cfg)
