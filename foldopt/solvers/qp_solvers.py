"""Solvers of other packages for quadratic programs; one program at a time, as NumPy arrays and SciPy matrices.

PIQP (Schwan, Jiang, Kuhn and Jones, 2023), HiGHS (Huangfu and Hall, 2018) and Clarabel (Goulart and Chen, 2024) are
called directly, with bounds and two-sided rows if the solver has them. All others are called through the package
qpsolvers (Caron et al.).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

from foldopt.errors import FoldoptError, InputError, MissingDependencyError, SolverError
from foldopt.solvers._bounded import Answer, Bounded

__all__ = ["TIGHT", "QPSolver", "installed"]

LINEAR, QUADRATIC = ("highs", "clarabel"), ("piqp", "clarabel")  # the solvers that solver=None tries, in this order
PACKAGES = {"piqp": "piqp", "clarabel": "clarabel", "highs": "highspy"}  # of the solvers that are called directly
TIGHT: dict[str, dict[str, Any]] = {
    "piqp": {"eps_abs": 1e-12, "eps_rel": 1e-12},
    "clarabel": {"tol_feas": 1e-9, "tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "max_iter": 400},
    "highs": {
        "primal_feasibility_tolerance": 1e-9,
        "dual_feasibility_tolerance": 1e-9,
        "qp_regularization_value": 1e-10,
    },
    "osqp": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "raise_error": False},
    "scs": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000},
    "proxqp": {"eps_abs": 1e-9, "check_duality_gap": True, "eps_duality_gap_abs": 1e-9, "eps_duality_gap_rel": 0.0},
    "qpalm": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000},
    "daqp": {"primal_tol": 1e-9},
    "gurobi": {"FeasibilityTol": 1e-9, "OptimalityTol": 1e-9, "BarConvTol": 1e-10, "Threads": 1},
    "cvxopt": {"feastol": 1e-9, "abstol": 1e-9, "reltol": 1e-9, "maxiters": 200},
    "ecos": {"feastol": 1e-10, "abstol": 1e-10, "reltol": 1e-10, "max_iters": 200},
}
ENOUGH = 1e-9  # relative residuals that are accepted from PIQP though its tolerance is tighter
WARM = ("osqp", "scs", "proxqp", "daqp")  # the solvers of qpsolvers that can be given a starting point
CVXOPT_OPTIONS = ("abstol", "feastol", "kktreg", "maxiters", "refinement", "reltol")
GROUPS = ("open-source-solvers", "wheels-only")  # extras of qpsolvers that are groups of solvers
MAX_BYTES = 4 * 2**30  # largest dense matrices that are made of sparse ones for a solver without sparse matrices


class QPSolver:
    """A solver for one program min 1/2 x'Hx + q'x subject to lower <= Cx <= upper at a time, chosen by its name.

    `foldopt.QPLayer` makes one of its arguments `solver` and `options`. It keeps nothing between programs and can be
    pickled. A named solver is tried on a program of two variables when it is chosen, so that a missing licence or a
    wrong option is noticed before training.

    Args:
        solver: None, a name or a function. None (default) takes HiGHS for linear programs and PIQP for all others, with
            tight tolerances, and Clarabel if these fail. A name is one of those that `installed` lists; quadprog and
            ECOS need a positive definite H, CVXOPT independent equalities. A function is called as
            ``solver(H, q, C, lower, upper)`` with the arrays of `__call__` and returns x, or ``(x, y)`` with
            multipliers y (positive at upper, negative at lower, so that Hx + q + C'y = 0), or None if it finds no
            solution. If it returns x alone, the multipliers are taken to be 0.
        options: options of the named solver, as a dict from its own names to values. They replace the tight ones in
            `TIGHT`. Default None.

    Raises:
        InputError: if the name or an option is unknown, or options are given without a name.
        MissingDependencyError: if a package that the solver needs is not installed; the message says how to install it.
        SolverError: if the solver cannot solve a program of two variables, for want of a licence perhaps.

    Examples:
        >>> import numpy as np
        >>> from foldopt.solvers.qp_solvers import QPSolver
        >>> solver = QPSolver("piqp")
        >>> answer = solver(np.eye(2), np.array([-3.0, -2.0]), np.ones((1, 2)), np.array([-np.inf]), np.array([2.0]))
        >>> answer.x.round(6), answer.y.round(6)
        (array([1.5, 0.5]), array([1.5]))
    """

    def __init__(self, solver: str | Callable[..., Any] | None = None, options: dict[str, Any] | None = None) -> None:
        if options is not None and not (isinstance(options, dict) and all(isinstance(key, str) for key in options)):
            raise InputError(f"options={options!r}: expected a dict from names of options to values.")
        if options and not isinstance(solver, str):
            raise InputError(
                f"options={options}: they belong to a solver that is named, and solver={solver!r}. Name one, or bind "
                "them to your function with functools.partial."
            )
        self.solver, self.options = solver, dict(options or {})
        if isinstance(solver, str):
            _require_installed(solver)
            _require_working(solver, self.options)
        elif solver is None:
            for name in {*LINEAR, *QUADRATIC}:
                _require_installed(name)
        elif not callable(solver):
            raise InputError(f"solver={solver!r}: expected None, a name such as 'piqp', or a function.")

    @property
    def name(self) -> str:
        """The name of the solver or of the function; "default" for solver=None."""
        if self.solver is None:
            return "default"
        return self.solver if isinstance(self.solver, str) else getattr(self.solver, "__name__", repr(self.solver))

    def __call__(self, H: Any, q: Any, C: Any, lower: Any, upper: Any, start: Any = None) -> Answer | None:
        """Solve one program.

        An exception of a named solver becomes a RuntimeWarning, so that one program does not stop a batch. An exception
        of a function is raised.

        Args:
            H: (n, n), a NumPy array or SciPy matrix with both triangles; symmetric positive semidefinite, with entries
                of about 1.
            q: (n,).
            C: (r, n), a NumPy array or SciPy matrix without duplicate entries.
            lower: (r,). -inf: no bound.
            upper: (r,). inf: no bound. Equal to `lower` in an equality.
            start: (n,), where solvers that accept a starting point begin; None (default): anywhere.

        Returns:
            The answer with x, the multipliers y, and whether the solver reached its tolerance; None if it has no x.

        Raises:
            InputError: if a function returns arrays of the wrong shape, NaN or inf, or the program is too large for a
                solver of dense matrices.
        """
        if callable(self.solver):
            return _checked(self.name, self.solver(H, q, C, lower, upper), len(q), len(lower))
        program = Bounded(H, q, C, lower, upper)
        if not program.possible:
            return None
        chain = (self.solver,) if self.solver else LINEAR if program.linear else QUADRATIC
        best = None
        for name in chain:
            answer = _attempt(name, program, self.options, start)
            if answer is not None and answer.found:
                return answer
            if answer is not None and (best is None or program.residual(answer) < program.residual(best)):
                best = answer
        return best


def installed() -> list[str]:
    """Return the names of all installed solvers, including those that the package qpsolvers finds.

    Returns:
        The names in alphabetical order; each is a valid `solver` of `QPSolver` and of `foldopt.QPLayer`.

    Examples:
        >>> from foldopt.solvers.qp_solvers import installed
        >>> "piqp" in installed()
        True
    """
    direct = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package)}
    if not importlib.util.find_spec("qpsolvers"):
        return sorted(direct)
    import qpsolvers

    return sorted(direct.union(qpsolvers.available_solvers))


def _piqp(program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    import piqp

    p = program
    solver = piqp.SparseSolver() if p.sparse else piqp.DenseSolver()
    for name, value in options.items():
        setattr(solver.settings, name, value)
    solver.setup(p.H, p.q, p.A, p.b, p.G, p.below, p.above, p.low, p.high)
    status, result = solver.solve(), solver.result
    if status == piqp.PIQP_INVALID_SETTINGS:
        raise InputError(f"options={options}: solver='piqp' refuses them as invalid.")
    info = result.info
    close = max(info.primal_res_rel, info.dual_res_rel, info.duality_gap_rel) < ENOUGH
    found = status == piqp.PIQP_SOLVED or close
    return p.answer(result.x, result.y, result.z_u - result.z_l, result.z_bu - result.z_bl, found)


def _clarabel(program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    import clarabel
    import numpy as np
    import scipy.sparse as sp

    p = program
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name, value in options.items():
        setattr(settings, name, value)
    F, f, split = p.one_sided()
    rows = [sp.csc_matrix(part) for part in (p.A, F) if part is not None]
    k = len(p.b)
    cones = [clarabel.ZeroConeT(k), clarabel.NonnegativeConeT(0 if F is None else len(f))]
    solver = clarabel.DefaultSolver(
        sp.csc_matrix(p.H),
        p.q,
        sp.vstack(rows, format="csc") if rows else sp.csc_matrix((0, len(p.q))),
        np.concatenate([p.b, [] if F is None else f]),
        cones,
        settings,
    )
    result = solver.solve()
    z = np.array(result.z)
    return p.answer(result.x, z[:k], *split(z[k:]), result.status == clarabel.SolverStatus.Solved)


def _highs(program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    import highspy
    import numpy as np
    import scipy.sparse as sp

    p = program
    solver = highspy._core._Highs()  # the public class highspy.Highs prints a banner
    solver.setOptionValue("output_flag", False)
    for name, value in options.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise InputError(f"options={{{name!r}: {value!r}}}: solver='highs' has no such option or value.")
    model, rows = highspy.HighsModel(), [sp.csc_matrix(part) for part in (p.A, p.G) if part is not None]
    lp = model.lp_
    lp.num_col_, lp.num_row_ = len(p.q), sum(part.shape[0] for part in rows)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = p.q, p.low, p.high
    lp.row_lower_, lp.row_upper_ = np.concatenate([p.b, p.below]), np.concatenate([p.b, p.above])
    if rows:
        stacked = sp.vstack(rows, format="csc")
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = stacked.indptr, stacked.indices, stacked.data
    if not p.linear:
        half = sp.tril(p.H, format="csc")
        model.hessian_.dim_ = len(p.q)
        model.hessian_.start_, model.hessian_.index_, model.hessian_.value_ = half.indptr, half.indices, half.data
    solver.passModel(model)
    solver.run()
    result, k = solver.getSolution(), len(p.b)
    dual = -np.array(result.row_dual)
    found = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return p.answer(result.col_value, dual[:k], dual[k:], -np.array(result.col_dual), found)


def _by_qpsolvers(name: str, program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    import numpy as np
    import qpsolvers
    import scipy.sparse as sp

    p = program
    F, f, split = p.one_sided()
    matrices = [p.H, F, p.A]
    if p.sparse and name not in qpsolvers.sparse_solvers:
        size = 8 * len(p.q) * sum(part.shape[0] for part in matrices if part is not None)
        if size > MAX_BYTES:
            raise InputError(
                f"solver={name!r} takes dense matrices only, {size / 1e9:.1f} GB for this program of {len(p.q)} "
                f"variables: more than {MAX_BYTES / 1e9:.1f} GB. Take a solver of sparse matrices, such as 'piqp'."
            )
        matrices = [None if part is None else part.toarray() for part in matrices]
    elif not p.sparse and name not in qpsolvers.dense_solvers:
        matrices = [None if part is None else sp.csc_matrix(part) for part in matrices]
    H, F, A = matrices
    problem = qpsolvers.Problem(H, p.q, F, f, A, None if A is None else p.b)
    result = qpsolvers.solve_problem(problem, name, start if name in WARM else None, **options)
    if result.x is None:
        return None
    z = np.zeros(0) if F is None else result.z
    return p.answer(result.x, result.y, *split(z), bool(result.found))


DIRECT = {"piqp": _piqp, "clarabel": _clarabel, "highs": _highs}


def _solve(name: str, program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    options = {**TIGHT.get(name, {}), **options}
    if name in DIRECT:
        return DIRECT[name](program, options, start)
    return _by_qpsolvers(name, program, options, start)


def _attempt(name: str, program: Bounded, options: dict[str, Any], start: Any) -> Answer | None:
    """Return the result of `_solve`; if the solver raises an exception, warn and return None."""
    try:
        return _solve(name, program, options, start)
    except (FoldoptError, MemoryError):
        raise
    except Exception as error:
        warnings.warn(f"solver={name!r} raised {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)
        return None


def _checked(name: str, returned: Any, n: int, r: int) -> Answer | None:
    """Check what a user's function returned, and return it as an `Answer`."""
    import numpy as np

    if returned is None:
        return None
    x, y = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, np.zeros(r))
    for part, vector, size in (("x", x, n), ("y", y, r)):
        if np.shape(vector) != (size,):
            raise InputError(
                f"solver={name} returned {part} of shape {tuple(np.shape(vector))}, expected ({size},): return x "
                f"({n},), or x and the multipliers y ({r},), or None."
            )
        if not np.isfinite(vector).all():
            raise InputError(f"solver={name} returned NaN or inf in {part}; return None where it finds no solution.")
    return Answer(np.array(x, dtype=float), np.array(y, dtype=float), True)


def _require_installed(name: str) -> None:
    """Raise unless the solver, SciPy and (for a solver that is called through it) qpsolvers are installed."""
    needed = ("scipy", PACKAGES.get(name, "qpsolvers"))
    missing = [package for package in needed if not importlib.util.find_spec(package)]
    if missing:
        raise MissingDependencyError(
            f"solver={name!r} needs {' and '.join(missing)}: install with pip install 'foldopt[qp]'."
        )
    if name in PACKAGES or name in installed():
        return
    others = sorted({*metadata.metadata("qpsolvers").get_all("Provides-Extra", [])} - {*installed(), *GROUPS})
    if name in others:
        raise MissingDependencyError(f"solver={name!r} is not installed: pip install 'qpsolvers[{name}]'.")
    raise InputError(
        f"solver={name!r}: installed are {', '.join(installed())}. Others are installed with pip install "
        f"'qpsolvers[NAME]', NAME one of {', '.join(others)}."
    )


def _require_working(name: str, options: dict[str, Any]) -> None:
    """Raise unless the solver solves a program of two variables, without and with these options."""
    import numpy as np
    import scipy.sparse as sp

    rows = sp.csr_matrix([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    bounds = np.array([1.0, -1.0, -2.0]), np.array([1.0, 2.0, 2.0])
    program = Bounded(sp.identity(2, format="csc"), np.array([-1.0, 0.5]), rows, *bounds)
    try:
        answer = _solve(name, program, {}, None)
    except Exception as error:
        raise SolverError(
            f"solver={name!r} fails on a program of two variables: {error}. Check its installation and its licence."
        ) from error
    if answer is None or not answer.found:
        raise SolverError(f"solver={name!r} does not solve a program of two variables: check its installation.")
    unknown = [option for option in options if not _is_known(name, option)]
    if unknown:
        raise InputError(f"options={options}: solver={name!r} has no option {', '.join(unknown)}.")
    try:
        _solve(name, program, options, None)
    except FoldoptError:
        raise
    except Exception as error:
        wrong = [option for option in options if _is_refused(name, program, {option: options[option]})]
        raise InputError(
            f"options={options}: solver={name!r} refuses {', '.join(wrong or options)}: {error}"
        ) from error


def _is_refused(name: str, program: Bounded, options: dict[str, Any]) -> bool:
    try:
        _solve(name, program, options, None)
    except Exception:
        return True
    return False


def _is_known(name: str, option: str) -> bool:
    """Return whether a solver has this option; True for solvers that refuse unknown options themselves."""
    if name == "cvxopt":
        return option in CVXOPT_OPTIONS
    if name == "qpalm":
        import qpalm

        return option in dir(qpalm.Settings)
    return True
