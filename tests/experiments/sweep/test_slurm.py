"""What needs no Slurm: how settings become options of sbatch, and what is said where there is none."""

import json

import pytest

from experiments.run import configuration, folders
from experiments.sweep import cluster as sweeps
from experiments.sweep import slurm
from foldopt.errors import InputError
from scripts.sweep import main


def test_settings_become_options_of_sbatch():
    settings = ["partition=gpu", "gpus_per_node=1", "mem_gb=8", "timeout_min=30", "signal_delay_s=60"]
    added = ["additional_parameters.mail-type=FAIL", "additional_parameters.exclusive=true"]
    options = slurm.options(configuration.compose_launcher("slurm", settings + added))
    assert set(options) == {
        *("--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=8G", "--time=30"),
        *("--signal=B:USR1@60", "--mail-type=FAIL", "--exclusive"),
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("partitoin=gpu", "partitoin=gpu: Key 'partitoin' not in"),
        ("timeout_min=soon", "timeout_min=soon: Value 'soon' of type 'str' could not be converted"),
        ("nodes=2", "hydra.launcher.nodes=2: a run is one process; take 1"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(InputError, match=message):
        slurm.options(configuration.compose_launcher("slurm", [setting]))


def test_a_machine_without_slurm_is_called_that(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmError, match="squeue is not there: this machine is no login node"):
        slurm.tasks(["mine"])


def test_the_runs_of_a_sweep_can_be_tracked(monkeypatch, tmp_path):
    of = sweeps.Sweep.of.__func__

    def here(cls, study, *choices):
        found = of(cls, study, *choices)
        return cls(found.study, found.profile, found.planned, tmp_path)

    monkeypatch.setattr(sweeps.Sweep, "of", classmethod(here))
    monkeypatch.setattr(slurm, "tasks", lambda names: [])
    monkeypatch.setattr(slurm, "max_array_size", lambda: 1000)
    monkeypatch.setattr(slurm, "submit", lambda script: None)
    monkeypatch.setattr(folders, "status", lambda folder: "missing")
    assert main(["submit", "figure_6", "--profile", "smoke", "--tracking", "online"]) == 0
    (file,) = tmp_path.glob("*/tasks.json")
    for (run,) in json.loads(file.read_text()):
        settings = configuration.compose(run["overrides"]).tracking
        assert (settings.mode, settings.group) == ("online", "figure_6")
        assert "smoke" in settings.tags
