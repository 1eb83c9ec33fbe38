"""Answers of `QPLayer` on small random programs with integer data, compared with exact truth.

The gradient of g'x is computed in four ways: with respect to p only, or to the right-hand sides as well (to all
arguments if the solution is unique); and for one program at a time, where errors are raised, or in batches of equal
shapes with policies, where failing programs share batches with others.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

import foldopt
from experiments.benchmark.exact import Number, Vector, dot, times
from experiments.benchmark.integer_draws import cotangents, draw, draw_infeasible, draw_nonconvex, draw_unbounded
from experiments.benchmark.integer_programs import Bound, Program
from experiments.benchmark.integer_truth import Derivative, Truth, derivative_of, judged, pieces, truth_of
from experiments.benchmark.refusals import REASONS, reason
from foldopt.errors import FoldoptError

Asked = Literal["p", "right-hand sides"]
F64 = torch.float64
TOLERANCE = 1e-6  # of solutions and gradients, relative to max(1, largest entry)
LARGEST_BATCH = 64
RIGHT, WRONG, WRONG_X = "right gradient", "wrong gradient", "wrong solution"
OTHER, RAW = "another refusal", "raw exception"
COLUMNS = (RIGHT, WRONG, WRONG_X, *REASONS.values(), OTHER, RAW)


@dataclass(frozen=True)
class Sample:
    """A program, the truth about it, vectors g, and the truth about the derivatives of each g'x."""

    seed: int
    program: Program
    truth: Truth
    g: list[tuple[int, ...]]
    derivatives: list[Derivative]


@dataclass(frozen=True)
class Answer:
    """The layer's answer for one g'x.

    Attributes:
        sample: The sample.
        which: Index of g in `sample.g`.
        asked: The arguments of the gradient.
        said: One of COLUMNS.
        error: Error of the gradient, if there is one.
        detail: The error message, if there is one.
    """

    sample: Sample
    which: int
    asked: Asked
    said: str
    error: float = 0.0
    detail: str = ""

    @property
    def true(self) -> str:
        """The true answer, one of ROWS."""
        truth = self.sample.truth
        if truth.status != "solved":
            return truth.status
        derivative = self.sample.derivatives[self.which]
        verdict = derivative.verdict if self.asked == "p" else derivative.verdict_rows
        if verdict == "not unique":
            return verdict
        if verdict == "dependent rows":
            exists = derivative.multipliers is not None and not truth.dependent_equalities
            return f"{verdict}, {'a gradient exists' if exists else 'no gradient'}"
        return verdict if truth.unique else f"{verdict}, x not unique"

    @property
    def as_true(self) -> bool:
        """Whether the answer is right; at kinks close to programs with several solutions "not unique" is right, too."""
        if self.true.startswith("differentiable"):
            return self.said == RIGHT
        if self.true.startswith("dependent rows"):
            return self.said in (RIGHT, "dependent rows")
        isolated = self.true.startswith("kink") and self.sample.derivatives[self.which].isolated
        return self.true.startswith(self.said) or (isolated and self.said == "not unique")

    def __str__(self) -> str:
        sample = self.sample
        return (
            f"seed {sample.seed}, {sample.truth.status}, g = {sample.g[self.which]}, asked for {self.asked}: true is "
            f"{self.true}, the layer says {self.said} {f'(error {self.error:.1e}) ' if self.error else ''}{self.detail}"
        )


ROWS = (
    "differentiable",
    "differentiable, x not unique",
    "kink",
    "kink, x not unique",
    "not unique",
    "dependent rows, a gradient exists",
    "dependent rows, no gradient",
    "infeasible",
    "unbounded",
    "nonconvex",
)


@dataclass
class Sweep:
    """The results of a sweep.

    Attributes:
        samples: All samples.
        examined: Number of samples whose truth is checked by differences.
        answers: The answers, by way of calling and arguments.
        one_sided: Counts of the results of the policy "one_sided" at kinks.
        judged: Counts of the checks of the truth.
    """

    samples: list[Sample]
    examined: int = 0
    answers: dict[tuple[str, Asked], list[Answer]] = field(default_factory=dict)
    one_sided: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)


def sample(seed: int, kind: Callable[[int], Program] = draw) -> Sample:
    """Draw one program and determine the truth about it."""
    program = kind(seed)
    truth = truth_of(program)
    g = cotangents(program, seed)
    return Sample(seed, program, truth, g, [derivative_of(truth, h) for h in g] if truth.status == "solved" else [])


def samples(first: int, solvable: int, failing: int) -> list[Sample]:
    """Draw `solvable` programs with a solution and `failing` ones of each other kind, with seeds from `first` on."""
    found = [sample(seed) for seed in range(first, first + solvable)]
    for kind in (draw_infeasible, draw_unbounded, draw_nonconvex):
        found += [sample(seed, kind) for seed in range(first, first + failing)]
    return found


def arguments(programs: Sequence[Program]) -> dict[str, Tensor]:
    """Return programs of equal shapes as the layer's batched arguments; missing bounds become inf."""

    def bounds(values: Iterable[Sequence[Bound] | None], none: float) -> Tensor:
        rows = [[none if value is None else float(value) for value in row or ()] for row in values]
        return torch.tensor(rows, dtype=F64)

    n, m, k, lower, upper = programs[0].shape
    given = {
        "Q": torch.tensor([program.Q for program in programs], dtype=F64),
        "p": torch.tensor([program.p for program in programs], dtype=F64),
        "G": torch.tensor([program.G for program in programs], dtype=F64).reshape(len(programs), m, n),
        "h": bounds((program.h for program in programs), torch.inf).reshape(len(programs), m),
        "A": torch.tensor([program.A for program in programs], dtype=F64).reshape(len(programs), k, n),
        "b": torch.tensor([program.b for program in programs], dtype=F64).reshape(len(programs), k),
    }
    if lower:
        given["lower"] = bounds((program.lower for program in programs), -torch.inf)
    if upper:
        given["upper"] = bounds((program.upper for program in programs), torch.inf)
    return given


def differentiated(given: dict[str, Tensor], asked: Asked, unique: bool) -> dict[str, Tensor]:
    """Return the arguments whose gradients are computed, with requires_grad set."""
    names = ["p"]
    if asked != "p":
        names = list(given) if unique else [name for name in given if name not in ("Q", "G", "A")]
    return {name: given[name].requires_grad_() for name in names}


def expected(sample: Sample, which: int, names: Iterable[str]) -> dict[str, list[list[Number]]]:
    """Return the true gradients of g'x with respect to the named arguments, vectors as matrices with one row.

    The gradient of Q is symmetric. Those of Q, G and A are right only if x and the multipliers are unique.
    """
    truth, derivative = sample.truth, sample.derivatives[which]
    program, n = truth.program, truth.program.n
    u, x, y = derivative.gradient, truth.point.x, truth.point.y
    assert u is not None
    given: dict[str, list[list[Number]]] = {"p": [u]}
    w = derivative.multipliers
    if w is not None:
        given |= {"h": [[0] * len(program.h)], "b": [[0] * len(program.b)], "lower": [[0] * n], "upper": [[0] * n]}
        given |= {"G": [[0] * n for _ in program.G], "A": [[0] * n for _ in program.A]}
        given["Q"] = [[Fraction(u[i] * x[j] + u[j] * x[i], 2) for j in range(n)] for i in range(n)]
        for row, weight, multiplier in zip(truth.rows, w, y, strict=True):
            target = {"G": "h", "A": "b"}.get(row.kind, row.kind)
            given[target][0][row.index] = -weight if row.kind == "lower" else weight
            if row.kind in ("G", "A"):
                given[row.kind][row.index] = [multiplier * a - weight * b for a, b in zip(u, x, strict=True)]
    return {name: given[name] for name in names if name in given}


def error_of(sample: Sample, which: int, gradients: dict[str, Tensor]) -> float:
    """Return the largest error of the gradients, relative to max(1, largest entry); inf if one does not exist."""
    truth, derivative = sample.truth, sample.derivatives[which]
    if derivative.gradient is None:
        return float("inf")
    if len(gradients) > 1 and (derivative.multipliers is None or truth.dependent_equalities):
        return float("inf")
    worst = 0.0
    for name, rows in expected(sample, which, gradients).items():
        if name in ("Q", "G", "A") and not (truth.unique and truth.unique_multipliers):
            continue
        true = torch.tensor([[float(value) for value in row] for row in rows], dtype=F64)
        answer = gradients[name].reshape(true.shape)
        answer = (answer + answer.mT) / 2 if name == "Q" else answer
        difference = answer - true
        if name == "p" and truth.lines:
            along = torch.linalg.qr(torch.tensor(truth.lines, dtype=F64).mT).Q
            difference = difference - difference @ along @ along.mT
        if difference.numel():
            size = max(1.0, float(true.abs().max()))
            found = float(difference.abs().max()) / size
            worst = max(worst, math.inf if math.isnan(found) else found)
    return worst


def is_solution(truth: Truth, x: Tensor) -> bool:
    """Return whether x is a solution up to rounding: it satisfies the rows and has the right Qx and p'x."""
    program = truth.program
    exact: list[float] = x.tolist()
    if any(map(math.isnan, exact)):
        return False
    size = max(1.0, *map(abs, exact))

    def apart(row: Vector, value: Number) -> float:
        scale = max(1.0, *(abs(float(entry)) for entry in row)) * size
        return (sum((float(a) * b for a, b in zip(row, exact, strict=True)), 0.0) - float(value)) / scale

    levels = zip((*program.Q, program.p), times((*program.Q, program.p), truth.point.x), strict=True)
    if any(abs(apart(row, value)) > TOLERANCE for row, value in levels):
        return False
    return all(
        apart(row.a, row.c) < TOLERANCE and (not row.equality or apart(row.a, row.c) > -TOLERANCE) for row in truth.rows
    )


def refusal(error: Exception) -> str:
    """Return the verdict that an exception stands for."""
    return (reason(error) or OTHER) if isinstance(error, FoldoptError) else RAW


def alone(sample: Sample, asked: Asked) -> Iterator[Answer]:
    """Yield the answers for a single program, with errors raised."""
    given = arguments([sample.program])
    leaves = differentiated(given, asked, sample.truth.unique)
    x: Tensor | None = None
    for which, g in enumerate(sample.g):
        try:
            x = foldopt.QPLayer()(**given) if x is None else x
            gradients = _gradients(x, torch.tensor([g], dtype=F64), leaves)
        except Exception as error:
            yield Answer(sample, which, asked, refusal(error), detail=f"{type(error).__name__}: {error}"[:200])
            continue
        yield _answered(sample, which, asked, x[0], gradients)


def together(group: Sequence[Sample], asked: Asked) -> Iterator[Answer]:
    """Yield the answers for programs of equal shapes in one batch, with policies that raise no errors."""
    given = arguments([sample.program for sample in group])
    leaves = differentiated(given, asked, all(sample.truth.unique for sample in group))
    layer = foldopt.QPLayer(degenerate="least_norm", on_failure="nan")
    x: Tensor | None = None
    for which in range(2):
        try:
            x = layer(**given) if x is None else x
            gradients = _gradients(x, torch.tensor([sample.g[which] for sample in group], dtype=F64), leaves)
        except Exception as error:
            for sample in group:
                yield Answer(sample, which, asked, refusal(error), detail=f"{type(error).__name__}: {error}"[:200])
            continue
        last = layer.last
        assert last is not None, "the layer has just run"
        verdicts = last.verdict
        assert verdicts is not None, "it has also run backward"
        for i, (sample, status, verdict) in enumerate(zip(group, last.status, verdicts, strict=True)):
            if status != "solved":
                said = status if bool(x[i].isnan().all()) else WRONG_X
                yield Answer(sample, which, asked, said)
            elif verdict != "differentiable":
                yield Answer(sample, which, asked, verdict)
            else:
                yield _answered(sample, which, asked, x[i], {name: value[i] for name, value in gradients.items()})


def _gradients(x: Tensor, g: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of g'x by name, zero for unused arguments."""
    found = torch.autograd.grad((x * g).sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _answered(sample: Sample, which: int, asked: Asked, x: Tensor, gradients: dict[str, Tensor]) -> Answer:
    """Compare a solution and gradients that the layer certifies with the true ones."""
    if sample.truth.status != "solved" or not is_solution(sample.truth, x.detach()):
        return Answer(sample, which, asked, WRONG_X)
    error = error_of(sample, which, gradients)
    return Answer(sample, which, asked, RIGHT if error <= TOLERANCE else WRONG, error)


def one_sided(sample: Sample, which: int) -> str:
    """Return, as text, whether the policy "one_sided" gives the gradient of a smooth piece at a kink."""
    given = arguments([sample.program])
    p = given["p"].requires_grad_()
    g = torch.tensor(sample.g[which], dtype=F64)
    try:
        (gradient,) = torch.autograd.grad(foldopt.QPLayer(degenerate="one_sided")(**given) @ g, p)
    except Exception as error:
        return f"{type(error).__name__}"
    for piece in pieces(sample.truth, sample.g[which]):
        true = torch.tensor([float(value) for value in piece], dtype=F64)
        if (gradient[0] - true).abs().max() <= TOLERANCE * max(1.0, float(true.abs().max())):
            return "the gradient of a smooth piece"
    return "another vector"


def grouped(found: Iterable[Sample]) -> list[list[Sample]]:
    """Return the samples in batches of equal shapes.

    Samples with a unique solution have batches of their own, as only they have gradients of Q, G and A.
    """
    groups: dict[tuple[object, ...], list[Sample]] = defaultdict(list)
    for sample in found:
        groups[(*sample.program.shape, sample.truth.unique)].append(sample)
    return [group[i : i + LARGEST_BATCH] for group in groups.values() for i in range(0, len(group), LARGEST_BATCH)]


def checked(sample: Sample) -> Iterator[str]:
    """Compare the truth about a sample with exact one-sided differences of nearby programs."""
    truth = sample.truth
    for which, derivative in enumerate(sample.derivatives):
        verdict, table = judged(truth, sample.g[which], sample.seed)
        agrees = verdict == derivative.verdict
        if verdict == "differentiable" and derivative.gradient is not None:
            agrees &= all(dot(derivative.gradient, row[:-1]) == row[-1] for row in table)
        yield "agrees" if agrees else f"disagrees: seed {sample.seed}, g = {sample.g[which]}"
        if derivative.gradient is not None:
            verdict, table = judged(truth, sample.g[which], sample.seed, rows=True)
            agrees = (verdict == "differentiable") == (derivative.multipliers is not None)
            if verdict == "differentiable" and derivative.multipliers is not None:
                full = [*derivative.gradient, *derivative.multipliers]
                agrees &= all(dot(full, row[:-1]) == row[-1] for row in table)
            yield "agrees" if agrees else f"disagrees: seed {sample.seed}, g = {sample.g[which]}, right-hand sides"


def sweep(first: int, solvable: int, failing: int, differences: int) -> Sweep:
    """Run the layer on all programs, and check the truth about the first `differences` by one-sided differences."""
    result = Sweep(samples(first, solvable, failing), min(differences, solvable))
    for one in result.samples[: result.examined]:
        result.judged.update(checked(one))
    groups = grouped(result.samples)
    asked: Asked
    for asked in ("p", "right-hand sides"):
        result.answers["alone", asked] = [answer for one in result.samples for answer in alone(one, asked)]
        result.answers["batches", asked] = [answer for group in groups for answer in together(group, asked)]
    for one in result.samples:
        for which, derivative in enumerate(one.derivatives):
            if derivative.verdict == "kink" and one.truth.unique and not derivative.isolated:
                result.one_sided[one_sided(one, which)] += 1
    return result


def confusion(answers: Iterable[Answer]) -> list[list[str]]:
    """Return the header and the rows of the table of true verdicts against the layer's answers."""
    counted: dict[str, Counter[str]] = {row: Counter() for row in ROWS}
    for answer in answers:
        counted[answer.true][answer.said] += 1
    seen = [column for column in COLUMNS if any(counter[column] for counter in counted.values())]
    table = [["true", "number", *seen]]
    for row, counter in counted.items():
        if counter:
            table.append([row, str(counter.total()), *(str(counter[column] or "") for column in seen)])
    return table


def false_refusals(answers: Iterable[Answer]) -> list[Answer]:
    """Return the answers that refuse a derivative that exists and is unique."""
    return [
        answer for answer in answers if answer.true.startswith("differentiable") and answer.said not in (RIGHT, WRONG)
    ]
