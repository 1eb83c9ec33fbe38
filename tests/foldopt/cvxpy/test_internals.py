"""The private names of CVXPY that `foldopt.cvxpy` uses: run this first on a new release of CVXPY."""

import cvxpy as cp
import numpy as np
import pytest

from foldopt.cvxpy._canonical import Target


@pytest.fixture(scope="module")
def canonicalized():
    A, x = cp.Parameter((2, 3)), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.norm(A @ x)), [A @ x >= 1])
    data, chain, inverse = problem.get_problem_data(Target(), enforce_dpp=True)
    return problem, data["param_prob"], chain, inverse


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "q",
        "reduced_P",
        "reduced_A",
        "cone_dims",
        "constraints",
        "total_param_size",
        "param_id_to_col",
        "param_id_to_size",
        "var_id_to_col",
        "id_to_var",
    ],
)
def test_the_parametrized_program_has(name, canonicalized):
    assert hasattr(canonicalized[1], name), f"ParamConeProg.{name} is gone: see foldopt/cvxpy/_canonical.py"


def test_the_reduced_maps_hold_a_matrix_and_a_pattern(canonicalized):
    program = canonicalized[1]
    for reduced in (program.reduced_P, program.reduced_A):
        reduced.cache()
        rows, ends, shape = reduced.problem_data_index
        assert len(rows) == ends[-1] == reduced.reduced_mat.shape[0]
        assert reduced.reduced_mat.shape[1] == program.total_param_size + 1
        assert len(shape) == 2


@pytest.mark.parametrize("name", ["zero", "nonneg", "soc", "psd", "exp"])
def test_cone_dimensions_have(name, canonicalized):
    assert hasattr(canonicalized[1].cone_dims, name), f"ConeDims.{name} is gone: see foldopt/cvxpy/_canonical.py"


@pytest.mark.parametrize("name", ["compose_var_id_map", "compose_param_id_map", "invert", "get"])
def test_chains_have(name, canonicalized):
    assert hasattr(canonicalized[2], name), f"Chain.{name} is gone: see foldopt/cvxpy/_canonical.py"


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "OSQP"])
def test_solvers_have_what_is_called_and_asked(solver):
    from cvxpy.reductions.solvers import defines

    interface = {**defines.SOLVER_MAP_CONIC, **defines.SOLVER_MAP_QP}[solver]
    for name in ("solve_via_data", "invert", "VAR_ID"):
        assert hasattr(interface, name), f"{solver}: {name} is gone: see foldopt/cvxpy/_solver.py"
    if solver in defines.SOLVER_MAP_CONIC:
        names = "supports_quad_obj", "SUPPORTED_CONSTRAINTS", "EXP_CONE_ORDER", "PSD_TRIANGLE_KIND", "PSD_SQRT2_SCALING"
        for name in names:
            assert hasattr(interface, name), f"{solver}: {name} is gone: see foldopt/cvxpy/_solver.py"


def test_rows_come_as_all_t_then_all_z_and_the_signs_are_those_of_formatted_programs():
    draw = np.random.default_rng(0)
    x, S = cp.Variable(3), cp.Variable((2, 2), symmetric=True)
    A = [draw.normal(size=(2, 3)) for _ in range(4)]
    constraints = [
        A[0] @ x == 1,
        A[1] @ x <= 2,
        cp.SOC(A[2] @ x, A[3] @ cp.hstack([cp.reshape(x, (3, 1), "F")] * 2)),
        cp.ExpCone(x, x + 1, x + 3),
        S + cp.diag(x[:2]) >> 0,
    ]
    problem = cp.Problem(cp.Minimize(cp.sum(x) + cp.trace(S)), constraints)
    from foldopt.cvxpy._canonical import canonicalize

    own = canonicalize(problem, [], [x])
    theirs, _, _ = problem.get_problem_data("CLARABEL")
    theta = own.M @ np.ones(1)
    p = own.pattern
    ends = np.cumsum([len(p.P_rows), p.n, len(p.A_rows), p.m])
    dense = np.zeros((p.m, p.n))
    dense[p.A_rows, np.repeat(np.arange(p.n), np.diff(p.A_ptr))] = theta[ends[1] : ends[2]]
    np.testing.assert_allclose(dense, theirs["A"].toarray())
    np.testing.assert_allclose(theta[ends[2] :], theirs["b"])
    np.testing.assert_allclose(theta[ends[0] : ends[1]], theirs["c"])
