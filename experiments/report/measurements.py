"""Measurements of time and memory, made once in a separate process and kept beside the run folders."""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
import torch
from torch import Tensor

from experiments.report.artifacts import RESULTS
from experiments.run.folders import write_atomically
from experiments.sweep.pool import thread_environment
from foldopt.errors import FoldoptError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)

T = TypeVar("T")
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
LAST_BITS = 2.0**-50  # relative change of a layer's parameters between passes, so that no result can be reused


def measured_once(
    name: str, settings: Settings, measure: Callable[[Settings], pd.DataFrame], *also: object, threads: int = 1
) -> pd.DataFrame:
    """Return ``measure(settings)``, read from results/runs/<name>-<hash> if it has been measured before.

    Args:
        name: Name of the measurement.
        settings: A dataclass; its values are part of the hash.
        measure: Makes the measurement, in a separate process.
        also: Other values that the numbers depend on, for the hash.
        threads: Number of threads of that process.
    """
    key = hashlib.sha256(json.dumps([asdict(settings), *also]).encode()).hexdigest()[:12]
    path = RESULTS / "runs" / f"{name}-{key}" / "measurements.csv"
    if not path.is_file():
        rows = in_own_process(measure, settings, threads=threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, rows.to_csv(index=False))
    return pd.read_csv(path)


def in_own_process(function: Callable[..., T], *arguments: object, threads: int = 1) -> T:
    """Return ``function(*arguments)``, computed in a new process with this number of threads."""
    with thread_environment(threads), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def seconds(call: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `call` and the seconds it took, including all kernels on the GPU."""
    _synchronize()
    begin = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - begin


def timed_gradient(
    layer: Callable[[Tensor], Tensor], leaf: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, float, float]:
    """Return the output of `layer`, the gradient of its loss with respect to `leaf`, and the seconds of both passes."""
    output, forward = seconds(lambda: layer(leaf))
    value = loss(output)
    (gradient,), backward = seconds(lambda: torch.autograd.grad(value, leaf))
    return output.detach(), gradient, forward, backward


def peak_memory(call: Callable[[], T], device: str = "cpu") -> tuple[T, int]:
    """Return the result of `call`, which computes on `device`, and by how many bytes it raises the peak memory.

    The memory is that of tensors on a GPU, and that of this process on the CPU.

    Raises:
        FoldoptError: The device is the CPU and the system is not Linux.
    """
    if device != "cpu":
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        _synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        raise FoldoptError("peak memory is read from /proc/self, which only Linux has; measure on Linux.")
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    result = call()
    return result, max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
