"""What needs no Slurm: how settings become options of sbatch, and what is said where there is none."""

import pytest

from experiments import runs, slurm
from foldopt.errors import InputError


def test_settings_become_options_of_sbatch():
    settings = ["partition=gpu", "gpus_per_node=1", "mem_gb=8", "timeout_min=30", "signal_delay_s=60"]
    added = ["additional_parameters.mail-type=FAIL", "additional_parameters.exclusive=true"]
    options = slurm.options(runs.compose_launcher("slurm", settings + added))
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
        slurm.options(runs.compose_launcher("slurm", [setting]))


def test_a_machine_without_slurm_is_called_that(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmError, match="squeue is not there: this machine is no login node"):
        slurm.tasks(["mine"])
