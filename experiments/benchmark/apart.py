"""Runs a function on items in turn, in a process of its own, which may crash or hang."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

START = 60.0  # seconds that a process gets for its imports
MEMORY = 12 * 2**30  # bytes that a process may allocate; MemoryError beyond


def in_turn(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], limit: float) -> Iterator[tuple[Any, str]]:
    """Yield (function(*item), "") for each item, or (None, reason) where it crashed or took more than `limit` seconds.

    function: of a module, as the process imports it. All items share a process until one of them ends it.
    """
    context = multiprocessing.get_context("spawn")
    process: Any = None
    ours: Any = None
    try:
        for item in items:
            if process is None:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs), daemon=True)
                process.start()
                theirs.close()
            result, reason = _asked(process, ours, item, limit)
            if not process.is_alive():
                process = None
            yield result, reason
    finally:
        if process is not None:
            ours.close()
            process.join()


def _asked(process: Any, pipe: Connection, item: tuple[Any, ...], limit: float) -> tuple[Any, str]:
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


def _serve(function: Callable[..., Any], pipe: Connection) -> None:
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
        except Exception as error:  # reported to the parent, item by item
            answer = None, f"{type(error).__name__}: {error}"
        pipe.send(answer)
