"""Checks that a layer can be made of a CVXPY problem; each error names the culprit and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import cvxpy as cp
from cvxpy.utilities import scopes

from foldopt.errors import InputError


def require_problem(problem: Any, parameters: Sequence[Any], outputs: Sequence[Any], gp: bool, quadratic: bool) -> None:
    """Raise InputError unless problem, parameters and outputs make a differentiable layer."""
    if not isinstance(problem, cp.Problem):
        raise InputError(f"problem is a {type(problem).__name__}, expected a cvxpy.Problem.")
    _require_parameters(problem, parameters)
    _require_outputs(problem, outputs)
    _require_real(problem)
    _require_convex(problem, gp)
    _require_parametrized(problem, gp, quadratic)


def dual_variables(problem: Any, constraints: Sequence[Any]) -> list[Any]:
    """Return the dual variables of constraints of a problem; raises InputError if it does not have them."""
    known = {c.id for c in problem.constraints}
    for i, constraint in enumerate(constraints):
        if getattr(constraint, "id", None) not in known:
            raise InputError(
                f"dual[{i}] is {constraint}, which is not one of the problem's constraints; choose from "
                "problem.constraints."
            )
    return [variable for constraint in constraints for variable in constraint.dual_variables]


def _require_parameters(problem: Any, parameters: Sequence[Any]) -> None:
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, cp.Parameter):
            raise InputError(f"parameters[{i}] is a {type(parameter).__name__}, expected a cvxpy.Parameter.")
    known, given = {p.id: p for p in problem.parameters()}, {p.id: p for p in parameters}
    if len(given) < len(parameters):
        raise InputError("parameters= has a parameter twice; list each once, in the order of the layer's arguments.")
    if lacking := [p.name() for i, p in known.items() if i not in given]:
        raise InputError(f"parameters= lacks {', '.join(lacking)}; list every parameter of the problem.")
    if unknown := [p.name() for i, p in given.items() if i not in known]:
        raise InputError(f"parameters= has {', '.join(unknown)}, which the problem does not use; leave them out.")


def _require_outputs(problem: Any, outputs: Sequence[Any]) -> None:
    known = {v.id for v in problem.variables()} | {d.id for c in problem.constraints for d in c.dual_variables}
    if not outputs:
        raise InputError("variables= is empty; list at least one variable, whose value the layer returns.")
    for i, variable in enumerate(outputs):
        if not isinstance(variable, cp.Variable):
            raise InputError(f"variables[{i}] is a {type(variable).__name__}, expected a cvxpy.Variable.")
        if variable.id not in known:
            raise InputError(
                f"variables= has {variable.name()}, which is neither a variable of the problem nor a dual variable of "
                "one of its constraints; leave it out."
            )


def _require_real(problem: Any) -> None:
    discrete = [v.name() for v in problem.variables() if v.attributes["boolean"] or v.attributes["integer"]]
    if discrete:
        raise InputError(
            f"variables {', '.join(discrete)} are integer: they are piecewise constant in the parameters, and their "
            "derivative is 0 or does not exist. Relax them (bounds instead of boolean=True or integer=True)."
        )
    if complex_ := [leaf.name() for leaf in (*problem.variables(), *problem.parameters()) if leaf.is_complex()]:
        raise InputError(
            f"{', '.join(complex_)} are complex, but a layer takes and returns real numbers: make the real and the "
            "imaginary part variables or parameters of their own."
        )


def _require_convex(problem: Any, gp: bool) -> None:
    if gp and not problem.is_dgp():
        raise InputError(
            f"the problem is not a geometric program (DGP) because of {_first(problem, 'is_dgp')}; with gp=True all "
            "variables and parameters have to be declared pos=True, and the functions have to be log-log convex."
        )
    if gp or problem.is_dcp():
        return
    if problem.is_dgp():
        raise InputError("the problem is not convex (DCP) but it is a geometric program: pass gp=True.")
    if problem.is_dqcp():
        raise InputError(
            "the problem is quasiconvex (DQCP): CVXPY solves it by bisection, and there is no single convex program to "
            "differentiate. Bound the quasiconvex part by a parameter and make a layer of that problem."
        )
    raise InputError(
        f"the problem is not convex (DCP) because of {_first(problem, 'is_dcp')}; see CVXPY's rules of disciplined "
        "convex programming, or use foldopt.NLPLayer for programs that are not convex."
    )


def _require_parametrized(problem: Any, gp: bool, quadratic: bool) -> None:
    rule = "dgp" if gp else "dcp"
    scope = scopes.quad_form_dpp_scope() if quadratic and not gp else contextlib.nullcontext()
    with scope:
        bad = [part for part in (problem.objective, *problem.constraints) if not part.is_dpp(rule)]
    if bad:
        raise InputError(
            f"the problem is not DPP because of {bad[0]}: its data are not affine in the parameters (a product of "
            "parameters, or a parameter inside a nonlinear function). Make the nonlinear expression a parameter of its "
            "own and compute its value with torch."
        )


def _first(problem: Any, rule: str) -> str:
    parts = (problem.objective, *problem.constraints)
    return next((str(part) for part in parts if not getattr(part, rule)()), str(problem.objective))
