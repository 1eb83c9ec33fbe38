"""Times, memory and errors of the contenders of a layer, which take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from experiments.benchmark.layers import LAYERS, OURS, REFERENCE, Layer, Leaves, Place, Solve
from experiments.report.measurements import LAST_BITS, peak_memory, seconds
from experiments.run import configuration
from experiments.run.components import make
from foldopt.errors import FoldoptError

COLUMNS = (
    *("variant", "n", "batch", "contender", "samples", "seconds_forward", "seconds_backward", "peak_bytes"),
    *("error_x", "error_vjp", "why"),
)
Call = Callable[[], dict[str, float]]  # makes a forward and a backward pass and returns its measurements
MeasuredRow = dict[str, Any]  # some of `COLUMNS`: the contender, and numbers or the reason why there are none
FLOOR, NETWORK = "lu", "network"  # measured besides the contenders: a linear solve, a step of the study's network


@dataclass(frozen=True)
class Settings:
    """Size of the measurement.

    Attributes:
        layer: Name of the layer.
        threads: Number of threads.
        device: "cpu", or "cuda", on which only the first variant is measured.
        factors: Multiples of the batch size and of n.
        many: A very large batch size for the layer's fast contenders; 0 for none.
        rounds: Number of rounds of each contender at each place.
        budget: A contender has no further rounds once its rounds at a place have taken more seconds than this.
        turn: A round repeats the pass until it has taken this many seconds, and counts the median.
        limit: Seconds of a pass. A contender that is expected to take more is not measured. If its first call takes
            more, this call is the only one that counts (on a GPU the second call, as the first one loads kernels).
            Otherwise first calls do not count.
        seed: Seed of the data.
    """

    layer: str
    threads: int
    device: str = "cpu"
    factors: tuple[int, ...] = (1, 4, 16)
    many: int = 4096
    rounds: int = 7
    budget: float = 1.0
    turn: float = 0.05
    limit: float = 4.0
    seed: int = 0


def measure(settings: Settings) -> pd.DataFrame:
    """Measure all contenders of a layer at all places.

    Returns:
        One row per place, contender and round with the columns variant; n; batch; contender; samples, the number that
        it got; seconds_forward and seconds_backward, per batch; peak_bytes, NaN for a single call; error_x and
        error_vjp, relative to `REFERENCE` on the CPU (to `OURS` where that is too slow), inf if samples have no answer;
        why, the reason why there are no numbers.
    """
    if torch.get_num_threads() != settings.threads:  # setting it makes LU unsafe for peers, see foldopt.batched
        torch.set_num_threads(settings.threads)
    layer = LAYERS[settings.layer]
    expected: dict[str, float] = {}
    rows = []
    first = layer.places((1,))[0]
    for place in layer.places(settings.factors, settings.many):
        if settings.device != "cpu" and place.variant != first.variant:
            continue
        found = list(_at(layer, place, expected, settings))
        rows += [{"variant": place.variant, "n": place.n, "batch": place.batch, **row} for row in found]
        if place == first:
            for row in found:
                if "seconds_forward" in row:
                    expected[row["contender"]] = row["seconds_forward"] + row["seconds_backward"]
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def _at(layer: Layer, place: Place, expected: Mapping[str, float], settings: Settings) -> Iterator[MeasuredRow]:
    growth = (place.n / layer.n) ** 2 * place.batch / layer.batch  # time grows at least as n^2, often as n^3
    if settings.device != "cpu":  # small problems take as long as large ones there
        growth = 1.0
    asked = {}
    for name, contender in layer.contenders.items():
        if place.batch == settings.many and name not in layer.fast:
            continue
        missing = [package for package in contender.needs if not contender.installed()]
        if missing:
            yield {"contender": name, "why": f"{', '.join(missing)} is not installed"}
        elif settings.device != "cpu" and not contender.gpu:
            yield {"contender": name, "why": "computes on the CPU"}
        elif growth * expected.get(name, 0.0) > settings.limit:
            yield {"contender": name, "why": f"would take more than {settings.limit:g} s"}
        else:
            asked[name] = contender
    if OURS not in asked:
        return
    leaves, solves = layer.problem(place, list(asked), settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    reference = solves[REFERENCE if REFERENCE in asked else OURS]
    x = reference(leaves)
    cotangent = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    device = torch.device(settings.device)
    calls: dict[str, Call] = {}
    exact: dict[int, tuple[Tensor, Tensor]] = {}
    for name, contender in asked.items():
        samples = min(contender.most or place.batch, place.batch)
        given = tuple(t[:samples] if len(t) == place.batch else t for t in leaves)
        if samples not in exact:
            right, vjp, _, _ = _pass(reference, given, cotangent[:samples])
            exact[samples] = right.to(device), vjp.to(device)
        there = tuple(t.to(device) for t in given), cotangent[:samples].to(device)
        calls[name] = partial(_measured, solves[name], *there, exact[samples], count(1))
    calls[FLOOR] = _linear_solve(place.batch, layer.system(place.n), device)
    if layer.key not in (None, "n"):  # synthetic studies, whose size can be chosen
        calls[NETWORK] = _network_step(layer, place, device)
    yield from _taking_turns(calls, settings)


def _taking_turns(calls: Mapping[str, Call], settings: Settings) -> Iterator[MeasuredRow]:
    """Yield the rows of all calls: after a first call of each, they take turns in an order that rotates by round."""
    memory, spent = {}, {}
    for name, call in calls.items():
        try:
            if settings.device != "cpu":
                call()  # loads kernels
            begin = time.perf_counter()
            row = call()
            if time.perf_counter() - begin > settings.limit:
                yield {"contender": name, **row}
                continue
            memory[name], spent[name] = peak_memory(call, settings.device)[1], 0.0
        except FoldoptError as error:
            yield {"contender": name, "why": str(error).split("\n")[0][:200]}
    names = list(spent)
    for number in range(settings.rounds):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if spent[name] > settings.budget:
                continue
            row, taken = _round(calls[name], settings.turn)
            spent[name] += taken
            yield {"contender": name, **row, "peak_bytes": memory[name]}


def _round(call: Call, turn: float) -> tuple[dict[str, float], float]:
    """Return the medians of as many calls as fit into `turn` seconds, at least one, and the seconds of all."""
    begin = time.perf_counter()
    rows = [call()]
    while time.perf_counter() - begin < turn:
        rows.append(call())
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}, time.perf_counter() - begin


def _pass(solve: Solve, leaves: Leaves, cotangent: Tensor) -> tuple[Tensor, Tensor, float, float]:
    fresh = tuple(t.detach().requires_grad_() for t in leaves)
    x, forward = seconds(lambda: solve(fresh))
    if not x.requires_grad:
        return x, torch.zeros(0), forward, 0.0
    gradients, backward = seconds(lambda: torch.autograd.grad(x, fresh, cotangent, allow_unused=True))
    parts = zip(gradients, fresh, strict=True)
    vjp = torch.cat([torch.zeros_like(t).flatten() if g is None else g.flatten() for g, t in parts])
    return x.detach(), vjp, forward, backward


def _measured(
    solve: Solve, leaves: Leaves, cotangent: Tensor, exact: tuple[Tensor, Tensor], turn: Iterator[int]
) -> dict[str, float]:
    """Make one pass with slightly changed parameters: they are new in every pass, as in training."""
    changed = 1 + next(turn) * LAST_BITS
    x, vjp, forward, backward = _pass(solve, tuple(t * changed for t in leaves), cotangent)
    return {
        "samples": len(cotangent),
        "seconds_forward": forward,
        "seconds_backward": backward,
        "error_x": _error(x, exact[0]),
        "error_vjp": _error(vjp, exact[1]),
    }


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error, inf if it is NaN, and 0 for empty tensors."""
    return float(((found - exact).norm() / exact.norm()).nan_to_num(nan=torch.inf)) if len(exact) else 0.0


def _linear_solve(batch: int, size: int, device: torch.device) -> Call:
    """Return a call that solves a batch of general linear systems, a lower limit for the time of a backward pass."""
    generator = torch.Generator(device).manual_seed(0)
    M = torch.randn(batch, size, size, generator=generator, dtype=torch.float64, device=device)
    M.diagonal(dim1=1, dim2=2).add_(size)
    g = torch.ones(batch, size, 1, dtype=torch.float64, device=device)

    def solve() -> dict[str, float]:
        _, taken = seconds(lambda: torch.linalg.solve(M, g))
        return {"samples": batch, "seconds_forward": 0.0, "seconds_backward": taken, "error_x": 0.0, "error_vjp": 0.0}

    return solve


def _network_step(layer: Layer, place: Place, device: torch.device) -> Call:
    """Return a call that makes a training step of the study's network without the layer, whose gradient is given."""
    parts = layer.built(place, layer.contenders[OURS].overrides)
    cfg = configuration.compose([*layer.overrides])
    optimizer = make(cfg.optimizer, "optimizer", params=parts.model.to(device).parameters(), lr=cfg.train.lr)
    parts.task.to(device)
    samples = parts.task.splits["train"]

    def step() -> dict[str, float]:
        outputs, forward = seconds(lambda: parts.model(samples["inputs"]))

        def back() -> None:
            optimizer.zero_grad(set_to_none=True)
            outputs.backward(torch.ones_like(outputs))
            optimizer.step()

        _, backward = seconds(back)
        given = {"samples": place.batch, "error_x": 0.0, "error_vjp": 0.0}
        return {**given, "seconds_forward": forward, "seconds_backward": backward}

    return step
