"""How backward passes converge: the spectral radius of Phi, traces of unrolling, stepsizes, and other gradients."""

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
from foldopt.linear_solve import LFPI, SOLVERS, Direct
from foldopt.linear_solve._phi import Phi
from foldopt.step import Recorded, StepVJP, Tensors, as_tuple, flatten, record, unflatten, vjp_of

__all__ = [
    "ASSEMBLED",
    "BackwardTrace",
    "StepsizeRow",
    "agreement",
    "backward_trace",
    "spectral_radius",
    "stepsize_study",
]

ASSEMBLED = 400  # columns up to which Phi is assembled for hundreds of products


def spectral_radius(recorded: Recorded, iterations: int = 400) -> Tensor:
    """Estimate the spectral radius of Phi by power iteration with Phi^T.

    It is the geometric mean of the growth over the second half of the iterations, which is right for complex
    eigenvalues too.

    Args:
        recorded: a step recorded at its fixed point, by `foldopt.step.record`.
        iterations: number of products; default 400.

    Returns:
        rho(Phi) of each sample, (B,).

    Examples:
        >>> x, c = torch.zeros(1, 2), torch.ones(1, 2, requires_grad=True)
        >>> recorded = foldopt.step.record(lambda x, c: (0.5 * x[0] + c[0],), (x,), (c,))
        >>> foldopt.diagnostics.spectral_radius(recorded)
        tensor([0.5000])
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
    """Return v -> Phi^T v for hundreds of products: by the matrix Phi, if it has few enough columns."""
    vjp, state = StepVJP(recorded), flatten(recorded.state).detach()
    if state.shape[1] > ASSEMBLED:
        return vjp
    phi = Phi.assembled(vjp, state).matrix()
    return lambda v: (v[:, None, :] @ phi)[:, 0]


@dataclass
class BackwardTrace:
    """Relative errors of an unrolled solver after each of its K steps (the paper's Figure 3).

    Norms are 1-norms, as in the paper, over the whole batch.

    Attributes:
        forward: (K,), ``||x_k - x*|| / ||x*||`` for k = 1 to K.
        backward: (K,), relative error of the gradient of k unrolled steps (Definition 2).

    Examples:
        >>> trace = foldopt.diagnostics.BackwardTrace(torch.zeros(4), torch.tensor([1.0, 0.5, 0.25, 0.125]))
        >>> round(trace.rate(), 4)  # log 2
        0.6931
    """

    forward: Tensor
    backward: Tensor

    def rate(self) -> float:
        """Return the mean decrease of log(backward) per step over its tail, which is -log rho(Phi) by Theorem 1."""
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
    """Unroll 1, 2, ..., K steps and compare each state with the solution and each gradient with the exact one.

    From the solution (`start` None) this is fixed-point unfolding (section 4): the forward error stays the same while
    the backward pass converges. From another start the work grows with the square of `iterations`.

    Args:
        layer: a folded layer, as in `check`.
        *params: its parameters.
        iterations: K, at least 1.
        start: state to start from; None, the default, for the solution.
        cotangent: gradient of the loss with respect to the state; None, the default, draws a random one.
        seed: seed of that; default 0.

    Returns:
        The errors.

    Raises:
        InputError: iterations is below 1, or the module has no folded layer.

    Source: paper, sections 3 and 4 and Figure 3.

    Examples:
        >>> layer = foldopt.fold(lambda c: 2 * c, lambda x, c: 0.5 * x + c)
        >>> trace = foldopt.diagnostics.backward_trace(layer, torch.ones(1, 1, dtype=torch.float64), iterations=3)
        >>> trace.backward
        tensor([0.5000, 0.2500, 0.1250], dtype=torch.float64)
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
        # At the solution all steps are the same, so each further step adds one term to the same sum.
        again = [steps[-1]] if start is None else steps[::-1]
        if start is not None:
            total, v = torch.zeros_like(exact), g
        for taken in again:
            total = total + joined(vjp_of(taken, taken.params, v))
            v = unflatten(StepVJP(taken)(flatten(v)), solution)
        backward.append(distance(total, exact, norm=1))
    return BackwardTrace(torch.stack(forward), torch.stack(backward))


class StepsizeRow(NamedTuple):
    """The backward pass at one stepsize; `stepsize_study` makes it. Numbers are the largest of the batch.

    Attributes:
        stepsize: the stepsize.
        residual: relative residual of the step at the solution.
        spectral_radius: spectral radius of Phi.
        lfpi_solved: share of the samples that LFPI solved, from 0 to 1.
        lfpi_products: products with Phi^T that LFPI took.
        gmres_products: products that GMRES took.
        anderson_products: products that Anderson took.

    Examples:
        >>> row = foldopt.diagnostics.StepsizeRow(0.1, 0.0, 0.8, 1.0, 104, 2, 2)
        >>> row.gmres_products
        2
    """

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
    """Compare stepsizes of an update step: the gradient is the same for all, the number of products is not.

    Args:
        make: ``make(stepsize)`` returns a folded layer.
        stepsizes: the stepsizes.
        *params: parameters of the layer.
        seed: seed of the random cotangent; default 0.

    Returns:
        One row per stepsize.

    Raises:
        InputError: the module that `make` returns has no folded layer.

    Source: paper, appendix D.

    Examples:
        >>> def make(stepsize):  # minimizes x^2 / 2 - c x, so x = c
        ...     return foldopt.fold(lambda c: c, lambda x, c: x - stepsize * (x - c))
        >>> rows = foldopt.diagnostics.stepsize_study(make, [0.5, 3.0], torch.ones(1, 1, dtype=torch.float64))
        >>> [(round(row.spectral_radius, 6), row.lfpi_solved, row.gmres_products) for row in rows]
        [(0.5, 1.0, 3), (2.0, 0.0, 3)]
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
    """Compare the folded gradient with those of unfolding, LFPI and unrolling, for a random cotangent.

    Args:
        layer: a layer made by `foldopt.fold`.
        *params: its parameters.
        iterations: number of steps, at least 2.
        start: ``start(*params)``, the state where unrolling starts; None, the default, leaves unrolling out.

    Returns:
        Relative distances to the folded gradient by name: "unfold" (recorded steps from the solution), "lfpi" (as many
        steps of the linear fixed-point iteration, the same by Theorem 1), and "unroll".

    Raises:
        InputError: iterations is below 2.

    Source: paper, Theorem 1.

    Examples:
        >>> layer = foldopt.fold(lambda c: 2 * c, lambda x, c: 0.5 * x + c)
        >>> found = foldopt.diagnostics.agreement(layer, torch.ones(1, 1, dtype=torch.float64), iterations=3)
        >>> {name: round(distance, 6) for name, distance in found.items()}
        {'unfold': 0.125, 'lfpi': 0.125}
    """
    require_whole("iterations", iterations, 2)
    options: dict[str, Any] = {"tol": layer.tol, "on_failure": "warn", "dtype": layer.dtype}
    others: dict[str, nn.Module] = {
        "unfold": unfold(layer.solve, layer.update, iterations=iterations, **options),
        "lfpi": fold(layer.solve, layer.update, linear_solver=LFPI(tol=1e-300, max_iter=iterations - 1), **options),
    }
    if start is not None:
        others["unroll"] = unroll(start, layer.update, iterations=iterations, **options)
    exact = _gradient(layer, params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return {name: float(distance(_gradient(other, params), exact)) for name, other in others.items()}


def _gradient(layer: nn.Module, params: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a random linear loss with respect to all parameters, as one vector."""
    leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in params]
    state = as_tuple(layer(*leaves))
    generator = torch.Generator().manual_seed(0)
    loss = torch.stack([(part * random_like(part.detach(), generator)).sum() for part in state]).sum()
    return joined(torch.autograd.grad(loss, [p for p in leaves if p.requires_grad], allow_unused=True))
