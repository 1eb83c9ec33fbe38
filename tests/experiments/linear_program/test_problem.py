"""Linear programs: optima by other algorithms, derivatives of the smoothed programs by differences."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from experiments.linear_program import polytope
from experiments.linear_program.problem import LinearProgramProblem
from experiments.run import components, folders
from experiments.run.configuration import compose
from experiments.run.execution import execute
from foldopt import fold
from foldopt.errors import FoldoptError, InputError, KinkError, SolverError

WEIGHTS = torch.tensor([[3, 4, 5, 6, 7, 3], [2, 2, 3, 8, 1, 4]], dtype=torch.float64)
SETS = {
    "shortest_path": polytope.shortest_path(3, 4),
    "knapsack": polytope.knapsack(WEIGHTS, 11.0),
    "assignment": polytope.assignment(4),
}


def costs(n, seed=0, samples=6):
    """Whole numbers, so that there are ties between optima."""
    return torch.randint(1, 6, (samples, n), generator=torch.Generator().manual_seed(seed)).double()


def problem(instance, smoothing="quadratic", strength=1.0):
    return LinearProgramProblem(SETS[instance], instance == "knapsack", smoothing, strength)


def shortest(cost, rows=3, columns=4):
    """The length of the shortest path, by dynamic programming over the nodes."""
    east = {(i, j): i * (2 * columns - 1) + j for i in range(rows) for j in range(columns - 1)}
    south = {(i, j): i * (2 * columns - 1) + columns - 1 + j for i in range(rows - 1) for j in range(columns)}
    best = {(0, 0): 0.0}
    for i, j in product(range(rows), range(columns)):
        if (i, j) != (0, 0):
            ways = [best[i, j - 1] + cost[east[i, j - 1]]] if j else []
            ways += [best[i - 1, j] + cost[south[i - 1, j]]] if i else []
            best[i, j] = min(ways)
    return best[rows - 1, columns - 1]


def fullest(value):
    """The largest value of a knapsack, by enumeration."""
    choices = torch.tensor(list(product([0.0, 1.0], repeat=len(value))), dtype=torch.float64)
    fits = ((choices @ WEIGHTS.mT) <= 11.0).all(1)
    return float((choices[fits] @ value).max())


def cheapest(cost):
    table = cost.reshape(4, 4).numpy()
    return float(table[linear_sum_assignment(table)].sum())


@pytest.mark.parametrize(
    ("instance", "optimum", "sign"),
    [("shortest_path", shortest, -1), ("knapsack", fullest, 1), ("assignment", cheapest, -1)],
)
def test_decisions_are_optimal_whole_and_feasible(instance, optimum, sign):
    solved, p = problem(instance), SETS[instance]
    c = costs(p.n, samples=30)
    x = solved.decide(c)
    assert ((x == 0) | (x == 1)).all()
    torch.testing.assert_close(x @ p.A.mT, p.b.expand(30, -1))
    assert (x @ p.G.mT <= p.h).all()
    expected = torch.tensor([sign * optimum(row) for row in c], dtype=torch.float64)
    torch.testing.assert_close(solved.value(x, c), expected)


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy", "barrier"])
@pytest.mark.parametrize("instance", SETS)
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_the_folded_gradient_is_that_of_differences(instance, smoothing, strength):
    """At whole costs moved by a little, as ties have no derivative in the program smoothed by a quadratic."""
    solved, n = problem(instance, smoothing, strength), SETS[instance].n
    gen = torch.Generator().manual_seed(1)
    c = (costs(n) + 0.1 * torch.randn(6, n, generator=gen, dtype=torch.float64)).requires_grad_()
    w, d = torch.randn(2, 6, n, generator=gen, dtype=torch.float64)
    layer = fold(lambda c: solved.solve("exact", c), solved.optimizers["newton"](), tol=1e-7)
    (gradient,) = torch.autograd.grad((layer(c)[0] * w).sum(), c)
    size = 1e-5 * strength
    with torch.no_grad():
        ends = [(solved.solve("exact", c + k * size * d)[0] * w).sum(1) for k in (-2, -1, 1, 2)]
    differences = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * size)
    torch.testing.assert_close((gradient * d).sum(1), differences, rtol=1e-5, atol=1e-6 / strength)


@pytest.mark.parametrize("smoothing", ["quadratic", "entropy", "barrier"])
@pytest.mark.parametrize("instance", SETS)
def test_cvxpys_form_is_the_same_smoothed_program(instance, smoothing):
    solved = problem(instance, smoothing, 1.0)
    program, (parameter,), (variable,) = solved.cvxpy("normalized")
    for c in costs(SETS[instance].n, samples=3):
        parameter.value = c.numpy()
        program.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        x = solved.solve("exact", c[None])[0][0]
        np.testing.assert_allclose(x.numpy(), variable.value, atol=2e-5)


@pytest.mark.parametrize("instance", SETS)
def test_a_weak_smoothing_is_the_program_itself(instance):
    """The gap closes with the strength; the relaxed knapsack gains at least what whole items can."""
    p = SETS[instance]
    c = costs(p.n)
    exact = problem(instance).value(problem(instance).decide(c), c)
    strengths = (1.0, 0.5, 0.2)
    smooth = [problem(instance, "entropy", strength) for strength in strengths]
    gaps = [exact - program.value(program.solve("exact", c)[0], c) for program in smooth]
    assert (gaps[1] <= gaps[0] + 1e-9).all()
    assert (gaps[2] <= gaps[1] + 1e-9).all()
    assert (gaps[2] <= 0.5).all()
    if instance != "knapsack":
        assert (gaps[2] >= -1e-9).all()


def test_a_smoothing_too_weak_for_its_costs_is_refused():
    with pytest.raises(SolverError, match=r"raise task\.strength, as 0\.001 is small for costs of up to 5"):
        problem("knapsack", "entropy", 0.001).solve("exact", costs(6))


@pytest.mark.parametrize(("last", "gradient"), [(2.0, -0.5), (3.0, None), (4.0, 0.0)])
def test_a_kink_of_the_quadratic_smoothing_is_refused_by_its_name(last, gradient):
    """Two ways around a square: from a difference of 2 between their costs on, the dearer way is not used at all."""
    solved = LinearProgramProblem(polytope.shortest_path(2, 2), False, "quadratic", 1.0)
    layer = fold(lambda c: solved.solve("exact", c), solved.optimizers["newton"]())
    c = torch.tensor([[1.0, 1.0, 1.0, last]], dtype=torch.float64, requires_grad=True)
    used = layer(c)[0][0, 0]
    if gradient is None:
        with pytest.raises(KinkError):
            used.backward()
    else:
        used.backward()
        torch.testing.assert_close(c.grad[0], gradient / 2 * torch.tensor([1.0, -1.0, 1.0, -1.0]).double())


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("task.instance=travelling", "choose one of shortest_path, knapsack, assignment"),
        ("task.smoothing=cubic", "choose one of"),
        ("task.strength=0", "task.strength=0"),
        ("task.rows=1", "task.rows=1"),
        ("task.noise=1", "task.noise=1"),
        ("task.degree=0", "task.degree=0"),
    ],
)
def test_bad_settings_are_named(override, match):
    with pytest.raises((InputError, FoldoptError), match=match):
        components.build(compose(["task=linear_program", "model=linear", "task.n_train=8", override]))


def test_qpth_refuses_an_entropy_with_the_reason():
    with pytest.raises(InputError, match=r"smoothed by task\.smoothing=entropy is not quadratic"):
        components.build(compose(["task=linear_program", "task.smoothing=entropy", "backend=qpth", "task.n_train=8"]))


@pytest.mark.slow
@pytest.mark.parametrize("instance", SETS)
@pytest.mark.parametrize(
    "how",
    [
        ["backend=fold", "task.smoothing=quadratic"],
        ["backend=fold", "task.smoothing=entropy"],
        ["backend=fold", "task.smoothing=barrier"],
        ["backend=cvxpylayers", "task.smoothing=quadratic"],
        ["backend=qpth", "task.smoothing=quadratic"],
        ["backend=two_stage"],
        ["backend=spo_plus"],
        ["backend=pyepo", "backend.loss=pfyl"],
    ],
)
def test_every_method_learns_every_program(tiny, console, instance, how):
    cfg = tiny(
        "task=linear_program",
        "model=linear",
        f"task.instance={instance}",
        "task.standardize=true",
        "train.lr=0.05",
        *how,
    )
    assert execute(cfg, console) == 0
    frame = folders.load_metrics(folders.of(cfg))
    regret = frame[frame["split"] == "test"]["regret"]
    assert regret.iloc[-1] < 0.95 * regret.iloc[0]
