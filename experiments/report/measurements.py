"""Measurements of time and memory: made once, in a process of their own, and kept beside the run folders."""

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
from typing import Any, TypeVar

import pandas as pd
import torch

from experiments.report.artifacts import RESULTS
from experiments.run.folders import write_atomically
from experiments.sweep.pool import thread_environment
from foldopt.errors import FoldoptError

T = TypeVar("T")
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
LAST_BITS = 2.0**-50  # by which a layer's parameters change from pass to pass, relatively: nothing is known of them


def measured_once(
    name: str, settings: Any, measure: Callable[[Any], pd.DataFrame], *also: Any, threads: int = 1
) -> pd.DataFrame:
    """Return ``measure(settings)``, read from results/runs/<name>-<hash> if it was made before.

    settings: a dataclass; its values and `also`, what else the numbers depend on, make the hash. `measure` runs in a
    process of its own, of so many threads.
    """
    key = hashlib.sha256(json.dumps([asdict(settings), *also]).encode()).hexdigest()[:12]
    path = RESULTS / "runs" / f"{name}-{key}" / "measurements.csv"
    if not path.is_file():
        rows = in_own_process(measure, settings, threads=threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, rows.to_csv(index=False))
    return pd.read_csv(path)


def in_own_process(function: Callable[..., T], *arguments: Any, threads: int = 1) -> T:
    """Return ``function(*arguments)``, computed in a new process of so many threads."""
    with thread_environment(threads), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def seconds(call: Callable[[], T]) -> tuple[T, float]:
    """Return what `call` returns and how long it took, until the GPU, if there is one, is done."""
    _synchronize()
    begin = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - begin


def peak_memory(call: Callable[[], T], device: str = "cpu") -> tuple[T, int]:
    """Return what `call`, which computes on `device`, returns and by how many bytes it raises the memory in use.

    That is its highest point: on a GPU of the memory of tensors there, else of this process. Raises FoldoptError for
    the CPU where the system is not Linux.
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
