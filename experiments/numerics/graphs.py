"""CUDA graphs, which launch many small kernels at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 8  # most recordings of a function; each of them holds the memory of its intermediate results


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    result: Tensor


def replayed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Replay `function` as a CUDA graph on a GPU: it is recorded at the second call with the same shapes.

    The function must compute a tensor from tensors and numbers. Its control flow must not depend on values of tensors,
    and it is not differentiated. On a CPU it is called directly.
    """
    recordings: dict[tuple[object, ...], _Recording | None] = {}
    one_at_a_time = Lock()

    @wraps(function)
    @torch.no_grad()
    def call(*given: Tensor | float) -> Tensor:
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return function(*given)
        where = tensors[0].device
        with one_at_a_time, torch.cuda.device(where):
            stream = torch.cuda.current_stream().cuda_stream
            key = where, stream, *((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in given)
            if key not in recordings:
                if len(recordings) == KEPT:
                    del recordings[next(iter(recordings))]
                recordings[key] = None
                return function(*given)
            recording = recordings[key]
            if recording is None:
                recording = recordings[key] = _recorded(function, given)
            for static, value in zip(recording.given, tensors, strict=True):
                static.copy_(value)
            recording.graph.replay()
            return recording.result.clone()

    return call


def _recorded(function: Callable[..., Tensor], given: tuple[Tensor | float, ...]) -> _Recording:
    """Record ``function(*given)``; the previous call with the same shapes was the warm-up."""
    own = [value.clone() if isinstance(value, Tensor) else value for value in given]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*own)
    return _Recording(graph, [value for value in own if isinstance(value, Tensor)], result)
