"""The page of `make bench-cvxpy`: gradient errors and times of CvxpyLayer and cvxpylayers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import foldopt
from experiments.benchmark.apart import in_turn
from experiments.benchmark.cvxpy_differences import directions, slopes, weights
from experiments.benchmark.cvxpy_kinds import KINDS, Kind, kind
from experiments.report.markdown import table
from experiments.report.measurements import peak_memory
from foldopt.errors import DegenerateError, InputError

RIGHT = 1e-7  # largest error of a right derivative along a direction, relative to 1 plus its size
TIMED = ("quadratic program", "portfolio", "logistic", "nearest semidefinite")
BATCHES = (1, 32, 128)
ROUNDS = 5
LARGE = 1_000  # rows and columns of the parameter in the problem whose construction is measured
LIMIT = 120.0  # seconds for a construction
Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Contender:
    """A library at one setting; make: (problem) -> its layer."""

    title: str
    make: Callable[[Kind], Call]


def _ours(solver: str | None = None) -> Callable[[Kind], Call]:
    return lambda k: foldopt.CvxpyLayer(k.problem, k.parameters, k.variables, solver=solver, gp=k.gp)


def _theirs(solver: str | None = None, **options: Any) -> Callable[[Kind], Call]:
    def make(k: Kind) -> Call:
        from cvxpylayers.torch import CvxpyLayer

        layer = CvxpyLayer(k.problem, k.parameters, k.variables, solver=solver, gp=k.gp)
        return lambda *values: layer(*values, solver_args=options)

    return make


CONTENDERS: dict[str, Contender] = {
    "foldopt": Contender("foldopt", _ours()),
    "own": Contender('foldopt, solver="foldopt"', _ours("foldopt")),
    "scs": Contender("cvxpylayers, SCS", _theirs(solve_method="SCS", n_jobs_forward=1)),
    "clarabel": Contender("cvxpylayers, Clarabel", _theirs(solve_method="Clarabel", n_jobs_forward=1)),
    "moreau": Contender("cvxpylayers, moreau", _theirs("MOREAU")),
}


def installed() -> list[str]:
    """Return the contenders whose solvers are installed."""
    import cvxpy

    return [name for name in CONTENDERS if name != "moreau" or "MOREAU" in cvxpy.installed_solvers()]


def answered(k: Kind, contender: Contender, truth: Iterable[tuple[float, float]]) -> str:
    """Return a contender's largest error along the directions of the parameters, or the error that it raises."""
    values = [torch.tensor(value, requires_grad=True) for value in k.values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outputs = contender.make(k)(*values)
            parts = zip(outputs, weights(k), strict=True)
            total = torch.stack([(x * torch.tensor(w)).sum() for x, w in parts]).sum()
            gradients = torch.autograd.grad(total, values)
        except (DegenerateError, InputError) as error:
            return f"says {type(error).__name__}"
        except Exception as error:  # any exception of another library is an answer for the table
            return f"raises {type(error).__name__}"
    if k.verdict != "differentiable":
        return "answers without an error"
    slope = zip(gradients, directions(k), truth, strict=True)
    worst = max(abs(float((g.numpy() * d).sum()) - true) / (1 + abs(true)) for g, d, (true, _) in slope)
    return f"{worst:.0e}" if worst < RIGHT else f"**{worst:.0e}**"


def compared(names: Sequence[str], contenders: Sequence[str], say: Callable[[str], None]) -> list[list[str]]:
    """Return one row for each kind of problem: its name, the true verdict, and the answer of each contender."""
    rows = []
    for name in names:
        k = kind(name)
        truth = slopes(k) if k.verdict == "differentiable" else []
        answers = [answered(kind(name), CONTENDERS[who], truth) for who in contenders]
        doubt = f" ± {max(error for _, error in truth):.0e}" if truth else ""
        rows.append([name, k.verdict + doubt, *answers])
        say(", ".join(rows[-1]))
    return rows


def batch(k: Kind, size: int, seed: int = 1) -> list[Tensor]:
    """Return a batch of values close to those of a kind that respect the attributes of the parameters."""
    draw, out = np.random.default_rng(seed), []
    for parameter, value in zip(k.parameters, k.values, strict=True):
        noise = 0.05 * np.abs(value).max() * draw.normal(size=(size, *value.shape))
        if parameter.attributes["symmetric"] or parameter.attributes["PSD"]:
            noise = (noise + noise.transpose(0, 2, 1)) / 2
        if parameter.attributes["nonneg"]:
            noise = np.abs(noise)
        out.append(torch.tensor(value + noise, requires_grad=True))
    return out


def seconds(call: Call, values: Sequence[Tensor]) -> tuple[float, float]:
    """Return the seconds of a forward and a backward pass in the fastest of some rounds."""
    best = np.inf, np.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        outputs = call(*values)
        middle = time.perf_counter()
        torch.autograd.grad(torch.stack([(x**2).sum() for x in outputs]).sum(), values)
        both = middle - start, time.perf_counter() - middle
        best = min(best, both, key=sum)
    return best


def timed(contenders: Sequence[str], say: Callable[[str], None]) -> list[list[str]]:
    """Return one row for each kind and batch: milliseconds of each contender, and their ratio to foldopt's."""
    rows = []
    for name in TIMED:
        calls = {who: _made(who, kind(name)) for who in contenders}
        for size in BATCHES:
            found = {who: call and seconds(call, batch(kind(name), size)) for who, call in calls.items()}
            own = sum(found["foldopt"] or ())
            cells = [
                f"{1e3 * taken[0]:.1f} + {1e3 * taken[1]:.1f} ({sum(taken) / own:.1f}×)" if taken else "–"
                for taken in found.values()
            ]
            rows.append([name, str(size), *cells])
            say(", ".join(rows[-1]))
    return rows


def _made(who: str, k: Kind) -> Call | None:
    """Return a contender's layer for a kind of problem, None if it does not support the cones."""
    try:
        return CONTENDERS[who].make(k)
    except InputError:
        return None


def set_up(who: str) -> tuple[float, float]:
    """Return the seconds that a contender takes to construct the layer of a large problem, and its memory in MB.

    The problem is nonnegative least squares with a parameter of `LARGE` by `LARGE` entries. Call this in a separate
    process.
    """
    import cvxpy as cp

    A, b, x = cp.Parameter((LARGE, LARGE)), cp.Parameter(LARGE), cp.Variable(LARGE)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b) + 0.1 * cp.sum_squares(x)), [x >= 0])
    CONTENDERS[who].make(kind("relu"))  # imports modules, which is not measured
    large = Kind(problem, [A, b], [], [x])
    start = time.perf_counter()
    _, grown = peak_memory(lambda: CONTENDERS[who].make(large))
    return time.perf_counter() - start, grown / 1e6


def sizes(contenders: Sequence[str], say: Callable[[str], None]) -> list[list[str]]:
    """Return one row for each contender: seconds and MB of `set_up`, or why there are none."""
    rows = []
    for who in contenders:
        ((found, reason),) = in_turn(set_up, [(who,)], LIMIT)
        cells = [f"{found[0]:.1f}", f"{found[1]:.0f}"] if found else [reason, ""]
        rows.append([CONTENDERS[who].title, *cells])
        say(", ".join(rows[-1]))
    return rows


def report(
    errors: list[list[str]], times: list[list[str]], made: list[list[str]], contenders: Sequence[str], note: str
) -> str:
    """Return the page."""
    titles = [CONTENDERS[who].title for who in contenders]
    return f"""# CvxpyLayer beside cvxpylayers

{note}

## Errors of gradients

{len(KINDS)} kinds of problems. Errors are the largest over one direction for each parameter, relative to 1 plus the
size of the derivative. The truth is from extrapolated differences of accurate solutions by SCS and Clarabel (±: the
change by the last extrapolation). Bold: above {RIGHT:.0e}. At degenerate points no derivative exists for the given
cotangent.

{_lines(["problem", "true", *titles], errors)}

## Milliseconds, forward + backward

The fastest of {ROUNDS} rounds, one thread, float64; in brackets the ratio to foldopt. –: the library does not support
these cones.

{_lines(["problem", "batch", *titles], times)}

## Making a layer of a large problem

Nonnegative least squares with a parameter of {LARGE:,} by {LARGE:,} entries: seconds and growth of the memory during
the constructor. Each library has a separate process with a limit of {LIMIT:.0f} s and 12 GiB.

{_lines(["library", "seconds", "MB"], made)}
"""


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(table(header, rows))
