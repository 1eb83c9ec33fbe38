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

LARGEST_QP = 300  # variables and rows up to which quadratic programs are solved as one dense batch


class CvxpyLayer(nn.Module):
    """A convex CVXPY problem as a layer of its parameters; called and batched as ``cvxpylayers.torch.CvxpyLayer``.

    ``CvxpyLayer(problem, parameters=[A, b], variables=[x])(A_tensor, b_tensor) -> (x_tensor,)``

    The problem is canonicalized once to min 1/2 x'Px + q'x, Ax + s = b, s in a product of zero, nonnegative, second-
    order, semidefinite, exponential and power cones, solved in float64, polished to rounding and differentiated by one
    Newton step on the optimality conditions: to second order, forward and reverse, certified per sample and cotangent.
    Agrawal, Amos, Barratt, Boyd, Diamond and Kolter, Differentiable convex optimization layers (2019).

    Args:
        problem: a ``cvxpy.Problem``, DCP and DPP (see ``problem.is_dpp()``), without integer and complex variables.
        parameters: all its parameters, in the order of the layer's arguments.
        variables: those of its variables to return; also dual variables, ``constraint.dual_variables[0]``.
        solver: name of a solver that CVXPY has installed, such as "CLARABEL", "SCS", "ECOS" or "MOSEK"; or "foldopt",
            a batched interior point of our own for small problems with linear and second-order cones, which runs where
            the parameters are, on a GPU too. None: Clarabel, and small problems with linear constraints that it does
            not solve by the engine of `QPLayer`.
        gp: whether the problem is a geometric program (DGP).
        dual: constraints of the problem whose dual values are returned too, after the variables, as CVXPY's
            ``constraint.dual_value`` has them; for a constraint with several dual variables (SOC, ExpCone), each.
        degenerate: what happens to samples that are solved but whose solution has no derivative that the incoming
            gradient asks for, as for `QPLayer`: "raise" (`KinkError`, `NotUniqueError`, `DependentRowsError`), "warn",
            "one_sided", "least_norm", "nan" or "zero".
        on_failure: what happens to samples that are infeasible, unbounded or not solved: "raise" (each cause its own
            error), "warn", or make their gradient "nan" or "zero"; their outputs are NaN then.
        warm_start: begin at the solutions of the last call of the same batch size; the solver is only asked where
            Newton steps from there fail.
        options: of the solver, by its own names.
        quadratic: False: canonicalize a quadratic objective to a second-order cone. For solvers without quadratic
            objectives, and for parametrized quadratic forms so large that their matrix does not fit in memory.
        solver_args, canon_backend: as for cvxpylayers; solver_args is another name of `options`.

    A tensor has its parameter's shape, or one dimension more, (B, ...): tensors without are shared by the batch and get
    the sum of its gradients. The outputs have a batch dimension if any tensor has one. They come back in the dtype and
    on the device of the first floating-point tensor; the computation is in float64, on the CPU but for the solver
    "foldopt". A symmetric or PSD
    parameter gets a symmetric gradient.

    ``layer.last`` holds the certificates per sample: ``status``, ``residual``, ``ok`` and after a backward pass
    ``verdict``. Needs the extra "cvxpy". Raises InputError for problems, parameters and values that do not fit.
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
        """Return the folded layer that calls use."""
        return self.engine

    @property
    def last(self) -> FoldInfo | None:
        """The certificates of the last call."""
        return self.engine.last

    def forward(self, *params: Tensor) -> tuple[Tensor, ...]:
        """Return the values of the variables, then of the duals; (B, ...) if any tensor has a batch, else (...)."""
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
