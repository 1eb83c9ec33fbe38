"""Ready layers whose step is a projected, dual proximal or augmented gradient step: f-PGDa, f-PGDb, f-FDPG and ADMM."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from foldopt._fold import fold
from foldopt._layer import FixedPointLayer, LayerAround
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver
from foldopt.solvers.qp import solve_qp
from foldopt.solvers.qpth import solve_qpth
from foldopt.updates.admm import PrimalADMM, PrimalState, batched_qp, symmetric
from foldopt.updates.dual_proximal_gradient import DualProximalGradient
from foldopt.updates.gradient import Objective, ProjectedGradient

__all__ = ["ADMMLayer", "FDPGLayer", "Polyhedron", "f_fdpg", "f_pgd_a", "f_pgd_b"]

Polyhedron = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def f_pgd_a(
    objective: Objective,
    polyhedron: Polyhedron,
    solve: Callable[..., Tensor],
    stepsize: float,
    *,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    on_failure: str = "raise",
    degenerate: str = "raise",
    dtype: torch.dtype | None = torch.float64,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """f-PGDa: a smooth objective on a polyhedron, folded through projected gradient with qpth's projection.

    The layer solves min_x f(x, c) subject to Gx <= h, Ax = b with any solver. Its derivative is that of one step
    x -> P(x - alpha grad f(x, c)), where qpth computes and differentiates the projection P. qpth has no second
    derivative; `f_pgd_b` has one and needs no extra package.

    Args:
        objective: ``objective(x, *params) -> (B,)``, smooth, for x of shape (B, n).
        polyhedron: ``polyhedron(*params) -> (G, h, A, b)`` of shapes (m, n), (m,), (k, n), (k,), each also with a
            batch dimension; A and b may be None.
        solve: ``solve(*params) -> x``, any black box that returns the solutions (B, n).
        stepsize: alpha, above 0. The gradient does not depend on it; iterative linear solvers take longer if it is
            badly chosen.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise", "warn", "nan" or "zero" for samples that fail, as in `foldopt.fold`; default "raise".
        degenerate: one of `foldopt.verdicts.POLICIES`; has no effect, as this step does not detect degenerate points.
        dtype: dtype of the computation; default float64, which qpth's interior point needs. None keeps the dtype of
            the first floating parameter.
        modules: further modules whose weights `objective` or `polyhedron` use, as in `foldopt.fold`.

    Returns:
        A layer, ``layer(*params) -> x``, (B, n).

    Raises:
        InputError: an argument of this function is invalid, or, when the layer is called, a shape does not fit.
        MissingDependencyError: qpth is not installed; raised when the layer is called.

    Source: paper, eq. 4 and section 6; Amos and Kolter, OptNet (2017).

    Examples:
        >>> def objective(x, c):
        ...     return (x - c).square().sum(1)
        >>> def polyhedron(c):  # x <= 1
        ...     return torch.eye(2, dtype=c.dtype), torch.ones(2, dtype=c.dtype), None, None
        >>> layer = foldopt.f_pgd_a(objective, polyhedron, lambda c: c.clamp(max=1), stepsize=0.1)
        >>> layer(torch.tensor([[0.5, 2.0]]))
        tensor([[0.5000, 1.0000]])
    """

    def projection(y: Tensor, *params: Tensor) -> Tensor:
        return solve_qpth(*_projection_qp(y, polyhedron(*params)), eps=1e-14, max_iter=60)

    return fold(
        solve,
        ProjectedGradient(objective, projection, stepsize),
        linear_solver=linear_solver,
        tol=tol,
        on_failure=on_failure,
        degenerate=degenerate,
        dtype=dtype,
        modules=modules,
    )


def f_pgd_b(
    objective: Objective,
    polyhedron: Polyhedron,
    solve: Callable[..., Tensor],
    stepsize: float,
    *,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    on_failure: str = "raise",
    degenerate: str = "raise",
    dtype: torch.dtype | None = torch.float64,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """f-PGDb: a smooth objective on a polyhedron, folded through projected gradient with a folded projection.

    The layer solves min_x f(x, c) subject to Gx <= h, Ax = b with any solver. Its derivative is that of one step
    x -> P(x - alpha grad f(x, c)), where the projection P is itself a folded layer, `foldopt.layers.ADMMLayer`.

    Args:
        objective: ``objective(x, *params) -> (B,)``, smooth, for x of shape (B, n).
        polyhedron: ``polyhedron(*params) -> (G, h, A, b)`` of shapes (m, n), (m,), (k, n), (k,), each also with a
            batch dimension; A, of full row rank, and b may be None.
        solve: ``solve(*params) -> x``, any black box that returns the solutions (B, n).
        stepsize: alpha, above 0. The gradient does not depend on it; iterative linear solvers take longer if it is
            badly chosen.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise", "warn", "nan" or "zero" for samples that fail, as in `foldopt.fold`; default "raise".
        degenerate: one of `foldopt.verdicts.POLICIES`; has no effect, as this step does not detect degenerate points.
        dtype: dtype of the computation; default float64. None keeps the dtype of the first floating parameter.
        modules: further modules whose weights `objective` or `polyhedron` use, as in `foldopt.fold`.

    Returns:
        A layer, ``layer(*params) -> x``, (B, n).

    Raises:
        InputError: an argument of this function is invalid, or, when the layer is called, a shape does not fit.

    Source: paper, eqs. 4, 29 and 30, and section 6.

    Examples:
        >>> def objective(x, c):
        ...     return (x - c).square().sum(1)
        >>> def polyhedron(c):  # x <= 1
        ...     return torch.eye(2, dtype=c.dtype), torch.ones(2, dtype=c.dtype), None, None
        >>> layer = foldopt.f_pgd_b(objective, polyhedron, lambda c: c.clamp(max=1), stepsize=0.1)
        >>> c = torch.tensor([[0.5, 2.0]], requires_grad=True)
        >>> layer(c).sum().backward()
        >>> c.grad
        tensor([[1., 0.]])
    """
    inner = ADMMLayer()

    def projection(y: Tensor, *params: Tensor) -> Tensor:
        return inner(*_projection_qp(y, polyhedron(*params)))

    return fold(
        solve,
        ProjectedGradient(objective, projection, stepsize),
        linear_solver=linear_solver,
        tol=tol,
        on_failure=on_failure,
        degenerate=degenerate,
        dtype=dtype,
        modules=modules,
    )


def _projection_qp(y: Tensor, polyhedron: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> tuple[Tensor, ...]:
    """Return the projection of y on a polyhedron as the arguments (Q, p, G, h, A, b) of a quadratic program."""
    if len(polyhedron) != 4:
        raise InputError(f"polyhedron returned {len(polyhedron)} values, expected (G, h, A, b); A and b may be None.")
    G, h, A, b = polyhedron
    if A is None or b is None:
        A, b = y.new_zeros(0, y.shape[1]), y.new_zeros(0)
    return torch.eye(y.shape[1], dtype=y.dtype, device=y.device), -y, G, h, A, b


class FDPGLayer(LayerAround):
    """min_x 1/2 |x - d|^2 + g(D x), folded through one dual proximal gradient step: the layer that `f_fdpg` makes.

    ``layer(D, d, *params)`` returns x, (B, n). The folded state is the dual w, (B, m), and x = d + D'w is read out of
    it by differentiable code.

    Args:
        prox: ``prox(v, t, D, d, *params) -> v``, the proximal operator of t g for v of shape (B, m) and a weight t.
        solve: ``solve(D, d, *params) -> w``, any black box that returns the dual solutions (B, m). For a solver that
            returns only x, ``DualProximalGradient.dual(x, D, d)`` computes w.
        stepsize: stepsize s of the dual step, above 0; None takes 1 / |D|_2^2. The gradient does not depend on it.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise", "warn", "nan" or "zero" for samples that fail, as in `foldopt.fold`; default "raise".
        degenerate: one of `foldopt.verdicts.POLICIES`; has no effect, as this step does not detect degenerate points.
        dtype: dtype of the computation; None, the default, keeps the dtype of the first floating parameter.
        modules: further modules whose weights `prox` uses, as in `foldopt.fold`.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a shape does not fit.

    Source: paper, eq. 28; Beck, First-Order Methods in Optimization (2017), chapter 12.

    Examples:
        >>> def prox(v, t, D, d, weight):
        ...     return foldopt.prox.soft_threshold(v, t * weight)
        >>> def solve(D, d, weight):  # for D = I
        ...     return foldopt.prox.soft_threshold(d, weight) - d
        >>> layer = foldopt.layers.FDPGLayer(prox, solve)
        >>> layer(torch.eye(2), torch.tensor([[3.0, 0.5]]), torch.tensor(1.0))
        tensor([[2., 0.]])
    """

    def __init__(
        self,
        prox: Callable[..., Tensor],
        solve: Callable[..., Tensor],
        stepsize: float | None = None,
        *,
        linear_solver: str | LinearSolver = "auto",
        tol: float | None = None,
        on_failure: str = "raise",
        degenerate: str = "raise",
        dtype: torch.dtype | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.update = DualProximalGradient(prox, stepsize)
        self.fold = fold(
            solve,
            self.update,
            linear_solver=linear_solver,
            tol=tol,
            on_failure=on_failure,
            degenerate=degenerate,
            dtype=dtype,
            modules=modules,
        )

    def forward(self, D: Tensor, d: Tensor, *params: Tensor) -> Tensor:
        """Return the solutions.

        Args:
            D: matrix (m, n) or (B, m, n).
            d: data (B, n).
            *params: parameters of `prox`.

        Returns:
            x, (B, n).
        """
        return self.update.primal(self.fold(D, d, *params), D, d)


def f_fdpg(
    prox: Callable[..., Tensor],
    solve: Callable[..., Tensor],
    *,
    stepsize: float | None = None,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    on_failure: str = "raise",
    degenerate: str = "raise",
    dtype: torch.dtype | None = None,
    modules: Iterable[nn.Module] = (),
) -> FDPGLayer:
    """f-FDPG: min_x 1/2 |x - d|^2 + g(D x), folded through one dual proximal gradient step.

    Args:
        prox: ``prox(v, t, D, d, *params) -> v``, the proximal operator of t g for v of shape (B, m) and a weight t.
        solve: ``solve(D, d, *params) -> w``, any black box that returns the dual solutions (B, m), with
            x = d + D'w. For a solver that returns only x, ``DualProximalGradient.dual(x, D, d)`` computes w.
        stepsize: stepsize s of the dual step, above 0; None takes 1 / |D|_2^2. The gradient does not depend on it.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise", "warn", "nan" or "zero" for samples that fail, as in `foldopt.fold`; default "raise".
        degenerate: one of `foldopt.verdicts.POLICIES`; has no effect, as this step does not detect degenerate points.
        dtype: dtype of the computation; None, the default, keeps the dtype of the first floating parameter.
        modules: further modules whose weights `prox` uses, as in `foldopt.fold`.

    Returns:
        A layer, ``layer(D, d, *params) -> x``, (B, n), for D (m, n) or (B, m, n) and d (B, n); ``layer.last`` holds
        the certificates of the last call.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a shape does not fit.

    Source: paper, eq. 28 and section 6.

    Examples:
        >>> def prox(v, t, D, d, weight):
        ...     return foldopt.prox.soft_threshold(v, t * weight)
        >>> def solve(D, d, weight):  # for D = I
        ...     return foldopt.prox.soft_threshold(d, weight) - d
        >>> layer = foldopt.f_fdpg(prox, solve)
        >>> d = torch.tensor([[3.0, 0.5]], requires_grad=True)
        >>> layer(torch.eye(2), d, torch.tensor(1.0)).sum().backward()
        >>> d.grad
        tensor([[1., 0.]])
    """
    return FDPGLayer(
        prox,
        solve,
        stepsize,
        linear_solver=linear_solver,
        tol=tol,
        on_failure=on_failure,
        degenerate=degenerate,
        dtype=dtype,
        modules=modules,
    )


class ADMMLayer(LayerAround):
    """A strictly convex quadratic program, folded through one step of ADMM; `f_pgd_b` projects with it.

    ``layer(Q, p, G, h, A, b)`` solves min 1/2 x'Qx + p'x subject to Gx <= h, Ax = b. `foldopt.QPLayer` solves the same
    program, is exact on more of them, and judges degenerate points. At a constraint that is active with a multiplier of
    zero, the derivative is the one-sided one with the constraint active.

    Args:
        rho: penalty of ADMM, above 0; default 1. The gradient does not depend on it.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        on_failure: "raise", "warn", "nan" or "zero" for samples that fail, as in `foldopt.fold`; default "raise".
        degenerate: one of `foldopt.verdicts.POLICIES`; has no effect, as this step does not detect degenerate points.
        dtype: dtype of the computation; default float64. None keeps the dtype of the first floating parameter.
        modules: further modules, as in `foldopt.fold`.

    Raises:
        InputError: an argument is invalid, or, when the layer is called, a shape does not fit.

    Source: paper, eqs. 29 and 30 (with argmin); Boyd et al., Distributed optimization via ADMM (2011), section 5.2.

    Examples:
        >>> Q, p, G, h = torch.eye(2), torch.tensor([[-2.0, -0.5]]), torch.eye(2), torch.ones(2)
        >>> foldopt.layers.ADMMLayer()(Q, p, G, h, torch.zeros(0, 2), torch.zeros(0))
        tensor([[1.0000, 0.5000]])
    """

    def __init__(
        self,
        rho: float = 1.0,
        *,
        linear_solver: str | LinearSolver = "auto",
        tol: float | None = None,
        on_failure: str = "raise",
        degenerate: str = "raise",
        dtype: torch.dtype | None = torch.float64,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.update = PrimalADMM(rho)
        self.fold = fold(
            self._solve,
            self.update,
            linear_solver=linear_solver,
            tol=tol,
            on_failure=on_failure,
            degenerate=degenerate,
            dtype=dtype,
            modules=modules,
        )

    def forward(self, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """Return the solutions; each argument may lack its batch dimension, and is then shared.

        Args:
            Q: (B, n, n), symmetric and positive definite.
            p: (B, n).
            G: (B, m, n); m may be 0.
            h: (B, m).
            A: (B, k, n), of full row rank; k may be 0.
            b: (B, k).

        Returns:
            x, (B, n), in the dtype of Q.

        Raises:
            InputError: shapes do not fit.
        """
        batched_qp(Q, p, G, h, A, b)  # checks the shapes; the layer's own errors would name positions, not arguments
        x: Tensor = self.fold(Q, p, G, h, A, b)[0]
        return x.to(Q.dtype)

    def _solve(self, *params: Tensor) -> PrimalState:
        Q, p, G, h, A, b = batched_qp(*params)
        found = solve_qp(symmetric(Q), p, A, b, G, h)
        return found.x, *self.update.state(found.x, found.lam, G)
