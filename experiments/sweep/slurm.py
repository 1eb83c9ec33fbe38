"""Slurm through its commands: submit a job array, list its tasks, cancel, requeue. Needs no accounting database."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from foldopt.errors import FoldoptError, InputError

RESOURCES = (
    *("partition", "account", "qos", "constraint", "exclude", "gres", "comment"),
    *("cpus_per_task", "cpus_per_gpu", "gpus_per_node", "gpus_per_task", "mem_per_cpu", "mem_per_gpu"),
)


class SlurmError(FoldoptError, RuntimeError):
    """A command of Slurm failed; the message holds its output."""


@dataclass(frozen=True)
class ArrayTask:
    """A task of a job array in the queue: its state and reason in Slurm's words, and its nodes."""

    name: str
    index: int
    state: str
    reason: str
    nodes: str


def options(launcher: DictConfig) -> list[str]:
    """Return the options of sbatch for the settings of conf/hydra/launcher/slurm.yaml.

    Raises InputError for more than one node or task: a run is one process.
    """
    for key in ("nodes", "tasks_per_node"):
        if launcher[key] != 1:
            raise InputError(f"hydra.launcher.{key}={launcher[key]}: a run is one process; take 1.")
    chosen = {key: launcher[key] for key in RESOURCES}
    chosen["mem"] = None if launcher.mem_gb is None else f"{launcher.mem_gb}G"
    chosen["time"] = launcher.timeout_min
    chosen["signal"] = f"B:USR1@{launcher.signal_delay_s}"
    chosen.update(launcher.additional_parameters)
    return [_option(key, value) for key, value in chosen.items() if value is not None]


def _option(key: str, value: object) -> str:
    flag = f"--{key.replace('_', '-')}"
    return flag if value is True else f"{flag}={shlex.quote(str(value))}"


def max_array_size() -> int:
    """Return the largest number of tasks that this cluster allows in a job array."""
    lines = _call("scontrol", "show", "config").splitlines()
    return next(int(line.split("=")[1]) for line in lines if line.startswith("MaxArraySize"))


def submit(script: Path) -> None:
    """Submit a batch script that holds its own options."""
    _call("sbatch", str(script))


def tasks(names: Sequence[str]) -> list[ArrayTask]:
    """Return the tasks of this user's job arrays of these names that are still in the queue."""
    if not names:
        return []
    form = "%j|%K|%T|%r|%N"
    lines = _call("squeue", "--noheader", "--array", "--me", f"--name={','.join(names)}", f"--format={form}")
    split = [line.split("|") for line in lines.splitlines()]
    return [ArrayTask(name, int(index), state, reason, nodes) for name, index, state, reason, nodes in split]


def cancel(names: Sequence[str]) -> None:
    """Cancel this user's jobs of these names; a running one gets SIGTERM, and SIGKILL after KillWait."""
    if names:
        _call("scancel", "--me", f"--name={','.join(names)}")


def requeue() -> bool:
    """Ask Slurm to start the job of this process again; return whether that was needed.

    It is not needed if Slurm is already ending the job (cancelled, preempted or requeued), or has started it again on
    another node because it considers this one lost.
    """
    environment = os.environ
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    known = _call("squeue", "--noheader", f"--jobs={job}", "--Format=State:20,RestartCnt:20").split()
    needed = known == ["RUNNING", environment.get("SLURM_RESTART_COUNT", "0")]
    if needed:
        _call("scontrol", "requeue", job)
    return needed


def _call(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise SlurmError(f"{command[0]} is not there: this machine is no login node of a Slurm cluster.") from error
    except subprocess.CalledProcessError as error:
        raise SlurmError(f"{shlex.join(command)} failed: {error.stderr.strip()}") from error
