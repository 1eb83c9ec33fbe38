"""The canonical form of a CVXPY problem, whose data are an affine function of the parameters.

    minimize 1/2 x'Px + q'x + r   subject to   Ax + s = b,   s in K

For a disciplined parametrized program the entries theta = (P, q, A, b) on fixed sparsity patterns are
M @ [parameters; 1] (Agrawal et al., Differentiable convex optimization layers, 2019). Canonicalization happens once per
layer. Only this module and `foldopt.cvxpy._solver` use names of CVXPY that are not public;
tests/foldopt/cvxpy/test_internals.py lists them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints import SOC, ExpCone, PowCone3D, SvecPSD
from cvxpy.reductions.cvx_attr2constr import lower_value, recover_value_for_leaf
from cvxpy.reductions.solution import Solution
from cvxpy.reductions.solvers.conic_solvers.conic_solver import ConicSolver
from cvxpy.utilities import scopes
from cvxpy.utilities.psd_utils import TriangleKind

from foldopt.errors import InputError

Array = np.ndarray[Any, Any]


class Target(ConicSolver):
    """Pretends to be a solver, so that CVXPY canonicalizes for our form whatever solvers are installed."""

    MIP_CAPABLE, BOUNDED_VARIABLES = False, False
    SUPPORTED_CONSTRAINTS: Any = [*ConicSolver.SUPPORTED_CONSTRAINTS, SOC, ExpCone, PowCone3D, SvecPSD]  # noqa: RUF012
    EXP_CONE_ORDER: Any = [0, 1, 2]  # noqa: RUF012
    PSD_TRIANGLE_KIND: Any = TriangleKind.UPPER
    PSD_SQRT2_SCALING: Any = True

    def __init__(self, quadratic: bool = True) -> None:
        self.quadratic = quadratic

    def name(self) -> str:
        """Return the name under which CVXPY knows this form."""
        return "FOLDOPT"

    def import_solver(self) -> None:
        """Do nothing."""

    def supports_quad_obj(self) -> bool:
        """Return whether a quadratic objective keeps its matrix P instead of becoming a second-order cone."""
        return self.quadratic

    def apply(self, problem: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the program with unsorted rows; CVXPY's formatting needs memory of n times the parameters' size."""
        return {"param_prob": problem}, {}

    def solve_via_data(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError: nothing is solved here."""
        raise NotImplementedError("Target describes a canonical form; it does not solve programs.")

    def invert(self, solution: Any, inverse_data: Any) -> Any:
        """Return the `Solution` unchanged; its duals are already sorted by constraint."""
        return solution

    def cite(self, data: Any) -> str:
        """Return no citation."""
        return ""


@dataclass(frozen=True)
class Pattern:
    """Sparsity patterns of P (n, n), symmetric and in full, and A (m, n), by columns, and the sizes of the cones.

    P_rows, A_rows: the rows of the entries. P_ptr, A_ptr: (n + 1,), where each column starts. cones: as the `dims` of
    `foldopt.cones.ProductCone`.
    """

    n: int
    m: int
    P_rows: Array
    P_ptr: Array
    A_rows: Array
    A_ptr: Array
    cones: dict[str, Any]

    @property
    def linear(self) -> bool:
        """Whether all constraints are linear, so that the program is a quadratic program."""
        return self.cones["zero"] + self.cones["nonneg"] == self.m


@dataclass(frozen=True)
class Input:
    """How a parameter enters the map M: ``values.flatten()[index]`` belong to its columns from `column` on.

    index: indices into the parameter's entries in C order. logged: whether the program depends on the logarithm
    (geometric programs). symmetric: whether only the symmetric part counts. attributes: the properties that the
    parameter was declared to have.
    """

    name: str
    shape: tuple[int, ...]
    attributes: tuple[str, ...]
    column: int
    index: Array
    logged: bool
    symmetric: bool


@dataclass(frozen=True)
class Output:
    """How an output is computed: ``scale * [0; values][index]``, in the shape of `index`.

    dual: whether the values are the multipliers y (m,) and not x (n,). exponential: whether the exponential is taken
    afterwards (geometric programs). label: its name in messages.
    """

    label: str
    index: Array
    scale: Array
    dual: bool
    exponential: bool


@dataclass(frozen=True)
class Canonical:
    """A problem in canonical form.

    M: CSR (size of theta, width), the affine map from parameters to theta = (P, q, A, b); its last column is the
    constant part. program: CVXPY's parametrized program, for the interfaces of solvers. rows: (m,), for each row the
    number of the user's constraint that it comes from, or -1. constraints: the user's constraints in words.
    """

    pattern: Pattern
    M: sp.csr_array
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    program: Any
    rows: Array
    constraints: tuple[str, ...]

    def row_name(self, row: int) -> str:
        """Return the name of a row of A in messages."""
        number = int(self.rows[row])
        return f"a row of the constraint {self.constraints[number]}" if number >= 0 else "a row that CVXPY added"


def canonicalize(
    problem: Any,
    parameters: Sequence[Any],
    outputs: Sequence[Any],
    *,
    gp: bool = False,
    quadratic: bool = True,
    canon_backend: str | None = None,
) -> Canonical:
    """Return the canonical form of a problem that `foldopt.cvxpy._checks` has accepted.

    outputs: variables, and dual variables of the problem's constraints. Raises InputError for outputs that the
    canonical form does not determine.
    """
    with scopes.quad_form_dpp_scope() if quadratic and not gp else contextlib.nullcontext():
        data, chain, inverse = problem.get_problem_data(
            Target(quadratic), gp=gp, enforce_dpp=True, canon_backend=canon_backend
        )
    program = data["param_prob"]
    pattern, M = _stuffed(program)
    duals = _Duals(problem, chain, inverse, program, pattern.m, gp)
    return Canonical(
        pattern,
        M,
        tuple(_input(p, program, chain, gp) for p in parameters),
        tuple(duals.output(v) if v.id in duals.owners else _variable(v, program, chain, gp) for v in outputs),
        program,
        duals.rows(),
        tuple(str(c) for c in problem.constraints),
    )


def _stuffed(program: Any) -> tuple[Pattern, sp.csr_array]:
    """Return the patterns and M of CVXPY's parametrized program, which stores [-A b] with unsorted rows."""
    n, width = program.x.size, program.total_param_size + 1
    P, A = program.reduced_P, program.reduced_A
    P.cache()
    A.cache()
    none = np.zeros(0, dtype=int), np.zeros(n + 2, dtype=int), (0, 0)
    P_rows, P_ptr, _ = (none[0], none[1][:-1], None) if P.reduced_mat is None else P.problem_data_index or none
    P_map = sp.csr_array((0, width)) if not len(P_rows) else sp.csr_array(P.reduced_mat)
    rows, ptr, (m, _) = A.problem_data_index or none
    A_map = sp.csr_array(A.reduced_mat) if len(rows) else sp.csr_array((0, width))
    to, sign = _sorted_rows(program.constraints)
    columns = np.repeat(np.arange(n + 1), np.diff(ptr))
    order = np.lexsort((to[rows], columns))
    if len(rows):
        A_map = sp.csr_array(sp.diags_array(sign[rows[order]]) @ A_map[order])
    rows, split = to[rows[order]], ptr[-2]
    place = sp.csr_array(
        (np.ones(len(rows) - split), (rows[split:], np.arange(len(rows) - split))), (m, len(rows) - split)
    )
    M = sp.vstack([P_map, sp.csr_array(program.q)[:-1], -A_map[:split], place @ A_map[split:]], format="csr")
    dims = program.cone_dims
    cones = {"zero": dims.zero, "nonneg": dims.nonneg, "soc": list(dims.soc), "psd": list(dims.psd)}
    cones |= {"exp": dims.exp, "pow": [float(alpha) for alpha in dims.p3d]}
    return Pattern(n, m, P_rows, np.asarray(P_ptr[: n + 1]), rows[:split], ptr[:-1], cones), M


def _sorted_rows(constraints: Sequence[Any]) -> tuple[Array, Array]:
    """Return the row of Ax + s = b, s in K, to which each row of CVXPY's matrix belongs, and its sign.

    CVXPY stacks a second-order cone constraint as all t, then all z; exponential and power cone constraints as all x,
    then all y, then all z.
    """
    to, sign, at = [np.zeros(0, dtype=int)], [np.zeros(0)], 0
    for constraint in constraints:
        size = sum(argument.size for argument in constraint.args)
        rows = np.arange(size)
        if isinstance(constraint, SOC):
            k = constraint.args[0].size
            d = size // k
            rows = np.concatenate([np.arange(k) * d, (np.arange(k)[:, None] * d + np.arange(1, d)).ravel()])
        elif isinstance(constraint, ExpCone | PowCone3D):
            rows = np.arange(size).reshape(-1, 3).T.ravel()
        to.append(at + rows)
        sign.append(np.full(size, -1.0 if isinstance(constraint, cp.constraints.Zero) else 1.0))
        at += size
    return np.concatenate(to), np.concatenate(sign)


def _input(parameter: Any, program: Any, chain: Any, gp: bool) -> Input:
    final = next(iter(chain.compose_param_id_map().get(parameter.id, [parameter.id])))
    index = np.arange(parameter.size).reshape(parameter.shape)
    if program.param_id_to_size[final] != parameter.size:  # symmetric, PSD, diagonal, sparse: a shorter vector
        lowered: Any = lower_value(parameter, index.astype(float))
        index = np.asarray(lowered.toarray() if sp.issparse(lowered) else lowered)
    named = [name for name, value in parameter.attributes.items() if value is True]
    return Input(
        parameter.name(),
        tuple(parameter.shape),
        tuple(named),
        program.param_id_to_col[final],
        index.flatten(order="F").astype(int),
        gp and parameter.id in chain.get(cp.reductions.Dgp2Dcp).param_id_map,
        any(name in named for name in ("symmetric", "PSD", "NSD", "hermitian")),
    )


def _variable(variable: Any, program: Any, chain: Any, gp: bool) -> Output:
    final = next(iter(chain.compose_var_id_map().get(variable.id, [variable.id])))
    if final not in program.var_id_to_col:
        raise InputError(
            f"variables= has {variable.name()}, on which neither the objective nor a constraint depends; leave it out."
        )
    start, size = program.var_id_to_col[final], program.id_to_var[final].size
    index = start + 1 + np.arange(variable.size).reshape(variable.shape, order="F")
    if size != variable.size:  # symmetric, diagonal, sparse: index 0 stands for an entry that is always zero
        coded: Any = recover_value_for_leaf(variable, np.arange(1.0, size + 1), project=False)
        coded = np.asarray(coded.toarray() if sp.issparse(coded) else coded).round().astype(int)
        index = np.where(coded > 0, coded + start, 0)
    return Output(variable.name(), index, np.ones(index.shape), False, gp)


class _Duals:
    """Finds which multipliers of the canonical form are the dual values of the user's constraints.

    The numbers 1 to m are sent as multipliers through CVXPY's inverse reductions. Each dual value then is one of these
    numbers with a sign, or divided by sqrt(2) off the diagonal of a semidefinite constraint.
    """

    def __init__(self, problem: Any, chain: Any, inverse: Any, program: Any, m: int, gp: bool) -> None:
        self.problem, self.chain, self.inverse, self.program, self.m, self.gp = problem, chain, inverse, program, m, gp
        self.owners = {d.id: c for c in problem.constraints for d in c.dual_variables}
        self.coded = {} if gp else self._sent(np.arange(1.0, m + 1))

    def _sent(self, y: Array) -> dict[int, Array]:
        """Return the values that CVXPY gives the dual variables for multipliers y, by the variables' ids."""
        at, parts = 0, {}
        for constraint in self.program.constraints:
            size = sum(argument.size for argument in constraint.args)
            parts[constraint.id] = y[at : at + size] if size > 1 else y[at]
            at += size
        found = self.chain.invert(
            Solution(cp.OPTIMAL, 0.0, {self.program.x.id: np.zeros(self.program.x.size)}, parts, {}), self.inverse
        )
        values = {}
        for constraint in self.problem.constraints:
            if found.dual_vars is None or constraint.id not in found.dual_vars:
                continue
            kept = [d.value for d in constraint.dual_variables]
            constraint.save_dual_value(found.dual_vars[constraint.id])
            for variable, before in zip(constraint.dual_variables, kept, strict=True):
                values[variable.id] = np.asarray(variable.value, dtype=float)
                variable.save_value(before)
        return values

    def output(self, variable: Any) -> Output:
        """Return how the value of a dual variable is computed; raises InputError if CVXPY does not define it."""
        label = f"the dual of {self.owners[variable.id]}"
        if self.gp:
            raise InputError(
                f"{label} is not available: CVXPY defines no duals for geometric programs (gp=True). Leave it out."
            )
        if variable.id not in self.coded:
            raise InputError(f"{label} is not available: CVXPY does not compute it. Leave it out.")
        index, scale = _decoded(self.coded[variable.id])
        y = np.sin(np.arange(1.0, self.m + 1))
        again = self._sent(y)[variable.id]
        if not np.allclose(scale * np.concatenate([[0], y])[index], again, rtol=1e-12, atol=1e-12):
            raise InputError(
                f"{label} is not available: its entries are not multipliers of the canonical form. Leave it out."
            )
        return Output(label, index.reshape(variable.shape), scale.reshape(variable.shape), True, False)

    def rows(self) -> Array:
        """Return for each row the number of the user's constraint that it comes from, or -1."""
        out = np.full(self.m, -1)
        for number, constraint in enumerate(self.problem.constraints):
            for variable in constraint.dual_variables:
                index, _ = _decoded(self.coded.get(variable.id, np.zeros(0)))
                out[index[index > 0] - 1] = number
        return out


def _decoded(value: Array) -> tuple[Array, Array]:
    """Return index and scale with value = scale * index, where scale is 1, -1, or one of these over sqrt(2)."""
    size = np.abs(value)
    whole = np.abs(size - size.round()) <= 1e-9 * size
    index = np.where(whole, size, np.sqrt(2) * size).round().astype(int)
    return index, np.sign(value) * np.where(whole, 1.0, np.sqrt(0.5))
