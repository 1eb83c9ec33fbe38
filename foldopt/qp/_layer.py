"""Quadratic programs as a layer: the engine in front, a Newton step on the KKT conditions folded behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foldopt._certificates import FoldInfo
from foldopt._compat import untransformed
from foldopt._fold import Implicit
from foldopt._layer import FixedPointLayer
from foldopt.errors import InputError
from foldopt.linear_solve import LinearSolver
from foldopt.qp._arguments import NAMES, Given, arguments
from foldopt.qp._closest import shifted_to_feasible
from foldopt.qp._duals import Duals
from foldopt.qp._fold import QPFold
from foldopt.qp._structure import Structure
from foldopt.solvers.qp_solvers import QPSolver
from foldopt.updates.newton import KKTNewton

PATTERNS = 4  # sparsity patterns whose folded layers are kept


class QPLayer(nn.Module):
    """A batch of convex quadratic programs as a differentiable layer.

    For every sample of a batch the layer solves

        minimize    1/2 x'Qx + p'x
        subject to  Gx <= h,  Ax = b,  lower <= x <= upper

    and the result x is differentiable with respect to Q, p, G, h, A, b, lower and upper. Q = 0 gives a linear program.
    Call it as ``layer(Q, p, G, h, A, b, lower=lower, upper=upper)``, in the argument order of qpth's QPFunction.
    `forward` describes these arguments; each may lack the batch dimension, and the constraints may be left out.

    The solution is computed in float64. Newton steps polish it until the optimality (KKT) conditions hold to rounding,
    relative to the terms of each row and column, so that the result does not depend on the units of the rows, the
    variables and the objective. The layer then folds one Newton step on the KKT conditions. Its Jacobian Phi with
    respect to the solution is 0, so that the backward pass, v' (I - Phi) = g' and then v' Psi (equations 26 and 27),
    is one solve with the KKT matrix of the active constraints. Forward mode, second derivatives and the transforms of
    `torch.func` work as well.

    Two things may go wrong in a sample, and the layer checks both. The program may have no solution: see `on_failure`.
    Or it has one, but the derivative that the backward pass asks for does not exist: see `degenerate`. No sample
    changes the result of another. ``layer.last``, a `foldopt.FoldInfo`, has the certificates of the last call, one per
    sample: ``status`` ("solved", "infeasible", "unbounded", "nonconvex", "limit reached", "not finite"), ``residual``
    (the largest relative violation of the KKT conditions) and ``ok``; after a backward pass also ``verdict``
    ("differentiable", "kink", "not unique", "dependent rows", "not solved").

    Args:
        rho: without effect; passing a number gives a DeprecationWarning.
        degenerate: what the backward pass does in samples where g'x has no derivative, for the incoming gradient g.
            There are three causes: a constraint that is active but has the multiplier 0 (a kink), several solutions,
            and active constraints that depend linearly on each other. The choices are

            - "raise" (default): raise the error of the cause.
            - "warn": warn, and continue as "one_sided" does.
            - "one_sided": at a kink, use the derivative of one of the smooth pieces that meet there. Of dependent
              constraints, only some independent ones get a gradient.
            - "least_norm": the same at kinks. Dependent constraints share the gradient, which is exact for changes
              that keep them consistent.
            - "nan" or "zero": make the gradient of these samples NaN or zero.

            If there are several solutions, "one_sided" and "least_norm" use the part of g along which the solution is
            unique.
        on_failure: what to do with samples that are infeasible, unbounded or not convex, or that were not solved to
            tolerance. Their x is NaN. "raise" (default) raises the error of the cause, and "warn" warns. "nan"
            and "zero" make the gradient of these samples NaN or zero, without a warning.
        return_duals: whether to return ``(x, duals)`` instead of x, where duals is a `foldopt.qp.Duals` of multipliers,
            which are differentiable too. Default False.
        closest_feasible: None (default), "l1" or "l2". With a norm, samples without a feasible point are solved with
            the right-hand sides h and b moved by the smallest amount, in that norm, that makes the constraints
            consistent. The moves are differentiated too, and are afterwards in ``layer.shifts`` as a pair (of h (B, m),
            of b (B, k)). Bounds of the variables are not moved.
        solver: what finds the first point, which is then polished. None (default) takes foldopt's batched interior
            point for dense programs; sparse ones go to PIQP (linear ones to HiGHS), and to Clarabel where that fails.
            A string names an installed solver, see `foldopt.solvers.qp_solvers.installed`. A function is called for
            one sample at a time, as `foldopt.solvers.qp_solvers.QPSolver` describes.
        options: options of the solver that `solver` names, as a dict from its own names to values. Default None.
        warm_start: whether the solver starts at the solutions of the previous call if that had the same batch size and
            number of variables. Needs `solver`; OSQP, SCS, ProxQP and DAQP make use of it. Default False.
        linear_solver: solver of the backward equation, as in `foldopt.fold`. It changes nothing, because Phi = 0.
        dtype: torch.float64 or None, which mean the same: the layer always computes in float64.

    Raises:
        InputError: if an argument has a value that is not listed above, the solver or one of its options is unknown, or
            `warm_start` is set without a solver.
        MissingDependencyError: if the package of the named solver is not installed.
        SolverError: if the named solver cannot solve even a program of two variables, for want of a licence perhaps.

    Source: Amos and Kolter, OptNet (2017), for the problem and the order of the arguments; Kotary, Dinh and Fioretto,
    Backpropagation of unrolled solvers with folded optimization (2023), for the derivative; Bambade et al., Leveraging
    augmented-Lagrangian techniques for differentiating over infeasible quadratic programs in machine learning (2024),
    for `closest_feasible`.

    Examples:
        Minimize 1/2 |x|^2 - 3 x_1 - 2 x_2 subject to x_1 + x_2 <= 2, and ask how x_1 depends on p.

        >>> import torch
        >>> from foldopt import QPLayer
        >>> layer = QPLayer()
        >>> p = torch.tensor([[-3.0, -2.0]], requires_grad=True)
        >>> x = layer(torch.eye(2), p, torch.ones(1, 2), torch.tensor([2.0]))
        >>> x.detach()
        tensor([[1.5000, 0.5000]])
        >>> x[:, 0].sum().backward()
        >>> p.grad
        tensor([[-0.5000,  0.5000]])
        >>> layer.last.status, layer.last.verdict
        (('solved',), ('differentiable',))
    """

    def __init__(
        self,
        rho: float | None = None,
        *,
        degenerate: str = "raise",
        on_failure: str = "raise",
        return_duals: bool = False,
        closest_feasible: str | None = None,
        solver: str | Callable[..., Any] | None = None,
        options: dict[str, Any] | None = None,
        warm_start: bool = False,
        linear_solver: str | LinearSolver = "auto",
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        super().__init__()
        if dtype not in (None, torch.float64):
            raise InputError(
                f"dtype={dtype}: QPLayer computes in torch.float64 and answers in your dtype; leave it out."
            )
        if rho is not None:
            warnings.warn(
                "QPLayer has no penalty parameter any more: rho has no effect; leave it out.",
                DeprecationWarning,
                stacklevel=2,
            )
        if closest_feasible not in (None, "l1", "l2"):
            raise InputError(f"closest_feasible={closest_feasible!r} is unknown; choose None, 'l1' or 'l2'.")
        self.update = KKTNewton(degenerate, "nan" in (degenerate, on_failure))
        self.solver = QPSolver(solver, options) if solver is not None or options is not None else None
        self.warm_start = warm_start
        if warm_start and self.solver is None:
            raise InputError(
                "warm_start=True needs solver=, such as 'osqp': the default solvers take no starting point."
            )
        derivative = Implicit(linear_solver, degenerate)
        self.fold = QPFold(self.update, derivative, on_failure, self.solver, warm_start)
        self._sparse: list[QPFold] = []
        self._latest = [self.fold]
        self.return_duals, self.closest_feasible = return_duals, closest_feasible
        self.shifts: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shifts": None, "_sparse": [], "_latest": [self.fold]}

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call, a `foldopt.FoldInfo`; None before the first call."""
        return self._latest[0].last

    def folded(self, *args: Any) -> FixedPointLayer:
        """Return the folded layer that a call with these arguments uses.

        Dense programs share one layer, ``layer.fold``; every sparsity pattern has its own. `foldopt.check` calls this.

        Args:
            *args: Q, p, G, h, A, b, lower and upper as for `forward`, by position; those at the end may be left out.

        Returns:
            The `foldopt.FixedPointLayer` of the state (x, multipliers).

        Raises:
            InputError: if an argument does not fit; see `forward`.
        """
        return self._fold_for(arguments(*args, *[None] * (len(NAMES) - len(args))))

    def _fold_for(self, given: Given) -> QPFold:
        """Return the folded layer of the arguments' sparsity patterns; the `PATTERNS` latest ones are kept."""
        if given.patterns is None:
            return self.fold
        with untransformed():
            for fold in self._sparse:
                if fold.newton.structure is not None and fold.newton.structure.suits(*given.patterns):
                    return fold
            structure = Structure(*given.patterns)
        derivative = self.fold.derivative
        newton = KKTNewton(derivative.degenerate, self.update.nan, structure)
        fold = QPFold(newton, derivative, self.fold.on_failure, self.solver, self.warm_start)
        self._sparse = [fold, *self._sparse[: PATTERNS - 1]]
        return fold

    def forward(
        self,
        Q: Any,
        p: Tensor,
        G: Any = None,
        h: Tensor | None = None,
        A: Any = None,
        b: Tensor | None = None,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Duals]:
        """Solve the programs.

        n is the number of variables, m that of inequalities and k that of equalities. Tensors, NumPy arrays and nested
        lists of real numbers are accepted; integers are converted. An argument without the batch dimension is shared
        by the whole batch, and its gradient is the sum over the samples.

        Q, G and A may also be sparse: a torch tensor in COO, CSR or CSC layout, a SciPy matrix (a constant), or a
        `foldopt.qp.SparseMatrix`. This needs the extra "qp". If one of the three is sparse, none is made dense, and
        gradients come on the given entries, in the layout of the argument.

        Args:
            Q: (n, n) or (B, n, n), positive semidefinite. Only its symmetric part counts.
            p: (n,) or (B, n), the linear cost.
            G: (m, n) or (B, m, n). None or empty: no inequalities.
            h: (m,) or (B, m). An infinite entry means that the row has no bound.
            A: (k, n) or (B, k, n). None or empty: no equalities. Dependent rows are allowed if they are consistent.
            b: (k,) or (B, k).
            lower: lower bounds of the variables: a number, (n,) or (B, n). -inf or None: no bound.
            upper: upper bounds of the variables: a number, (n,) or (B, n). inf or None: no bound.

        Returns:
            x (B, n), or ``(x, duals)`` if the layer was made with return_duals=True. B is 1 if no argument has a batch
            dimension. The dtype is that of the first floating-point argument.

        Raises:
            InputError: if a shape, dtype or device does not fit, or an argument holds NaN (or inf, except in h, lower
                and upper). The message names the argument.
            InfeasibleError: if no point satisfies the constraints of some sample and on_failure="raise".
            UnboundedError: if the objective of some sample has no lower bound and on_failure="raise".
            NonconvexError: if Q has negative curvature in some sample and on_failure="raise".
            LimitError: if a sample was not solved to tolerance and on_failure="raise".
            KinkError: in the backward pass, if degenerate="raise" and the derivative is different on the two sides.
            NotUniqueError: in the backward pass, if degenerate="raise" and several solutions disagree.
            DependentRowsError: in the backward pass, if degenerate="raise" and active constraints depend on each other.
        """
        given = arguments(Q, p, G, h, A, b, lower, upper)
        params, answer, fold = given.params, given.dtype, self._fold_for(given)
        fold.call.curvature = given.curvature
        if self.closest_feasible is not None:
            patterns = (None, None, None) if given.patterns is None else given.patterns[:3]
            params, self.shifts = shifted_to_feasible(params, patterns, self.closest_feasible, QPLayer)
        self._latest[0] = fold
        x, y = fold(*params)
        if not self.return_duals:
            return x.to(answer)
        y = y.to(answer)
        k, m = params[5].shape[-1], params[3].shape[-1]
        bounds = y[:, k + m :] if y.shape[1] > k + m else torch.zeros_like(x, dtype=answer)
        return x.to(answer), Duals(y[:, :k], y[:, k : k + m], bounds)
