"""A CVXPY problem as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foldopt._certificates import POLICIES, FoldInfo
from foldopt._layer import FixedPointLayer
from foldopt.errors import InputError, MissingDependencyError
from foldopt.verdicts import require_policy

LARGEST_QP = 300  # largest n + m for which quadratic programs may go to the engine of `QPLayer`


class CvxpyLayer(nn.Module):
    """A convex CVXPY problem as a differentiable layer of its parameters.

    The layer takes one tensor for each parameter of the problem, solves the problem for every sample of the batch and
    returns the values of the chosen variables. Construction and call are those of
    ``cvxpylayers.torch.CvxpyLayer``: ``CvxpyLayer(problem, parameters=[A, b], variables=[x])(A_tensor, b_tensor)``
    returns ``(x_tensor,)``. `forward` describes shapes and batches.

    The problem is brought once into the conic form

        minimize    1/2 x'Px + q'x
        subject to  Ax + s = b,  s in K

    where K is a product of zero, nonnegative, second-order, semidefinite, exponential and power cones and the entries
    of P, q, A and b are affine functions of the parameters. A solver finds a solution in float64, Newton steps polish
    it, and the layer folds one Newton step on the optimality conditions. The Jacobian Phi of that step with respect to
    the solution is 0, so that the backward pass (equations 26 and 27) is one linear solve. Derivatives of the first
    and second order, in forward and reverse mode, are available.

    Two things may go wrong in a sample, and the layer checks both. The problem may have no solution: see `on_failure`.
    Or it has one, but the derivative that the backward pass asks for does not exist: see `degenerate`. No sample
    changes the result of another. ``layer.last``, a `foldopt.FoldInfo`, has the certificates of the last call, one per
    sample: ``status`` ("solved", "infeasible", "unbounded", "nonconvex", "limit reached", or the error of the solver),
    ``residual`` (the largest relative violation of the optimality conditions) and ``ok``; after a backward pass also
    ``verdict`` ("differentiable", "kink", "not unique", "dependent rows", "not solved").

    This class needs the extra "cvxpy": ``pip install 'foldopt[cvxpy]'``.

    Args:
        problem: a ``cvxpy.Problem`` that follows the rules of disciplined convex programming (DCP, or DGP with
            gp=True) and of disciplined parametrized programming (DPP: the data depend on the parameters in an affine
            way; see ``problem.is_dpp()``). Its variables are real and continuous.
        parameters: all parameters of the problem, in the order in which the layer takes their tensors.
        variables: the variables to return, in this order. Dual variables such as ``constraint.dual_variables[0]`` may
            be among them.
        solver: what finds the solution that is then polished. None (default) takes Clarabel; small problems with linear
            constraints only that Clarabel does not solve go to the engine of `foldopt.QPLayer`. The name of a
            solver that CVXPY has installed, such as "SCS" or "MOSEK", takes that one. "foldopt" takes foldopt's batched
            interior point, for small problems with linear and second-order cones; it runs on the device of the
            parameters.
        gp: whether the problem is a geometric program. Default False.
        dual: constraints of the problem whose dual values are returned after the variables, with the signs of CVXPY's
            ``constraint.dual_value``. A constraint with several dual variables (SOC, ExpCone) gives one output each.
        degenerate: what the backward pass does in samples where g'x has no derivative, for the incoming gradient g. The
            causes are a kink, several solutions, and active constraints that depend linearly on each other. "raise"
            (default) raises the error of the cause. "warn" warns and continues as "one_sided" does. "one_sided" and
            "least_norm" use the derivative of one of the smooth pieces that meet at a kink, and the part of g along
            which the solution is unique; dependent constraints share the gradient. "nan" and "zero" make the gradient
            of these samples NaN or zero.
        on_failure: what to do with samples that are infeasible, unbounded or not solved to tolerance. Their outputs
            are NaN. "raise" (default) raises the error of the cause, and "warn" warns. "nan" and "zero" make the
            gradient of these samples NaN or zero, without a warning.
        warm_start: whether to start at the solutions of the previous call if that had the same batch size. Newton steps
            are tried from there, and the solver is only called for samples where they fail. Default False.
        options: options of the solver, as a dict from its own names to values. Default None. They replace the tight
            tolerances that SCS and OSQP get otherwise; "foldopt" knows "tol" and "max_iter".
        quadratic: whether a quadratic objective keeps its matrix P. False turns it into a second-order cone, for
            solvers without quadratic objectives and for parametrized quadratic forms whose matrix does not fit into
            memory. Default True.
        solver_args: another name of `options`, for code written for cvxpylayers. `options` wins where both have a key.
        canon_backend: name of CVXPY's canonicalization backend, see ``cvxpy.Problem.get_problem_data``; default None.

    Raises:
        InputError: if the problem is not convex, not DPP, integer or complex, if parameters or variables do not belong
            to it, or if the solver, one of its options or a policy is unknown. The message names the culprit.
        MissingDependencyError: if cvxpy is not installed.

    Source: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers (2019), for the
    parametrized conic form; Ali, Wong and Kolter, A semismooth Newton method for fast, generic convex programming
    (2017), for the step; Kotary, Dinh and Fioretto, Backpropagation of unrolled solvers with folded optimization
    (2023), for the derivative.

    Examples:
        The point of the line x_1 + x_2 = 1, x >= 0 that is nearest to c:

        >>> import cvxpy as cp
        >>> import torch
        >>> from foldopt import CvxpyLayer
        >>> x, c = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.sum(x) == 1, x >= 0])
        >>> layer = CvxpyLayer(problem, parameters=[c], variables=[x])
        >>> c_tensor = torch.tensor([[1.0, 0.5]], requires_grad=True)
        >>> (solution,) = layer(c_tensor)
        >>> solution.detach()
        tensor([[0.7500, 0.2500]])
        >>> solution[:, 0].sum().backward()
        >>> c_tensor.grad
        tensor([[ 0.5000, -0.5000]])
        >>> layer.last.status, layer.last.verdict
        (('solved',), ('differentiable',))
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: str | None = None,
        gp: bool = False,
        *,
        dual: Sequence[Any] = (),
        degenerate: str = "raise",
        on_failure: str = "raise",
        warm_start: bool = False,
        options: dict[str, Any] | None = None,
        quadratic: bool = True,
        solver_args: dict[str, Any] | None = None,
        canon_backend: str | None = None,
    ) -> None:
        super().__init__()
        try:
            import cvxpy  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "cvxpy is not installed; install it with: pip install 'foldopt[cvxpy]'"
            ) from error
        from foldopt._conic.form import Form
        from foldopt.cvxpy._canonical import canonicalize
        from foldopt.cvxpy._checks import dual_variables, require_problem
        from foldopt.cvxpy._engine import ConicEngine, Front, OwnInteriorPoint, OwnQP
        from foldopt.cvxpy._solver import Clarabel, ConeSolver

        require_policy(degenerate)
        if on_failure not in POLICIES:
            raise InputError(f"on_failure={on_failure!r} is unknown; choose one of {POLICIES}.")
        outputs = [*variables, *dual_variables(problem, dual)]
        require_problem(problem, parameters, outputs, gp, quadratic)
        canonical = canonicalize(problem, parameters, outputs, gp=gp, quadratic=quadratic, canon_backend=canon_backend)
        self.inputs, self.outputs = canonical.inputs, canonical.outputs
        self._entries = [torch.as_tensor(one.index) for one in self.inputs]
        self._index = [torch.as_tensor(one.index) for one in self.outputs]
        self._scale = [torch.as_tensor(one.scale) for one in self.outputs]
        pattern = canonical.pattern
        form = Form(**vars(pattern))
        name, given = solver or "CLARABEL", {**(solver_args or {}), **(options or {})}
        fronts: list[Front] = [
            OwnInteriorPoint(form, given)
            if name == "foldopt"
            else (Clarabel if name == "CLARABEL" else ConeSolver)(canonical, name, given)
        ]
        if solver is None and pattern.linear and pattern.n + pattern.m <= LARGEST_QP:
            fronts.append(OwnQP(form))
        read = torch.zeros(pattern.n + 1, dtype=torch.bool)
        for one, index in zip(self.outputs, self._index, strict=True):
            if not one.dual:
                read[index.flatten()] = True
        self.engine = ConicEngine(canonical, form, fronts, read[1:], warm_start, degenerate, on_failure)

    def folded(self, *params: Tensor) -> FixedPointLayer:
        """Return the folded layer that calls use. `foldopt.check` calls this.

        Args:
            *params: the tensors of a call; they make no difference here.

        Returns:
            The `foldopt.FixedPointLayer` of the state (x, multipliers) of the conic form.
        """
        return self.engine

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call, a `foldopt.FoldInfo`; None before the first call."""
        return self.engine.last

    def forward(self, *params: Tensor) -> tuple[Tensor, ...]:
        """Solve the problem.

        A tensor of its parameter's shape is shared by the whole batch, and its gradient is the sum over the samples.
        The computation is in float64, on the CPU unless solver="foldopt". A symmetric or semidefinite parameter gets a
        symmetric gradient.

        Args:
            *params: one tensor per parameter, in the order of `parameters`; of its shape, or of this shape with a batch
                dimension in front, (B, ...). All batches have the same size. The values have to be what the parameter
                was declared to be (nonneg, symmetric, PSD, and so on).

        Returns:
            A tuple of the values of the variables and then of the duals; each of the variable's shape, with a batch
            dimension in front if any tensor has one. They have the dtype and device of the first floating-point tensor.

        Raises:
            InputError: if the number of tensors, a shape, a dtype or a value does not fit. The message names the
                parameter.
            InfeasibleError: if the problem of some sample has no feasible point and on_failure="raise".
            UnboundedError: if the objective of some sample has no bound and on_failure="raise".
            NonconvexError: if the quadratic objective of some sample is not convex and on_failure="raise".
            LimitError: if some sample was not solved to tolerance and on_failure="raise".
            KinkError: in the backward pass, if degenerate="raise" and the derivative is different on the two sides.
            NotUniqueError: in the backward pass, if degenerate="raise" and several solutions disagree.
            DependentRowsError: in the backward pass, if degenerate="raise" and active constraints depend on each other.
        """
        from foldopt.cvxpy._values import lowered

        entries, batched = lowered(self.inputs, self._entries, params)
        if params:
            self.engine.call.device = params[0].device
        x, y = self.engine(*entries)
        like = next((p for p in params if p.is_floating_point()), None)
        found = []
        for one, index, scale in zip(self.outputs, self._index, self._scale, strict=True):
            source = y if one.dual else x
            value = scale * torch.cat([torch.zeros_like(source[:, :1]), source], 1)[:, index]
            value = value.exp() if one.exponential else value
            value = value if batched else value[0]
            found.append(value if like is None else value.to(like.device, like.dtype))
        return tuple(found)
