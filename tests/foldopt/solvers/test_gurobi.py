import os
import pickle
import subprocess
import sys
from pathlib import Path

import gurobipy
import pytest
import torch

from foldopt.errors import InfeasibleError, InputError, MissingDependencyError, SolverError, UnboundedError
from foldopt.solvers.gurobi import LICENSE_VARIABLES, GurobiQCQP, _environment
from foldopt.solvers.interior_point import solve_qcqp

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[3]


def disc(n):
    return 2 * torch.eye(n, dtype=F64)[None], torch.zeros(1, n, dtype=F64), torch.ones(1, dtype=F64)


def test_solutions_and_multipliers_agree_with_the_interior_point():
    g = torch.Generator().manual_seed(0)
    n = 6
    q = torch.randn(10, n, generator=g, dtype=F64)
    A, b = torch.randn(1, n, generator=g, dtype=F64), torch.tensor([0.1], dtype=F64)
    G, h = torch.randn(3, n, generator=g, dtype=F64), torch.full((3,), 0.2, dtype=F64)
    found = GurobiQCQP(n, A, b, G, h, quadratic=disc(n))(q)
    expected = solve_qcqp(torch.zeros(n, n), q, A, b, G, h, disc(n))
    assert expected.ok.all()
    for name in ("x", "equality_dual", "inequality_dual"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-4, rtol=1e-3)


def test_failures_name_the_samples():
    G, h = torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, 0.0])
    with pytest.raises(InfeasibleError, match=r"2 samples: INFEASIBLE at \[0, 1\]") as caught:
        GurobiQCQP(1, G=G, h=h, parameters={"DualReductions": 0})(torch.ones(2, 1))
    assert caught.value.indices == (0, 1)
    half_line = GurobiQCQP(1, G=G[1:], h=h[1:], parameters={"DualReductions": 0})
    with pytest.raises(UnboundedError) as caught:
        half_line(torch.tensor([[1.0], [-1.0]]))
    assert caught.value.indices == (1,)
    with pytest.raises(InputError, match=r"q has shape \(1, 2\), expected \(B, 1\)"):
        half_line(torch.ones(1, 2))


def test_a_model_beyond_the_licence_says_so():
    n = 2500
    with pytest.raises(SolverError, match=r"the pip licence: 2000, or 200 with quadratic terms.*GRB_LICENSE_FILE"):
        GurobiQCQP(n, torch.ones(1, n), torch.ones(1), -torch.eye(n), torch.zeros(n))(torch.ones(1, n))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"GRB_LICENSE_FILE": "nowhere/gurobi.lic"},
        {"GRB_TOKENSERVER": "127.0.0.1"},
        {"GRB_WLSACCESSID": "a", "GRB_WLSSECRET": "b", "GRB_LICENSEID": "1", "https_proxy": "http://127.0.0.1:9"},
    ],
    ids=["file", "token server", "web licence"],
)
def test_without_a_licence_it_says_where_one_can_be_named_and_what_needs_none(variables):
    """Gurobi itself answers, in a process of its own, as the licence is taken once per process."""
    code = "import torch; from foldopt.solvers.gurobi import GurobiQCQP; GurobiQCQP(2)(torch.ones(1, 2))"
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert "SolverError: Gurobi gave no licence: " in said
    assert all(name in said for name in (*LICENSE_VARIABLES, "GRB_LICENSE_FILE", "backend.forward=exact"))


def test_a_licence_number_is_a_number(monkeypatch):
    monkeypatch.setenv("GRB_LICENSEID", "mine")
    _environment.cache_clear()
    with pytest.raises(InputError, match="GRB_LICENSEID='mine': expected a whole number"):
        GurobiQCQP(1, quadratic=disc(1))(torch.ones(1, 1))


def test_models_of_a_process_share_its_environment(monkeypatch):
    made = []
    monkeypatch.setattr(gurobipy, "Env", lambda env=gurobipy.Env, **options: made.append(options) or env(**options))
    _environment.cache_clear()
    for n in (1, 2):
        GurobiQCQP(n, quadratic=disc(n))(torch.ones(1, n))
    assert len(made) == 1


def test_pickling_drops_the_model_and_builds_it_again():
    solver = GurobiQCQP(2, quadratic=disc(2))
    x = solver(torch.ones(1, 2)).x
    torch.testing.assert_close(pickle.loads(pickle.dumps(solver))(torch.ones(1, 2)).x, x)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gurobipy", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'foldopt\[gurobi\]'"):
        GurobiQCQP(2, quadratic=disc(2))(torch.ones(1, 2))


def test_constraints_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"A, b do not fit: expected shapes \(p, 3\)"):
        GurobiQCQP(3, torch.ones(1, 2), torch.ones(1))


def test_tolerances_too_loose_for_multipliers_are_named():
    n = 4
    q = torch.randn(5, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    with pytest.raises(SolverError, match="too loose for them"):
        GurobiQCQP(n, quadratic=disc(n), parameters={"BarQCPConvTol": 0.5})(q)
