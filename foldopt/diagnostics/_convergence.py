"""How fast backward passes converge: the spectral radius of Phi, traces of unrolling, stepsizes, other gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foldopt._fold import fold, unfold, unroll
from foldopt._implicit import fixed_point_vjp
from foldopt._layer import FixedPointLayer
from foldopt.checks import require_whole
from foldopt.diagnostics._examined import distance, examined, folded_in, joined, lenient, random_like
from foldopt.errors import InputError
from foldopt.linear_solve import LFPI, SOLVERS, Direct
from foldopt.linear_solve._phi import Phi
from foldopt.step import Recorded, StepVJP, Tensors, as_tuple, flatten, record, unflatten, vjp_of

ASSEMBLED = 400  # columns up to which Phi is assembled where it is multiplied with hundreds of times


def spectral_radius(recorded: Recorded, iterations: int = 400) -> Tensor:
    """Estimate rho(Phi), (B,), by power iteration with Phi^T: the geometric mean growth over the second half.

    The mean makes it right for complex eigenvalues too. recorded: a step recorded at its fixed point (`foldopt.step`).
    """
    vjp = _many_products(recorded)
    v = random_like(flatten(recorded.state), torch.Generator().manual_seed(0))
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
    core = folded_in(layer, params)
    with lenient(core):
        solution, recorded, step, tensors, _ = examined(layer, core, params)
    if cotangent is None:
        g = unflatten(random_like(flatten(solution), torch.Generator().manual_seed(seed)), solution)
    else:
        g = tuple(part.detach().to(s) for part, s in zip(as_tuple(cotangent), solution, strict=True))
    exact = joined(fixed_point_vjp(recorded, g, Direct())[0])
    x = solution if start is None else tuple(p.to(s) for p, s in zip(as_tuple(start), solution, strict=True))
    steps, forward, backward = [], [], []
    total, v = torch.zeros_like(exact), g
    for _ in range(iterations):
        steps.append(record(step, x, tensors))
        x = tuple(part.detach() for part in steps[-1].outputs)
        forward.append(distance(flatten(x), flatten(solution), norm=1))
        # At the solution all steps are alike, so that one more of them is one more term of the same sum.
        again = [steps[-1]] if start is None else steps[::-1]
        if start is not None:
            total, v = torch.zeros_like(exact), g
        for taken in again:
            total = total + joined(vjp_of(taken, taken.params, v))
            v = unflatten(StepVJP(taken)(flatten(v)), solution)
        backward.append(distance(total, exact, norm=1))
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
        core = folded_in(layer, params)
        with lenient(core):
            at = examined(layer, core, params)
        g = random_like(flatten(at.solution), torch.Generator().manual_seed(seed))
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
        return {name: float(distance(_gradient(other, params), exact)) for name, other in others.items()}


def _gradient(layer: nn.Module, params: Sequence[Tensor]) -> Tensor:
    leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in params]
    state = as_tuple(layer(*leaves))
    generator = torch.Generator().manual_seed(0)
    loss = torch.stack([(part * random_like(part.detach(), generator)).sum() for part in state]).sum()
    return joined(torch.autograd.grad(loss, [p for p in leaves if p.requires_grad], allow_unused=True))
