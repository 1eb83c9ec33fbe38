"""Ready layers, each with its own update step: the folded optimizers of the paper's section 6, and `NLPLayer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from foldopt._fold import Implicit, fold
from foldopt._gradient_layers import ADMMLayer, FDPGLayer, Polyhedron, f_fdpg, f_pgd_a, f_pgd_b
from foldopt._layer import FixedPointLayer, LayerAround
from foldopt._nlp import NLPFold, solved_by
from foldopt._sparsity import Sparsity
from foldopt.checks import require_positive, require_whole
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver
from foldopt.solvers import scipy_nlp
from foldopt.solvers.multipliers import recover_multipliers
from foldopt.step import State, as_tuple
from foldopt.updates.programs import Bound, SmoothProgram, SQPData, SQPProgram, SQPState
from foldopt.updates.sparse_sqp import SparseSQP
from foldopt.updates.sqp import SQP

__all__ = ["ADMMLayer", "FDPGLayer", "NLPLayer", "Polyhedron", "f_fdpg", "f_pgd_a", "f_pgd_b", "f_sqp"]


def __dir__() -> list[str]:
    return __all__


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
    """f-SQP: any smooth program, solved by any black box and folded through one SQP step.

    The program is min f(x, c) subject to h(x, c) = 0, g(x, c) <= 0, convex or not. The state is the KKT point (x, nu,
    lam) of the Lagrangian f + nu'h + lam'g. At a KKT point a full SQP step has Phi = 0, so that the derivative costs
    one solve with the KKT matrix.

    Args:
        program: the program that SQP models, such as ``SmoothProgram(objective, equalities, inequalities)``.
        solve: ``solve(*params) -> (x, nu, lam)``, the solution (B, n) and its multipliers (B, p) and (B, m), lam >= 0.
        stepsize: alpha of eq. 32, above 0; default 1, the full step. The gradient does not depend on it.
        dtype: dtype of the computation; default float64. None keeps the dtype of the first floating parameter.
        degenerate: policy for samples whose solution has no derivative for the incoming gradient: "raise" (the default:
            `KinkError` at active constraints with a multiplier of zero, `NotUniqueError`, `SingularHessianError`,
            `DependentRowsError`), "warn" and go on as "one_sided", "one_sided" (the derivative of one of the smooth
            pieces that meet; of dependent active constraints only independent ones carry multipliers), "least_norm"
            (dependent ones share them), "nan" or "zero" (the gradient of that sample).
        on_failure: policy for samples that fail, as in `foldopt.fold`: "raise" (the default), "warn", "nan" or "zero".
        sparsity: for thousands of variables: True, or a `foldopt.Sparsity`, makes the KKT system sparse, as in
            `foldopt.updates.SparseSQP`. The program must be a `SmoothProgram` and the stepsize 1. True detects the
            places of the entries at the first call, by one product per variable and constraint. Needs scipy and qdldl
            (extra "qp"). Default False: dense.
        linear_solver: solver of the backward equation, as in `foldopt.fold`; default "auto".
        tol: largest accepted residual of the step, as in `foldopt.fold`; default 1e-6 in float64, otherwise 1e-3.
        modules: further modules whose weights the program uses, as in `foldopt.fold`.

    Returns:
        A layer, ``layer(*params) -> (x, nu, lam)``. After a backward pass ``layer.last.verdict`` has the verdict on
        each sample. At a vertex (as many active constraints as variables) the derivative with respect to the objective
        is zero. Active constraints that depend on each other matter only if the gradient of parameters in the
        constraints is asked for, or if their curvatures differ.

    Raises:
        InputError: an argument is invalid, or sparsity is used with a stepsize other than 1. When the layer is called
            it raises the errors of `foldopt.fold`.

    Source: paper, eqs. 31 and 32 and section 6; Nocedal and Wright, Numerical Optimization (2006), chapter 18.

    Examples:
        Minimize |x|^2 / 2 subject to x_1 + x_2 = c; the solution is x_1 = x_2 = c / 2, its multiplier -c / 2:

        >>> def objective(x, c):
        ...     return 0.5 * x.square().sum(1)
        >>> def equality(x, c):
        ...     return x.sum(1, keepdim=True) - c
        >>> program = foldopt.SmoothProgram(objective, equality)
        >>> layer = foldopt.f_sqp(program, lambda c: (torch.cat([c, c], 1) / 2, -c / 2, c[:, :0]))
        >>> c = torch.tensor([[4.0]], requires_grad=True)
        >>> x, nu, lam = layer(c)
        >>> x[:, 0].sum().backward()
        >>> c.grad
        tensor([[0.5000]])
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
    """Return the dense or the sparse SQP step."""
    if sparsity is False:
        return SQP(program, stepsize, degenerate, nan)
    if stepsize == 1:
        return SparseSQP(program, None if sparsity is True else sparsity, nan)
    raise InputError(f"stepsize={stepsize}: with sparsity= the step is a full one; use stepsize=1.")


class NLPLayer(LayerAround):
    """A batch of smooth programs, convex or not, as a differentiable layer.

    For every sample of a batch the layer finds a solution of

    ::

        minimize    f(x, c)
        subject to  g(x, c) <= 0,  h(x, c) = 0,  lower <= x <= upper

    with a solver of your choice, and folds one SQP step at the KKT point that the solver found. Call it as
    ``layer(*params)``; the result x has shape (B, n). If a program has several local minima, the derivative is that of
    the one that was found.

    The number of samples B follows from a rule. If `start` has shape (B, n), or is a function that returns that, B is
    its number of rows. With a start of shape (n,), B is the number of rows of the parameters that have two or more
    dimensions, which must agree. Parameters of no or one dimension are shared by all samples. If all parameters are
    shared matrices, give a start of shape (1, n).

    ``layer.last``, a `foldopt.FoldInfo`, holds the certificates of the last call, one per sample: ``status``
    ("solved", "infeasible", "unbounded", "not smooth", "no multipliers", "iteration limit", "time limit", "not finite",
    "no progress" or "step and solution disagree"), ``residual``, ``solved``, ``ok``, and after a backward pass
    ``verdict``. ``layer.multipliers`` holds the multipliers (nu, lam) of the last call; those of the bounds come last.

    Args:
        objective: f(x, *params) -> (B,), for x of shape (B, n). It must treat the samples independently. Functions that
            are not PyTorch code come in as a `foldopt.ExternalFunction`.
        inequalities: g(x, *params) -> (B, m), constraints g <= 0; default None: none.
        equalities: h(x, *params) -> (B, p), constraints h = 0; default None: none.
        lower: lower bounds of x, a tensor (n,) or (B, n), or a function of the parameters that returns one. An entry of
            -inf is no bound; default None: no lower bounds.
        upper: upper bounds of x, in the same form. An entry of inf is no bound; default None: no upper bounds. A
            variable with lower = upper in all samples becomes an equality.
        start: where the solver starts, a tensor (n,) or (B, n), or a function ``start(*params) -> (B, n)``. All solvers
            that are named need it; default None.
        solver: "sqp" (default; built in and batched, `foldopt.solvers.nlp.solve_nlp`), "slsqp" or "trust-constr"
            (SciPy), "ipopt" (cyipopt), or a function ``solver(*params) -> x`` or ``-> (x, nu, lam)`` with multipliers
            nu (B, p) of h and lam (B, m) >= 0 of g, those of bounds last. If a function returns only x, the multipliers
            are recovered by least squares. A function needs no `start` and keeps its own limits.
        tol: largest accepted change by one step, ||U(x*, c) - x*|| / (1 + ||x*||), of x and of the multipliers; default
            None: 1e-6 in float64, otherwise 1e-3. Named solvers stop at a ten-thousandth of it.
        max_iter: largest number of the solver's iterations for each sample; default None: the solver's own.
        time_limit: seconds after which the solver gives up, for the whole batch ("sqp") or for each sample (the other
            named solvers); default None: no limit.
        polish: number of SQP steps that are taken on the solver's answer, each of which squares its error; default 1. A
            sample that a step moves by more than 1e-3, relative to its size, is left as it was.
        dtype: dtype of the computation; default float64. None keeps the dtype of the first floating parameter, in which
            x comes back in any case.
        sparsity: for thousands of variables: True, or a `foldopt.Sparsity`, makes the KKT system of the derivative
            sparse. The solver must then be "ipopt" or a function, as the others work with dense matrices. True detects
            the places of the entries at the first call, by one product per variable and constraint. Needs scipy and
            qdldl (extra "qp"). Default False: dense.
        degenerate: policy for samples whose solution has no derivative for the incoming gradient: "raise" (the default:
            `KinkError` at active constraints with a multiplier of zero, `NotUniqueError`, `DependentRowsError`,
            `SingularHessianError`), "warn" and go on as "one_sided", "one_sided" (the derivative of one of the smooth
            pieces that meet; of dependent active constraints only independent ones carry multipliers), "least_norm"
            (dependent ones share them), "nan" or "zero" (the gradient of that sample).
        on_failure: policy for samples that are not solved: "raise" (the default), "warn", "nan" or "zero" (the gradient
            of that sample, without a message). "raise" raises the error of the first cause: `InfeasibleError`,
            `UnboundedError`, `NotSmoothError`, `NoMultipliersError`, `LimitError`, or `FixedPointError` where the
            solver's answer is no KKT point.
        linear_solver: solver of the backward equation, a name or an object of `foldopt.linear_solve`; default "auto".
        modules: further modules whose weights the functions use, beside the parameters; default: none.

    Raises:
        InputError: an argument is unknown or has a wrong shape, or, when the layer is called, the parameters disagree
            in their number of rows.
        MissingDependencyError: the package of the named solver is not installed; raised when the layer is called.

    Source: paper, eqs. 31 and 32 and section 6; Nocedal and Wright, Numerical Optimization (2006), chapter 18.

    Examples:
        Minimize c'x over the unit disc:

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
        """Solve the programs.

        Args:
            *params: parameters c of the functions.

        Returns:
            The solutions, (B, n).
        """
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
