"""Run a function on many items in a separate process, which may crash or hang."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")
START = 60.0  # seconds in which the process must have made its imports
MEMORY = 12 * 2**30  # bytes beyond which an allocation of the process raises MemoryError


def in_turn(
    function: Callable[..., T], items: Sequence[tuple[object, ...]], limit: float
) -> Iterator[tuple[T | None, str]]:
    """Call ``function(*item)`` for each item, one after the other, in a process that the items share.

    A crash, or a call of more than `limit` seconds, ends the process; the next item gets a new one.

    Args:
        function: A function of a module, so that the process can import it.
        items: The arguments of each call.
        limit: Seconds of a call.

    Yields:
        (result, "") for each item, or (None, reason) where there is no result.
    """
    worker: tuple[BaseProcess, Connection] | None = None
    try:
        for item in items:
            if worker is None:
                worker = _started(function)
            answer: tuple[T | None, str] = _asked(*worker, item, limit)
            if not worker[0].is_alive():
                worker = None
            yield answer
    finally:
        if worker is not None:
            process, pipe = worker
            pipe.close()
            process.join()


def _started(function: Callable[..., T]) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _asked(process: BaseProcess, pipe: Connection, item: tuple[object, ...], limit: float) -> tuple[T | None, str]:
    try:
        if pipe.poll(START):
            pipe.recv()
        pipe.send(item)
        if pipe.poll(limit):
            result, reason = pipe.recv()
            return result, reason
    except (EOFError, ConnectionError):
        process.join()
        return None, f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    return None, f"time limit of {limit:g} s"


def _serve(function: Callable[..., object], pipe: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some solvers print from C
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        try:
            pipe.send("ready")
            item = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = function(*item), ""
        except Exception as error:  # reported to the parent process
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send(answer)
