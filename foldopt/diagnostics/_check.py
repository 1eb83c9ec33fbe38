"""Is this layer right? `check` and its `Report`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo
from foldopt._layer import TOLERANCE, FixedPointLayer
from foldopt.diagnostics._convergence import spectral_radius
from foldopt.diagnostics._examined import examined, folded_in, lenient, random_like
from foldopt.errors import InputError
from foldopt.linear_solve import SOLVERS, LinearSolveInfo
from foldopt.step import StepVJP, as_tuple, flatten

__all__ = ["GradientCheck", "Report", "check"]


class GradientCheck(NamedTuple):
    """The folded derivative along a random direction of one parameter, beside central differences of the solver.

    Attributes:
        name: position of the argument, or name of the weight.
        folded: the folded derivative.
        differences: the central differences.
        error: |folded - differences|, relative to the larger of the two.
        uncertainty: change of the differences if their step is halved, in the same units.

    Examples:
        >>> layer = foldopt.fold(torch.sqrt, lambda x, c: 0.5 * (x + c / x))
        >>> report = foldopt.check(layer, torch.tensor([[4.0]], dtype=torch.float64))
        >>> report.gradients[0].name, report.gradients[0].error < 1e-6
        ('0', True)
    """

    name: str
    folded: float
    differences: float
    error: float
    uncertainty: float


@dataclass
class Report:
    """The result of `check`: ``print(report)`` shows it to people, ``report.ok`` serves tests.

    Attributes:
        residual: (B,), relative residual of the step at the solution.
        tolerance: the layer's tolerance for it.
        spectral_radius: (B,), spectral radius of Phi.
        gradients: one `GradientCheck` per parameter and weight.
        solvers: report of each linear solver on a random cotangent, by its name.
        degenerate: (K, 2) int, pairs (sample, coordinate) of the flattened output whose one-sided derivatives differ.
        problems: problems that were found, in words with their remedy; empty if there are none.

    Examples:
        >>> layer = foldopt.fold(torch.sqrt, lambda x, c: 0.5 * (x + c.detach() / x))  # detach: a mistake
        >>> report = foldopt.check(layer, torch.tensor([[4.0]], dtype=torch.float64))
        >>> report.ok
        False
        >>> report.problems[0]
        'the folded derivative differs from finite differences for parameter 0. ...
    """

    residual: Tensor
    tolerance: float
    spectral_radius: Tensor
    gradients: list[GradientCheck]
    solvers: dict[str, LinearSolveInfo]
    degenerate: Tensor
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def __str__(self) -> str:
        largest = float(self.spectral_radius.max()) if len(self.spectral_radius) else 0.0
        lines = [
            f"fixed point      worst residual {float(self.residual.max()):.1e} (tolerance {self.tolerance:.0e})",
            f"spectral radius  rho(Phi) up to {largest:.3g}: LFPI {'converges' if largest < 1 else 'diverges'}",
            "gradient         parameter    folded   differences   rel. error",
        ]
        lines += [f"{'':<17}{c.name:<10}{c.folded:>9.3g}{c.differences:>14.3g}{c.error:>13.1e}" for c in self.gradients]
        lines.append("linear solvers   name          solved   products   worst residual")
        lines += [
            f"{'':<17}{name:<14}{float(i.ok.double().mean()):>6.0%}{int(i.iterations.max()):>11}"
            f"{float(i.residual.max()):>17.1e}"
            for name, i in self.solvers.items()
        ]
        lines.append(f"degenerate       {len(self.degenerate)} coordinates with two one-sided derivatives")
        found = [textwrap.fill(f"PROBLEM          {p}", 110, subsequent_indent=" " * 17) for p in self.problems]
        return "\n".join([*lines, *(found or ["no problem found"])])


def check(layer: nn.Module, *params: Any, seed: int = 0, eps: float | None = None) -> Report:
    """Examine a folded layer at given parameters: does the step fix the solution, and is the gradient right?

    The report has the residual of the step, the folded derivative beside finite differences of the *solver* for every
    parameter and weight, the spectral radius of Phi, the linear solvers that solve the backward equation, and the
    coordinates where the solution has a kink. Per parameter it takes four solves. Failures that the layer's policies
    would raise are reported instead: a sample without a solution or without a derivative by its cause, and before other
    problems that follow from it.

    Args:
        layer: a `FixedPointLayer`, or a module with one as ``layer.fold`` or ``layer.folded(*params)``, such as
            `QPLayer`, `NLPLayer` and `CvxpyLayer`.
        *params: the layer's arguments; a small batch is enough. Float64 makes the differences sharp. None, SciPy
            matrices, and sparse tensors that require no gradient are constants.
        seed: seed of the random directions and of the cotangent; default 0.
        eps: step of the differences, relative to the size of the parameter; None, the default: 1e-5 in float64,
            otherwise 1e-2.

    Returns:
        The report.

    Raises:
        InputError: the module has no folded layer, or a sparse tensor requires a gradient.

    Examples:
        >>> layer = foldopt.fold(torch.sqrt, lambda x, c: 0.5 * (x + c / x))
        >>> print(foldopt.check(layer, torch.tensor([[4.0]], dtype=torch.float64)))
        fixed point      worst residual 0.0e+00 (tolerance 1e-06)
        ...
        no problem found
    """
    for i, p in enumerate(params):
        if isinstance(p, Tensor) and p.layout != torch.strided and p.requires_grad:
            raise InputError(
                f"parameter {i} is a sparse tensor of shape {tuple(p.shape)} that requires a gradient, but finite "
                "differences need a dense one. Pass it without requires_grad, or check a module that builds it from a "
                "dense tensor of its values."
            )
    core = folded_in(layer, params)
    generator = torch.Generator().manual_seed(seed)
    with lenient(core):
        at = examined(layer, core, params)
        cotangent = random_like(flatten(at.solution), generator)
        solvers = {}
        for name, make in SOLVERS.items():
            with suppress(InputError):  # methods that would need too much memory are left out
                solvers[name] = make()(StepVJP(at.recorded), cotangent)[1]
        gradients, kinks, info = _differences(layer, core, params, generator, eps)
    tolerance = core.tol or TOLERANCE[at.solution[0].dtype]
    rho = spectral_radius(at.recorded)
    report = Report(at.residual, tolerance, rho, gradients, solvers, kinks.nonzero(), [])
    report.problems += _problems(report, float(at.residual.nan_to_num(nan=torch.inf).max()), info)
    return report


def _problems(report: Report, worst: float, info: FoldInfo) -> list[str]:
    """Return the problems of a report in words; a sample without a solution hides all others."""
    causes = sorted(set(info.causes or ()) - {"solved"})
    if causes:  # other problems follow from this one
        where = [f"{cause} at {[i for i, c in enumerate(info.causes or ()) if c == cause][:10]}" for cause in causes]
        return [f"samples without a solution: {'; '.join(where)}. Mend these programs before looking at gradients."]
    problems = [f"{cause}." for cause in (info.derivative.causes() if info.derivative is not None else [])]
    if not worst <= report.tolerance:
        problems.append(
            f"the step does not fix the solution: ||U(x*, c) - x*|| / (1 + ||x*||) = {worst:.1e}. Solver and "
            "step disagree (another problem, a sign, a missing dual) or the solver stopped early; tighten the solver, "
            "or mend the step."
        )
    wrong = [c.name for c in report.gradients if not c.error <= max(1e-4, 10 * c.uncertainty)]
    if wrong and worst <= report.tolerance and not problems:
        why = (
            "The solution has kinks nearby (degenerate coordinates), where differences mix two derivatives."
            if len(report.degenerate)
            else "The step fixes the solution but depends on the parameters otherwise than the solver does: look for "
            "a detach, a parameter that the step ignores, or one that the solver ignores."
        )
        problems.append(
            f"the folded derivative differs from finite differences for parameter {', '.join(wrong)}. {why}"
        )
    if not report.solvers["auto"].ok.all():
        bad = (~report.solvers["auto"].ok).nonzero()[:, 0].tolist()
        problems.append(
            f"I - Phi is singular at samples {bad[:10]}: the solution is not locally unique there, or the step has "
            "more fixed points than the problem has solutions; choose linear_solver='least_squares' or "
            "on_failure='zero'."
        )
    return problems


def _differences(
    layer: nn.Module,
    core: FixedPointLayer,
    params: Sequence[Any],
    generator: torch.Generator,
    eps: float | None,
) -> tuple[list[GradientCheck], Tensor, FoldInfo]:
    """Compare the derivative with differences along one random direction per parameter.

    Returns one check per parameter, where the output has a kink (B, N), and the certificates of the call.
    """
    leaves = [
        p.detach().clone().requires_grad_(p.is_floating_point())
        if isinstance(p, Tensor) and p.layout == torch.strided
        else p
        for p in params
    ]
    named = {str(i): p for i, p in enumerate(leaves) if isinstance(p, Tensor) and p.requires_grad}
    named |= core.inside.weights()
    output = as_tuple(layer(*leaves))
    info = cast(FoldInfo, core.last)
    weight = [random_like(part.detach(), generator) for part in output]
    wanted = list(named.values())
    gradients = torch.autograd.grad(
        torch.stack([(part * w).sum() for part, w in zip(output, weight, strict=True)]).sum(), wanted, allow_unused=True
    )
    base, w = flatten([part.detach() for part in output]), flatten(weight)
    kinks = torch.zeros_like(base, dtype=torch.bool)
    rows = []
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        direction = random_like(p.detach(), generator)
        size = float(p.detach().abs().max()) if p.numel() else 0.0
        h = (eps or (1e-5 if p.dtype == torch.float64 else 1e-2)) * (1 + size)
        ends = {t: _moved(layer, leaves, p, t * h * direction) for t in (-1.0, -0.5, 0.5, 1.0)}
        right, left = ends[1.0] - base, base - ends[-1.0]
        kinks |= (right - left).abs() > 0.05 * torch.maximum(right.abs(), left.abs()) + 1e-3 * right.abs().max()
        wide, narrow = (float(((ends[t] - ends[-t]) * w).sum() / (2 * t * h)) for t in (1.0, 0.5))
        rows.append(
            (name, 0.0 if gradient is None else float((gradient * direction).sum()), narrow, abs(wide - narrow))
        )
    floor = 1e-6 * max((abs(row[2]) for row in rows if math.isfinite(row[2])), default=0.0) + 1e-12
    checks = []
    for name, folded, narrow, spread in rows:
        scale = max(floor, abs(folded), abs(narrow))
        checks.append(GradientCheck(name, folded, narrow, abs(folded - narrow) / scale, spread / scale))
    return checks, kinks, info


def _moved(layer: nn.Module, leaves: Sequence[Any], p: Tensor, change: Tensor) -> Tensor:
    """Return the layer's flattened output while `p`, a parameter or weight, is moved by `change`."""
    before = p.detach().clone()
    try:
        with torch.no_grad():
            p.add_(change)
            return flatten(as_tuple(layer(*leaves)))
    finally:
        with torch.no_grad():
            p.copy_(before)
