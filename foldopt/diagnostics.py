"""Is this layer right? Certificates of a folded layer, readable by people: `check`, traces and comparisons."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo
from foldopt._fold import Implicit, fold, unfold, unroll
from foldopt._implicit import fixed_point_vjp
from foldopt._layer import TOLERANCE, FixedPointLayer, LayerCall
from foldopt.checks import require_whole
from foldopt.errors import InputError
from foldopt.linear_solve import LFPI, SOLVERS, Direct, LinearSolveInfo
from foldopt.linear_solve._phi import Phi
from foldopt.step import Recorded, StepFunction, StepVJP, Tensors, as_tuple, flatten, record, unflatten, vjp_of

__all__ = [
    "BackwardTrace",
    "GradientCheck",
    "Report",
    "StepsizeRow",
    "agreement",
    "backward_trace",
    "check",
    "spectral_radius",
    "stepsize_study",
]


def __dir__() -> list[str]:
    return __all__


ASSEMBLED = 400  # columns up to which Phi is assembled where it is multiplied with hundreds of times


class GradientCheck(NamedTuple):
    """One parameter's folded derivative along a random direction, beside central differences of the solver.

    name: the argument's position or the weight's name. error: |folded - differences| relative to the larger.
    uncertainty: how much the differences themselves change when their step is halved, in the same units.
    """

    name: str
    folded: float
    differences: float
    error: float
    uncertainty: float


@dataclass
class Report:
    """What `check` found; ``print(report)`` for people, ``report.ok`` for tests.

    residual, spectral_radius: (B,), of the step at the solution and of Phi. gradients: one per parameter.
    solvers: by name, what each linear solver did for a random cotangent. degenerate: (K, 2), pairs (sample, coordinate)
    of the flattened output whose one-sided derivatives differ. problems: in words, with the remedy; empty if there are
    none.
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
        """Whether nothing was found that makes gradients wrong."""
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


def check(layer: nn.Module, *params: Tensor | None, seed: int = 0, eps: float | None = None) -> Report:
    """Examine a folded layer at the given parameters.

    Args:
        layer: a `FixedPointLayer`, or a module that has one as ``layer.fold`` (`QPLayer`, `NLPLayer`, ...).
        params: as the layer is called, None among them; small batches are enough. Float64 makes the differences sharp.
        seed: of the random directions and the cotangent. eps: step of the differences relative to the parameter's size;
            None: 1e-5 in float64, 1e-2 below.

    Returns a `Report`: whether the step fixes the solution, finite differences of the *solver* against the folded
    derivative for each parameter and weight, rho(Phi) by power iteration, which linear solvers solve the adjoint
    equation, and the coordinates where the solution has a kink. It costs 4 solves for each parameter. Errors of the
    layer's policies are reported, not raised: a sample without a solution, or without a derivative, by its cause and
    before anything that follows from it. InputError is raised for a module that has no folded layer.
    """
    core = _core(layer)
    generator = torch.Generator().manual_seed(seed)
    with _lenient(core):
        at = _examined(layer, core, params)
        cotangent = _random(flatten(at.solution), generator)
        solvers = {}
        for name, make in SOLVERS.items():
            with suppress(InputError):  # of those that would need too much memory
                solvers[name] = make()(StepVJP(at.recorded), cotangent)[1]
        gradients, kinks, info = _differences(layer, core, params, generator, eps)
    tolerance = core.tol or TOLERANCE[at.solution[0].dtype]
    rho = spectral_radius(at.recorded)
    report = Report(at.residual, tolerance, rho, gradients, solvers, kinks.nonzero(), [])
    report.problems += _problems(report, float(at.residual.nan_to_num(nan=torch.inf).max()), info)
    return report


def _problems(report: Report, worst: float, info: FoldInfo) -> list[str]:
    causes = sorted(set(info.causes or ()) - {"solved"})
    if causes:  # all else follows from this
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


def spectral_radius(recorded: Recorded, iterations: int = 400) -> Tensor:
    """Estimate rho(Phi), (B,), by power iteration with Phi^T: the geometric mean growth over the second half.

    The mean makes it right for complex eigenvalues too. recorded: a step recorded at its fixed point (`foldopt.step`).
    """
    vjp = _many_products(recorded)
    v = _random(flatten(recorded.state), torch.Generator().manual_seed(0))
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    growth = v.new_zeros(len(v))
    for k in range(iterations):
        v = vjp(v)
        size = torch.linalg.vector_norm(v, dim=1)
        v = v / torch.where(size > 0, size, 1)[:, None]
        if k >= iterations // 2:
            growth = growth + size.log()
    return (growth / (iterations - iterations // 2)).exp()


def _many_products(recorded: Recorded) -> Callable[[Tensor], Tensor]:
    """Return v -> Phi^T v, for hundreds of them: with Phi as a matrix, unless it has too many columns for that."""
    vjp, state = StepVJP(recorded), flatten(recorded.state).detach()
    if state.shape[1] > ASSEMBLED:
        return vjp
    phi = Phi.assembled(vjp, state).matrix()
    return lambda v: (v[:, None, :] @ phi)[:, 0]


@dataclass
class BackwardTrace:
    """Errors of an unrolled solver, relative to the exact ones, after each of its K steps (the paper's Figure 3).

    forward: (K,), ||x_k - x*|| / ||x*||. backward: (K,), of the gradient of k unrolled steps (Definition 2), k = 1..K.
    Norms are L1, as in the paper, and taken over the whole batch.
    """

    forward: Tensor
    backward: Tensor

    def rate(self) -> float:
        """Return the mean decrease of log(backward) per step over its tail: -log rho(Phi) by Theorem 1."""
        usable = self.backward > 1e-12
        tail = self.backward[usable][int(usable.sum()) // 2 :]
        return float((tail[0] / tail[-1]).log()) / (len(tail) - 1) if len(tail) > 1 else float("nan")


def backward_trace(
    layer: nn.Module,
    *params: Tensor,
    iterations: int,
    start: Tensor | Tensors | None = None,
    cotangent: Tensor | Tensors | None = None,
    seed: int = 0,
) -> BackwardTrace:
    """Unroll 1, 2, ..., `iterations` steps from `start` and compare each with the solution and the exact gradient.

    layer: a folded layer, as for `check`. start: a state to start from; None starts at the solution, which is
    fixed-point unfolding (section 4): the forward error stays where it is while the backward pass converges. From
    elsewhere the work grows as the square of `iterations`.
    cotangent: the gradient of the loss at the state; None draws one at random by `seed`.
    """
    require_whole("iterations", iterations, 1)
    core = _core(layer)
    with _lenient(core):
        solution, recorded, step, tensors, _ = _examined(layer, core, params)
    if cotangent is None:
        g = unflatten(_random(flatten(solution), torch.Generator().manual_seed(seed)), solution)
    else:
        g = tuple(part.detach().to(s) for part, s in zip(as_tuple(cotangent), solution, strict=True))
    exact = _joined(fixed_point_vjp(recorded, g, Direct())[0])
    x = solution if start is None else tuple(p.to(s) for p, s in zip(as_tuple(start), solution, strict=True))
    steps, forward, backward = [], [], []
    total, v = torch.zeros_like(exact), g
    for _ in range(iterations):
        steps.append(record(step, x, tensors))
        x = tuple(part.detach() for part in steps[-1].outputs)
        forward.append(_distance(flatten(x), flatten(solution), norm=1))
        # At the solution all steps are alike, so that one more of them is one more term of the same sum.
        again = [steps[-1]] if start is None else steps[::-1]
        if start is not None:
            total, v = torch.zeros_like(exact), g
        for taken in again:
            total = total + _joined(vjp_of(taken, taken.params, v))
            v = unflatten(StepVJP(taken)(flatten(v)), solution)
        backward.append(_distance(total, exact, norm=1))
    return BackwardTrace(torch.stack(forward), torch.stack(backward))


class StepsizeRow(NamedTuple):
    """What one stepsize does to the backward pass; see `stepsize_study`."""

    stepsize: float
    residual: float
    spectral_radius: float
    lfpi_solved: float
    lfpi_products: int
    gmres_products: int
    anderson_products: int


def stepsize_study(
    make: Callable[[float], nn.Module], stepsizes: Sequence[float], *params: Tensor, seed: int = 0
) -> list[StepsizeRow]:
    """Compare the stepsizes of an update step (the paper's appendix D): the gradient is the same, the work is not.

    make: ``make(stepsize)`` returns a folded layer. Each row holds the worst residual and rho(Phi) of the batch, the
    share of samples that LFPI solved, and the most products with Phi that LFPI, GMRES and Anderson took.
    """
    rows = []
    for stepsize in stepsizes:
        layer = make(stepsize)
        core = _core(layer)
        with _lenient(core):
            at = _examined(layer, core, params)
        g = _random(flatten(at.solution), torch.Generator().manual_seed(seed))
        product = _many_products(at.recorded)
        lfpi, gmres, anderson = (SOLVERS[name]()(product, g)[1] for name in ("lfpi", "gmres", "anderson"))
        rows.append(
            StepsizeRow(
                float(stepsize),
                float(at.residual.max()),
                float(spectral_radius(at.recorded).max()),
                float(lfpi.ok.double().mean()),
                int(lfpi.iterations.max()),
                int(gmres.iterations.max()),
                int(anderson.iterations.max()),
            )
        )
    return rows


def agreement(
    layer: FixedPointLayer, *params: Tensor, iterations: int, start: Callable[..., Tensor] | None = None
) -> dict[str, float]:
    """Return the relative distance of other gradients to the folded one, for a random cotangent.

    "unfold": `iterations` recorded steps from the solution; "lfpi": as many products of the fixed-point iteration,
    equal to it by Theorem 1; "unroll": recorded steps from ``start(*params)``, if that is given.
    """
    options: dict[str, Any] = {"tol": layer.tol, "on_failure": "warn", "dtype": layer.dtype}
    others: dict[str, nn.Module] = {
        "unfold": unfold(layer.solve, layer.update, iterations=iterations, **options),
        "lfpi": fold(layer.solve, layer.update, linear_solver=LFPI(tol=1e-300, max_iter=iterations - 1), **options),
    }
    if iterations < 2:
        raise InputError(f"iterations={iterations}: take at least 2 steps.")
    if start is not None:
        others["unroll"] = unroll(start, layer.update, iterations=iterations, **options)
    exact = _gradient(layer, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return {name: float(_distance(_gradient(other, params), exact)) for name, other in others.items()}


def _gradient(layer: nn.Module, params: Sequence[Tensor]) -> Tensor:
    leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in params]
    state = as_tuple(layer(*leaves))
    generator = torch.Generator().manual_seed(0)
    loss = torch.stack([(part * _random(part.detach(), generator)).sum() for part in state]).sum()
    return _joined(torch.autograd.grad(loss, [p for p in leaves if p.requires_grad], allow_unused=True))


def _core(layer: nn.Module) -> FixedPointLayer:
    core = layer if isinstance(layer, FixedPointLayer) else getattr(layer, "fold", None)
    if not isinstance(core, FixedPointLayer) or not isinstance(core.derivative, Implicit):
        raise InputError(f"layer={type(layer).__name__} is not a folded layer and has none as its `fold`.")
    return core


@contextmanager
def _lenient(core: FixedPointLayer) -> Iterator[None]:
    """Let a layer answer whatever its residuals and verdicts are."""
    before = core.on_failure, core.derivative, core.last
    linear_solver = cast(Implicit, core.derivative).linear_solver
    core.on_failure, core.derivative = "warn", Implicit(linear_solver, "one_sided")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        core.on_failure, core.derivative, core.last = before


class _Examined(NamedTuple):
    """A layer's solution and one step recorded there, every floating parameter taking part."""

    solution: Tensors
    recorded: Recorded
    step: StepFunction
    tensors: Tensors
    residual: Tensor


def _examined(layer: nn.Module, core: FixedPointLayer, params: Sequence[Tensor | None]) -> _Examined:
    """Call the layer without gradients and record a step with the parameters that its folded layer got."""
    got: list[tuple[Tensor, ...]] = []
    hook = core.register_forward_pre_hook(lambda _, args: got.append(args))
    try:
        with torch.no_grad():
            layer(*params)
    finally:
        hook.remove()
    call = LayerCall(core, tuple(p.detach().requires_grad_(p.is_floating_point()) for p in got[-1]))
    solution = call.solve(call.tensors)
    recorded = record(call.step, solution, call.tensors)
    info = core.certify(solution, tuple(part.detach() for part in recorded.outputs))
    return _Examined(solution, recorded, call.step, call.tensors, info.residual)


def _differences(
    layer: nn.Module,
    core: FixedPointLayer,
    params: Sequence[Tensor | None],
    generator: torch.Generator,
    eps: float | None,
) -> tuple[list[GradientCheck], Tensor, FoldInfo]:
    """Check the derivative along one direction per parameter.

    Also return where the output has a kink, (B, N) bool, and the certificates of the call and of its backward pass.
    """
    leaves = [None if p is None else p.detach().clone().requires_grad_(p.is_floating_point()) for p in params]
    named = {str(i): p for i, p in enumerate(leaves) if p is not None and p.requires_grad} | core.inside.weights()
    output = as_tuple(layer(*leaves))
    info = cast(FoldInfo, core.last)
    weight = [_random(part.detach(), generator) for part in output]
    wanted = list(named.values())
    gradients = torch.autograd.grad(
        torch.stack([(part * w).sum() for part, w in zip(output, weight, strict=True)]).sum(), wanted, allow_unused=True
    )
    base, w = flatten([part.detach() for part in output]), flatten(weight)
    kinks = torch.zeros_like(base, dtype=torch.bool)
    rows = []
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        direction = _random(p.detach(), generator)
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


def _moved(layer: nn.Module, leaves: Sequence[Tensor | None], p: Tensor, change: Tensor) -> Tensor:
    """Return the layer's flattened output with `p`, one of the leaves or a weight, moved for the call."""
    before = p.detach().clone()
    try:
        with torch.no_grad():
            p.add_(change)
            return flatten(as_tuple(layer(*leaves)))
    finally:
        with torch.no_grad():
            p.copy_(before)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def _distance(a: Tensor, b: Tensor, norm: float = 2) -> Tensor:
    size = torch.linalg.vector_norm(b, norm)
    return torch.linalg.vector_norm(a - b, norm) / torch.where(size > 0, size, 1)
