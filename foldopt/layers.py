"""Ready layers: the folded optimizers of the paper's section 6."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from foldopt._fold import FoldOptions, Implicit, fold
from foldopt._layer import FixedPointLayer, LayerAround
from foldopt._nlp import NLPFold, solved_by
from foldopt._sparsity import Sparsity
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver
from foldopt.solvers import scipy_nlp
from foldopt.solvers.multipliers import recover_multipliers
from foldopt.solvers.qp import solve_qp
from foldopt.solvers.qpth import solve_qpth
from foldopt.step import State, as_tuple
from foldopt.updates.admm import PrimalADMM, PrimalState, batched_qp, symmetric
from foldopt.updates.dual_proximal_gradient import DualProximalGradient
from foldopt.updates.gradient import ProjectedGradient
from foldopt.updates.programs import Bound, SmoothProgram, SQPData, SQPProgram, SQPState
from foldopt.updates.sparse_sqp import SparseSQP
from foldopt.updates.sqp import SQP

__all__ = ["ADMMLayer", "FDPGLayer", "NLPLayer", "Polyhedron", "f_fdpg", "f_pgd_a", "f_pgd_b", "f_sqp"]


def __dir__() -> list[str]:
    return __all__


Polyhedron = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def f_pgd_a(
    objective: Callable[..., Tensor],
    polyhedron: Polyhedron,
    solve: Callable[..., Tensor],
    stepsize: float,
    **options: Unpack[FoldOptions],
) -> FixedPointLayer:
    """f-PGDa: projected gradient on a polyhedron, the projection and its derivative by qpth (paper section 6).

    Args:
        objective: f(x, *params) -> (B,), smooth. polyhedron: ``polyhedron(*params) -> (G, h, A, b)``, the set
            Gx <= h, Ax = b, each batched or shared by the batch; A and b may be None.
        solve: ``solve(*params) -> x``, any black box, (B, n).
        stepsize: alpha > 0 of eq. 4; the gradient does not depend on it.
        options: as for `foldopt.fold`; dtype is float64 unless given, as qpth's interior point needs it.

    Raises MissingDependencyError when it is called without qpth. qpth has no second derivative; `f_pgd_b` does.
    """

    def projection(y: Tensor, *params: Tensor) -> Tensor:
        return solve_qpth(*_projection_qp(y, polyhedron(*params)), eps=1e-14, max_iter=60)

    return fold(solve, ProjectedGradient(objective, projection, stepsize), **_float64(options))


def f_pgd_b(
    objective: Callable[..., Tensor],
    polyhedron: Polyhedron,
    solve: Callable[..., Tensor],
    stepsize: float,
    **options: Unpack[FoldOptions],
) -> FixedPointLayer:
    """f-PGDb: projected gradient whose projection is itself a folded ADMM, `ADMMLayer` (paper section 6).

    Nested folding: the update step contains a folded layer. Arguments as for `f_pgd_a`.
    """
    inner = ADMMLayer()

    def projection(y: Tensor, *params: Tensor) -> Tensor:
        return inner(*_projection_qp(y, polyhedron(*params)))

    return fold(solve, ProjectedGradient(objective, projection, stepsize), **_float64(options))


def _float64(options: FoldOptions) -> FoldOptions:
    """Return the options with float64 where no dtype is given."""
    return options if "dtype" in options else {**options, "dtype": torch.float64}


def _projection_qp(y: Tensor, polyhedron: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> tuple[Tensor, ...]:
    """Return the projection of y on a polyhedron as the arguments (Q, p, G, h, A, b) of a QP."""
    if len(polyhedron) != 4:
        raise InputError(f"polyhedron returned {len(polyhedron)} values, expected (G, h, A, b); A and b may be None.")
    G, h, A, b = polyhedron
    if A is None or b is None:
        A, b = y.new_zeros(0, y.shape[1]), y.new_zeros(0)
    return torch.eye(y.shape[1], dtype=y.dtype, device=y.device), -y, G, h, A, b


def f_fdpg(
    prox: Callable[..., Tensor],
    solve: Callable[..., Tensor],
    *,
    stepsize: float | None = None,
    **options: Unpack[FoldOptions],
) -> FDPGLayer:
    """f-FDPG: min_x 1/2 |x - d|^2 + g(D x), folded through one dual proximal gradient step (paper eq. 28).

    Args:
        prox: as for `foldopt.DualProximalGradient`. stepsize: s; None takes 1 / |D|^2.
        solve: ``solve(D, d, *params) -> w``, the dual solution (B, m), of which x = d + D'w; where a solver knows only
            x, ``DualProximalGradient.dual(x, D, d)`` makes w of it.
        options: as for `foldopt.fold`.

    Returns ``layer(D, d, *params) -> x``, (B, n); ``layer.last`` holds the certificates.
    """
    return FDPGLayer(prox, solve, stepsize, **options)


class FDPGLayer(LayerAround):
    """The layer that `f_fdpg` makes."""

    def __init__(
        self,
        prox: Callable[..., Tensor],
        solve: Callable[..., Tensor],
        stepsize: float | None = None,
        **options: Unpack[FoldOptions],
    ) -> None:
        super().__init__()
        self.update = DualProximalGradient(prox, stepsize)
        self.fold = fold(solve, self.update, **options)

    def forward(self, D: Tensor, d: Tensor, *params: Tensor) -> Tensor:
        """Return x, (B, n)."""
        return self.update.primal(self.fold(D, d, *params), D, d)


def f_sqp(
    program: SQPProgram,
    solve: Callable[..., State],
    *,
    stepsize: float = 1.0,
    dtype: torch.dtype | None = torch.float64,
    degenerate: str = "raise",
    on_failure: str = "raise",
    sparsity: bool | Sparsity = False,
    linear_solver: str | LinearSolver = "auto",
    tol: float | None = None,
    modules: Iterable[nn.Module] = (),
) -> FixedPointLayer:
    """f-SQP: any smooth program, solved by any black box, folded through one SQP step (paper section 6, eqs. 31-32).

    Args:
        program: what SQP models, e.g. ``SmoothProgram(objective, equalities, inequalities)``.
        solve: ``solve(*params) -> (x, nu, lam)``, the primal solution (B, n) and the multipliers (B, p) and (B, m) of
            the Lagrangian f + nu.h + lam.g, lam >= 0.
        stepsize: alpha of eq. 32. dtype: float64 by default whatever the network's dtype; None keeps the caller's.
        degenerate: what happens to samples whose solution has no derivative that the incoming gradient asks for, as for
            `foldopt.QPLayer`: "raise" (`KinkError` at constraints without slack and without a multiplier,
            `NotUniqueError`, `DependentRowsError`), "warn" (and go on as "one_sided"), "one_sided" (the derivative of
            one of the smooth pieces that meet; of active constraints that depend on each other some independent ones
            carry), "least_norm" (they share), "nan" or "zero" (the gradient of that sample).
        sparsity: True, or a `foldopt.Sparsity`, for thousands of variables: the KKT system is sparse, its entries come
            from a few products with the derivatives of the program, a `SmoothProgram` (`foldopt.updates.SparseSQP`,
            whose stepsize is 1). True finds out which entries there are, by a product for every variable and
            constraint at the first call. Needs scipy and qdldl (extra "qp").
        on_failure, linear_solver, tol, modules: as for `foldopt.fold`.

    Returns:
        ``layer(*params) -> (x, nu, lam)``, differentiable. At a vertex (as many active constraints as variables) the
        derivative is exactly zero. Active constraints that depend on each other matter only to the gradient of
        parameters that the constraints use, and where their curvatures differ. ``layer.last.verdict`` says after a
        backward pass what became of each sample.
    """
    return fold(
        solve,
        _step(program, stepsize, degenerate, "nan" in (degenerate, on_failure), sparsity),
        linear_solver=linear_solver,
        tol=tol,
        on_failure=on_failure,
        degenerate=degenerate,
        dtype=dtype,
        modules=modules,
    )


def _step(
    program: SQPProgram, stepsize: float, degenerate: str, nan: bool, sparsity: bool | Sparsity
) -> SQP | SparseSQP:
    if sparsity is False:
        return SQP(program, stepsize, degenerate, nan)
    if stepsize == 1:
        return SparseSQP(program, None if sparsity is True else sparsity, nan)
    raise InputError(f"stepsize={stepsize}: with sparsity= the step is a full one, stepsize=1.")


class ADMMLayer(LayerAround):
    """A strictly convex quadratic program folded through one step of ADMM (paper eqs. 29-30): the inside of f-PGDb.

    ``ADMMLayer()(Q, p, G, h, A, b) -> x``, arguments as for `QPLayer`, which is exact on more programs; A and b of full
    row rank. At a weakly active constraint the derivative is the one-sided one with the constraint active.

    Args:
        rho: penalty of ADMM, above 0; the gradient does not depend on it. options: as for `foldopt.fold`.
    """

    def __init__(self, rho: float = 1.0, **options: Unpack[FoldOptions]) -> None:
        super().__init__()
        self.update = PrimalADMM(rho)
        self.fold = fold(self._solve, self.update, **_float64(options))

    def forward(self, Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """Return the solutions, (B, n), in the dtype of Q."""
        batched_qp(Q, p, G, h, A, b)  # shapes first: what follows would fail in its own words
        x: Tensor = self.fold(Q, p, G, h, A, b)[0]
        return x.to(Q.dtype)

    def _solve(self, *params: Tensor) -> PrimalState:
        Q, p, G, h, A, b = batched_qp(*params)
        found = solve_qp(symmetric(Q), p, A, b, G, h)
        return found.x, *self.update.state(found.x, found.lam, G)


class NLPLayer(LayerAround):
    """Any smooth program as a layer, convex or not: min f(x, c) s.t. g(x, c) <= 0, h(x, c) = 0 (paper eq. 1).

    ``NLPLayer(objective, inequalities, equalities, start=start)(*params) -> x``, (B, n), folded through one SQP step at
    the KKT point that the solver found. A program of several local minima has the derivative of the one that was found.

    How many samples there are, B: as many as `start` has rows if it is (B, n) or a function that returns that. With a
    start (n,) for all samples, as many as the parameters of two or more dimensions have rows, which must agree; 0-D and
    1-D parameters are shared by all samples. Give a start of shape (1, n) where all parameters are shared matrices.

    ``layer.last`` holds the certificates: ``status`` ("solved", "infeasible", "unbounded", "not smooth", "no
    multipliers", "iteration limit", "time limit", "not finite", "no progress" or "step and solution disagree" for each
    sample), ``residual``, ``solved``, ``ok``, after a backward pass ``verdict``; `layer.multipliers` the (nu, lam) of
    the last call, the bounds' behind the others.

    Args:
        objective: f(x, *params) -> (B,). The samples of a batch do not interact. Functions that are not PyTorch code
            come in as a `foldopt.ExternalFunction`.
        inequalities: g(x, *params) -> (B, m), meant as g <= 0, or None.
        equalities: h(x, *params) -> (B, p), or None.
        lower: lower <= x, a tensor (n,) or (B, n) or a function of the parameters that returns one; -inf is no bound.
        upper: x <= upper, likewise; inf is no bound. A variable with lower = upper in all samples is an equality.
        start: where the solver starts, (n,) or (B, n), or a function ``start(*params) -> (B, n)``.
        solver: "sqp" (built in, batched: `foldopt.solvers.nlp.solve_nlp`), "slsqp" or "trust-constr" (SciPy), "ipopt"
            (cyipopt), or any black box ``solver(*params) -> x`` or ``-> (x, nu, lam)`` with nu (B, p) for h and
            lam (B, m) >= 0 for g, those of bounds behind the others; of x alone the multipliers are recovered by least
            squares. Such a black box needs no `start`, and keeps its own limits.
        tol: largest accepted ||U(x*, c) - x*|| / (1 + ||x*||) of x and of the multipliers; default 1e-6 in float64,
            else 1e-3. Solvers stop at a ten-thousandth of it.
        max_iter: cap of the solver's iterations for each sample; None for the solver's own.
        time_limit: seconds after which the solver gives up, for the batch ("sqp") or for each sample; None for none.
        polish: SQP steps taken on the solver's answer, which square its error. A sample that they move by more than
            1e-3 (relative) is left as it was.
        dtype: float64 by default whatever the network's; x comes back in that of the first parameter.
        sparsity: as for `f_sqp`, for thousands of variables; the solver is then "ipopt" or a function, for the others
            work with dense matrices.
        degenerate: what happens to samples whose solution has no derivative, as for `f_sqp`.
        on_failure: what happens to samples that are not solved, as for `foldopt.fold`. "raise" raises the error of the
            first cause: InfeasibleError, UnboundedError, NotSmoothError, NoMultipliersError, LimitError, or
            FixedPointError where the solver's answer is no KKT point.
        linear_solver: as for `foldopt.fold`.
        modules: as for `foldopt.fold`.

    Raises:
        InputError: an argument is unknown or of a wrong shape, or the parameters' numbers of rows contradict.

    Example:
        >>> layer = NLPLayer(lambda x, c: (c * x).sum(1), lambda x, c: x.square().sum(1, keepdim=True) - 1,
        ...                  start=torch.zeros(2))
        >>> layer(torch.tensor([[3.0, 4.0], [0.0, -1.0]]))
        tensor([[-0.6000, -0.8000],
                [ 0.0000,  1.0000]])
    """

    fold: NLPFold

    def __init__(
        self,
        objective: Callable[..., Tensor],
        inequalities: Callable[..., Tensor] | None = None,
        equalities: Callable[..., Tensor] | None = None,
        *,
        lower: Bound | None = None,
        upper: Bound | None = None,
        start: Tensor | Callable[..., Tensor] | None = None,
        solver: str | Callable[..., State] = "sqp",
        tol: float | None = None,
        max_iter: int | None = None,
        time_limit: float | None = None,
        polish: int = 1,
        dtype: torch.dtype | None = torch.float64,
        sparsity: bool | Sparsity = False,
        degenerate: str = "raise",
        on_failure: str = "raise",
        linear_solver: str | LinearSolver = "auto",
        modules: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        known = ("sqp", *scipy_nlp.METHODS, "ipopt")
        if isinstance(solver, str) and solver not in known:
            raise InputError(f"solver={solver!r} is unknown; choose one of {known} or pass a function.")
        if isinstance(solver, str) and solver != "ipopt" and sparsity is not False:
            raise InputError(
                f"solver={solver!r} works with dense matrices: with sparsity= take solver='ipopt', or pass a function "
                "solver(*params) -> x or -> (x, nu, lam)."
            )
        if isinstance(solver, str) and start is None:
            raise InputError(
                f"solver={solver!r} needs start=, a tensor (n,) or (B, n) or a function of the parameters."
            )
        require_whole("polish", polish, 0)
        if max_iter is not None:
            require_whole("max_iter", max_iter, 1)
        if time_limit is not None:
            require_positive("time_limit", time_limit)
        self.program = SmoothProgram(objective, equalities, inequalities, lower, upper)
        self.start, self.solver, self.polish = start, solver, polish
        self.limits = {"max_iter": max_iter, "time_limit": time_limit}
        nan = "nan" in (degenerate, on_failure)
        self.fold = NLPFold(
            self._solve,
            _step(self.program, 1.0, degenerate, nan, sparsity),
            Implicit(linear_solver, degenerate),
            tol=tol,
            on_failure=on_failure,
            dtype=dtype,
            modules=modules,
        )
        self.multipliers: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "multipliers": None}

    def forward(self, *params: Tensor) -> Tensor:
        """Return the solutions, (B, n)."""
        x, nu, lam = self.fold(*params)
        self.multipliers = nu.detach(), lam.detach()
        return x

    def _solve(self, *params: Tensor) -> SQPState:
        if callable(self.solver):
            found, causes = as_tuple(self.solver(*params)), None
        else:
            found, causes = solved_by(self.solver, self.fold, self.program, self._started(params), params, self.limits)
        state: Any = found
        if len(state) not in (1, 3):
            raise InputError(f"solver returned {len(state)} tensors, expected x or (x, nu, lam).")
        like = next((p for p in params if p.is_floating_point()), state[0])
        state = tuple(part.to(like.dtype) for part in state)
        if len(state) == 1:
            state = (state[0], *self._multipliers(state[0], params))
        for _ in range(self.polish):
            moved = self.fold.update(state, *params)
            change = torch.linalg.vector_norm(moved[0] - state[0], dim=1)
            near = change <= 1e-3 * (1 + torch.linalg.vector_norm(state[0], dim=1))
            state = tuple(torch.where(near[:, None], new, old) for new, old in zip(moved, state, strict=True))
        self.fold.call.params, self.fold.call.causes = params, causes
        return state

    def _multipliers(self, x: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if isinstance(self.fold.update, SparseSQP):
            return self.fold.update.multipliers(x, *params)
        _, h, g = self.program.values(x, *params)
        data = SQPData(*self.program.sqp_data(x, torch.zeros_like(h), torch.zeros_like(g), *params))
        return recover_multipliers(data.gradient, data.jacobian_h, g, data.jacobian_g)

    def _started(self, params: tuple[Tensor, ...]) -> Tensor:
        start: Any = self.start(*params) if callable(self.start) else self.start
        start = start.to(device=params[0].device, dtype=self.fold.dtype or params[0].dtype)
        if start.dim() != 1:
            return start
        rows = {len(p) for p in params if p.dim() >= 2} - {1}
        if len(rows) > 1:
            raise InputError(
                f"the parameters have {sorted(rows)} rows, of shapes {[tuple(p.shape) for p in params]}: which are the "
                "samples? Pass start= of shape (B, n), or a function start(*params) that returns that."
            )
        return start.expand(max(rows, default=1), -1)
