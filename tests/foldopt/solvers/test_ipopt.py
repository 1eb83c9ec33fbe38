"""Ipopt in front of `NLPLayer`: solutions, causes of failure, warm starts, sparse derivatives, gradients."""

import subprocess
import sys

import pytest
import scipy.sparse as sp
import torch

import foldopt
from foldopt import SmoothProgram
from foldopt._sparsity import SparseDerivatives, Sparsity
from foldopt.errors import InputError, UnboundedError
from foldopt.solvers.ipopt import solve_ipopt
from foldopt.solvers.nlp import solve_nlp
from tests.foldopt.programs import F64, PROGRAMS, hock_schittkowski_71, indefinite_on_a_sphere, made
from tests.foldopt.sparse_programs import PROGRAMS as SPARSE
from tests.foldopt.sparse_programs import problem

pytest.importorskip("cyipopt", reason="the extra ipopt is not installed")


def started(make, batch=4):
    objective, inequalities, equalities, start, params = made(make, batch)
    start = start if start.dim() == 2 else start.expand(batch, -1)
    return SmoothProgram(objective, equalities, inequalities), start, params


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", PROGRAMS)
def test_the_kkt_conditions_hold(make, sparse):
    """Measured by plain reverse-mode derivatives of the Lagrangian."""
    program, start, params = started(make)
    found = solve_ipopt(program, start, *params, sparse=SparseDerivatives(program) if sparse else None)
    assert found.status == ("solved",) * 4
    x = found.x.clone().requires_grad_()
    f, h, g = program.values(x, *params)
    (stationarity,) = torch.autograd.grad((f + (found.nu * h).sum(1) + (found.lam * g).sum(1)).sum(), x)
    size = 1 + torch.cat([found.nu, found.lam], 1).abs().max()
    for violation in (stationarity / size, h, g.clamp(min=0), found.lam * g / size):
        assert violation.numel() == 0 or violation.abs().max() < 1e-8
    assert (found.lam >= 0).all()


def test_hock_schittkowski_71_has_its_published_optimum():
    program, start, _ = started(hock_schittkowski_71, batch=1)
    c = torch.tensor([[25.0, 40.0]], dtype=F64)
    found = solve_ipopt(program, start, c)
    expected = torch.tensor([[1.0, 4.7429994, 3.8211503, 1.3794082]], dtype=F64)
    torch.testing.assert_close(found.x, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(program.objective(found.x, c), torch.tensor([17.0140173], dtype=F64), rtol=1e-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_linear_objective_on_a_ball_in_any_units(scale):
    """The optimum is -c / |c|; with zero multipliers the Lagrangian has no curvature."""
    program = SmoothProgram(
        lambda x, c: scale * (c * x).sum(1), None, lambda x, c: x.square().sum(1, keepdim=True) / scale - 1 / scale
    )
    c = torch.randn(10, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    for start in (0.1, 1.0, 10.0):
        found = solve_ipopt(program, torch.full_like(c, start), c)
        assert set(found.status) == {"solved"}
        torch.testing.assert_close(found.x, -c / c.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_every_sample_has_the_cause_of_its_own_failure():
    """min s x, c <= x <= 1, without the upper bound where s is negative."""
    program = SmoothProgram(
        lambda x, c, s: (s * x).sum(1), None, lambda x, c, s: torch.cat([c - x, torch.where(s < 0, -1, x - 1)], 1)
    )
    c = torch.tensor([[0.5], [2.0], [0.0], [torch.nan], [-0.5]], dtype=F64)
    s = torch.tensor([[1.0], [1.0], [-2.0], [1.0], [3.0]], dtype=F64)
    found = solve_ipopt(program, torch.zeros(5, 1, dtype=F64), c, s)
    assert found.status == ("solved", "infeasible", "unbounded", "not finite", "solved")
    torch.testing.assert_close(found.x[[0, 4]], c[[0, 4]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"max_iter": 2}, "iteration limit"),
        ({"time_limit": 1e-4}, "time limit"),
        ({"options": {"max_cpu_time": 1e-4}}, "time limit"),
    ],
)
def test_limits(options, status):
    program, start, params = started(hock_schittkowski_71)
    found = solve_ipopt(program, start, *params, **options)
    assert found.status == (status,) * 4


def test_more_equalities_than_variables():
    program = SmoothProgram(lambda x, c: x.square().sum(1), lambda x, c: torch.cat([x - c, x + c], 1))
    found = solve_ipopt(program, torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64))
    assert found.status == ("more equalities than variables",)


def test_options_reach_ipopt_and_are_checked():
    program, start, params = started(hock_schittkowski_71, batch=1)
    rough = solve_ipopt(program, start, *params, options={"tol": 1e-2})
    assert rough.iterations < solve_ipopt(program, start, *params).iterations
    for options in ({"toll": 1e-2}, {"tol": "small"}):
        with pytest.raises(InputError, match="options: Ipopt refuses tol"):
            solve_ipopt(program, start, *params, options=options)
    with pytest.raises(InputError, match=r"start has shape \(4,\)"):
        solve_ipopt(program, start[0], *params)


class Failing(SmoothProgram):
    """|x - c|^2, whose values or quadratic models fail after a few calls."""

    def __init__(self, **lives):
        super().__init__(lambda x, c: (x - c).square().sum(1))
        self.lives = lives

    def spend(self, name):
        self.lives[name] = self.lives.get(name, 1000) - 1
        if self.lives[name] < 0:
            raise ZeroDivisionError(name)

    def values(self, *args):
        self.spend("values")
        return super().values(*args)

    def sqp_data(self, *args):
        self.spend("models")
        return super().sqp_data(*args)


@pytest.mark.parametrize("lives", [{"values": 1}, {"values": 2}, {"models": 0}, {"models": 1}])
def test_an_error_in_a_function_is_raised_as_it_is(lives):
    """cyipopt swallows one of the Hessian's, which is the second model."""
    with pytest.raises(ZeroDivisionError, match=next(iter(lives))):
        solve_ipopt(Failing(**lives), torch.ones(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64))
    assert solve_ipopt(Failing(), torch.ones(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64)).status == ("solved",)


@pytest.mark.parametrize("make", [make for make in PROGRAMS if make is not indefinite_on_a_sphere])
def test_a_warm_start_takes_fewer_iterations_to_the_same_solution(make):
    program, start, params = started(make)
    found = solve_ipopt(program, start, *params)
    moved = [*params[:-1], 1.001 * params[-1]]
    warm = solve_ipopt(program, found.x, *moved, multipliers=(found.nu, found.lam))
    cold = solve_ipopt(program, found.x, *moved)
    assert warm.status == ("solved",) * 4
    assert warm.iterations.sum() < 0.6 * cold.iterations.sum()
    torch.testing.assert_close(warm.x, cold.x, rtol=1e-7, atol=1e-7)


def kinked(x, c):
    """A cubic spline that couples its variables beyond 1 only."""
    return (x - c).square().sum(1) + (x[:, 0] - 1).clamp(min=0) ** 3 * x[:, 1] ** 2


def test_places_that_are_empty_at_the_start_are_found_on_the_way():
    program, c = SmoothProgram(kinked), torch.tensor([[3.0, 2.0, 1.0]], dtype=F64)
    sparse = SparseDerivatives(program)
    found = solve_ipopt(program, torch.zeros_like(c), c, sparse=sparse)
    assert found.status == ("solved",)
    assert len(sparse.sparsity.H.rows) == 5
    torch.testing.assert_close(found.x, solve_nlp(program, torch.zeros_like(c), c).x, rtol=1e-8, atol=1e-8)
    given = SparseDerivatives(program, Sparsity(sp.identity(3)))
    with pytest.raises(InputError, match="sparsity= misses entries"):
        solve_ipopt(program, torch.zeros_like(c), c, sparse=given)


@pytest.mark.parametrize("sparsity", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_a_layer_with_ipopt_has_the_derivative_of_the_built_in_one(name, sparsity):
    objective, inequalities, equalities = SPARSE[name]
    dense, _, c = problem(name)
    expected = dense(c)
    options = {"start": lambda c: dense(c).detach() + 0.01, "solver": "ipopt", "sparsity": sparsity}
    layer = foldopt.NLPLayer(objective, inequalities, equalities, **options)
    x = layer(c)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 1, c.shape[1], dtype=F64)
    grad, right = (torch.autograd.grad((part * weights).sin().sum(), c)[0] for part in (x, expected))
    torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9)
    assert layer.last.verdict == ("differentiable",) * 3


def test_a_constraint_said_twice_is_solved_and_found_to_be_dependent():
    layer = foldopt.NLPLayer(
        lambda x, c: (x + 1).square().sum(1),
        lambda x, c: torch.cat([c - x, 2 * c - 2 * x], 1),
        start=torch.ones(1),
        solver="ipopt",
        degenerate="warn",
    )
    c = torch.tensor([[0.5]], dtype=F64, requires_grad=True)
    x = layer(c)
    torch.testing.assert_close(x, c, rtol=1e-9, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="depend"):
        x.sum().backward()
    assert layer.last.verdict == ("dependent rows",)


def objective_between_bounds(x, c):
    """Not defined below 0; pulled to c, with the variables coupled."""
    assert (x >= 0).all(), "evaluated beyond a bound"
    return (x * x.log() - c * x).sum(1) + 0.1 * (x[:, 1:] - x[:, :-1]).square().sum(1)


@pytest.mark.parametrize("sparse", [False, True])
def test_bounds_are_kept_to_and_have_the_multipliers_of_rows(sparse):
    """Some are missing, some hold in one sample only, one variable is fixed in all samples and one in one."""
    inf = torch.inf
    lower = torch.tensor([[0.0, 0.5, 0.7, 0.0, 1.0], [0.0, -inf, 0.7, 0.2, 0.4]], dtype=F64)
    upper = torch.tensor([[0.3, inf, 0.7, 9.0, 1.0], [inf, 1.0, 0.7, 9.0, 2.0]], dtype=F64)
    c = torch.tensor([[1.0, -1.0, 0.0, 0.5, 2.0], [0.0, 3.0, 0.0, -4.0, 1.0]], dtype=F64)

    def total(x, c):
        return x.sum(1, keepdim=True) - 5

    lower[:, 1] = lower[:, 1].clamp(min=0)
    program = SmoothProgram(objective_between_bounds, None, total, lower, upper)
    options = {"sparse": SparseDerivatives(program) if sparse else None}
    found = solve_ipopt(program, torch.full_like(c, 0.6), c, **options)
    assert found.status == ("solved",) * 2
    assert (found.x >= lower).all()
    assert (found.x <= upper).all()
    x = found.x.clone().requires_grad_()
    f, h, g = program.values(x, c)
    (slope,) = torch.autograd.grad((f + (found.nu * h).sum(1) + (found.lam * g).sum(1)).sum(), x)
    assert slope.abs().max() < 1e-7
    assert (found.lam * g).abs().max() < 1e-7
    assert (found.lam > 0.1).sum() >= 4
    warm = solve_ipopt(program, found.x, c, multipliers=(found.nu, found.lam), **options)
    assert warm.iterations.max() < found.iterations.max()
    torch.testing.assert_close(warm.x, found.x, rtol=1e-7, atol=1e-7)


def test_bounds_that_exclude_each_other_are_infeasible():
    program = SmoothProgram(lambda x, c: (x - c).square().sum(1), lower=lambda c: c, upper=torch.ones(1))
    found = solve_ipopt(program, torch.zeros(2, 1, dtype=F64), torch.tensor([[2.0], [0.5]], dtype=F64))
    assert found.status == ("infeasible", "solved")


def test_a_layer_says_why_ipopt_found_no_solution():
    """min c x, x <= 1 and, where c is positive, x >= 2."""
    options = {"start": torch.zeros(1), "solver": "ipopt"}
    layer = foldopt.NLPLayer(
        lambda x, c: (c * x).sum(1),
        lambda x, c: torch.cat([x - 1, torch.where(c > 0, 2 - x, -1 - 0 * x)], 1),
        on_failure="nan",
        **options,
    )
    c = torch.tensor([[1.0], [-1.0]], dtype=F64, requires_grad=True)
    x = layer(c)
    assert layer.last.status == ("infeasible", "solved")
    torch.testing.assert_close(x[1], torch.ones(1, dtype=F64), rtol=1e-9, atol=1e-9)
    falling = foldopt.NLPLayer(lambda x, c: (c * x).sum(1), lambda x, c: x - 1, **options)
    with pytest.raises(UnboundedError, match="unbounded at 1 of 2 samples"):
        falling(c)


LARGE = """
import sys
sys.path.insert(0, {root!r})
import time
import numpy as np
import scipy.sparse as sp
import torch
import foldopt
from tests.foldopt.test_sparse_nlp_large import Obstacle
membrane = Obstacle(5041)
f, psi = membrane.inputs(1)
places = foldopt.Sparsity(membrane.A, sp.identity(membrane.n))
options = dict(start=torch.zeros(membrane.n), solver="ipopt", sparsity=places)
layer = foldopt.NLPLayer(membrane.objective, membrane.inequalities, **options)
small = Obstacle(25)
small_layer = foldopt.NLPLayer(small.objective, small.inequalities, start=torch.ones(25), solver="ipopt", sparsity=True)
small_layer(*small.inputs(1)).sum().backward()
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB
before, begun = peak(), time.time()
x = layer(f, psi)
g = np.cos(np.arange(membrane.n))
found = torch.autograd.grad((x * torch.from_numpy(g)).sum(), (f, psi))
print((peak() - before) / 1024, time.time() - begun)
exact, held = membrane.solve(f.detach().numpy()[0], psi.detach().numpy()[0])
np.testing.assert_allclose(x.detach().numpy()[0], exact, rtol=1e-10, atol=1e-10)
for grad, expected in zip(found, membrane.gradients(exact, held, g)):
    np.testing.assert_allclose(grad[0], expected, rtol=1e-9, atol=1e-9)
"""


@pytest.mark.slow
def test_5041_variables_take_seconds_and_no_dense_matrix(request):
    """The Hessian alone would take 203 MB as a dense matrix, and the Jacobian again."""
    script = LARGE.format(root=str(request.config.rootpath))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    memory, seconds = map(float, done.stdout.split())
    assert memory < 150
    assert seconds < 30
