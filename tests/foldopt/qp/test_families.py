"""Transport, assignment, flow and sudoku with every row, so that the equalities are dependent; ridges 0, 1e-5 and 1e-2.

An LP's value is HiGHS's; x and the derivative in the costs are those of `programs.truth`. Ridges are mixed in a batch.
"""

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.qp.programs import Program, stacked, truth

RIDGES = (0.0, 1e-5, 1e-2)
SHAPES = range(8)
EACH = 25  # instances of a shape: 8 x 25 = 200


def transport(draws, shape):
    """Transport with equal totals of supply and demand, and all rows of both marginals."""
    k, m = 2 + shape % 5, 3 + shape
    A = np.concatenate([np.kron(np.eye(k), np.ones(m)), np.kron(np.ones(k), np.eye(m))])
    programs = []
    for i in range(EACH):
        supply, demand = draws.random(k) + 0.1, draws.random(m) + 0.1
        b = np.r_[supply / supply.sum(), demand / demand.sum()]
        programs.append(Program(RIDGES[i % 3] * np.eye(k * m), draws.random(k * m), A=A, b=b, lower=np.zeros(k * m)))
    return programs


def assignment(draws, shape):
    """Assignment in a k x k table, whose solution is a vertex where most basic variables are 0."""
    k = 2 + shape % 5
    A = np.concatenate([np.kron(np.eye(k), np.ones(k)), np.kron(np.ones(k), np.eye(k))])
    upper = np.ones(k * k) if shape % 2 else np.full(k * k, np.inf)  # x <= 1 follows from the rows
    return [
        Program(
            RIDGES[i % 3] * np.eye(k * k),
            draws.normal(size=k * k),
            A=A,
            b=np.ones(2 * k),
            lower=np.zeros(k * k),
            upper=upper,
        )
        for i in range(EACH)
    ]


def incidence(nodes, arcs):
    A = np.zeros((nodes, len(arcs)))
    for k, (tail, head) in enumerate(arcs):
        A[tail, k], A[head, k] = 1, -1
    return A


def grid(m):
    """The arcs of an m x m grid, to the right and down."""
    return [(i * m + j, i * m + j + 1) for i in range(m) for j in range(m - 1)] + [
        (i * m + j, i * m + j + m) for i in range(m - 1) for j in range(m)
    ]


def flow(draws, shape):
    """A flow from corner to corner, with arcs one way or both ways, and with or without capacities."""
    m = 3 + shape % 2
    arcs = grid(m)
    if shape % 4 > 1:
        arcs = arcs + [(head, tail) for tail, head in arcs]
    A, n = incidence(m * m, arcs), len(arcs)
    b = np.zeros(m * m)
    b[0], b[-1] = 1, -1
    programs = []
    for i in range(EACH):
        upper = 0.6 + draws.random(n) if shape > 3 else np.full(n, np.inf)
        programs.append(
            Program(RIDGES[i % 3] * np.eye(n), draws.random(n) + 0.1, A=A, b=b, lower=np.zeros(n), upper=upper)
        )
    return programs


def sudoku(draws, shape):
    """4 x 4: each cell, row, column and box holds each number once (64 rows of rank 40), and hints as further rows."""
    place = np.arange(64).reshape(4, 4, 4)
    groups = [place[i, j, :] for i in range(4) for j in range(4)]
    groups += [place[i, :, k] for i in range(4) for k in range(4)] + [
        place[:, j, k] for j in range(4) for k in range(4)
    ]
    groups += [place[i : i + 2, j : j + 2, k].ravel() for i in (0, 2) for j in (0, 2) for k in range(4)]
    A = np.zeros((64, 64))
    for row, group in enumerate(groups):
        A[row, group] = 1
    programs = []
    for i in range(EACH):
        solved = full_board(draws)
        rows = np.zeros((4, 64))
        for row, cell in enumerate(draws.choice(16, size=4, replace=False)):
            rows[row, place[cell // 4, cell % 4, solved[cell // 4, cell % 4]]] = 1
        ridge = (10 if shape else 1) * RIDGES[i % 3]
        A_and_hints, cost = np.concatenate([A, rows]), draws.normal(size=64)
        programs.append(Program(ridge * np.eye(64), cost, A=A_and_hints, b=np.ones(68), lower=np.zeros(64)))
    return programs


def full_board(draws):
    """Return a solved board, made by random permutations of numbers, rows, columns and axes."""
    board = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [3, 2, 1, 0]])
    rows, columns = (np.concatenate([draws.permutation(2), 2 + draws.permutation(2)]) for _ in range(2))
    board = draws.permutation(4)[board][rows][:, columns]
    return board.T if draws.random() < 0.5 else board


FAMILIES = {"transport": transport, "assignment": assignment, "flow": flow, "sudoku": sudoku}
BATCHES = [(name, shape) for name in FAMILIES for shape in (range(2) if name == "sudoku" else SHAPES)]


def batch(name, shape):
    draws = np.random.default_rng([len(name), shape])
    return FAMILIES[name](draws, shape), draws.normal(size=64)


def close(found, expected, rtol):
    expected = torch.tensor(np.array(expected))
    atol = rtol * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def asked(args, weight, wrt=("p",), **options):
    """Return the layer, x and the gradients of weight'x of each solved sample."""
    args = {name: part.clone().requires_grad_(name in wrt) for name, part in args.items()}
    layer = foldopt.QPLayer(**options)
    x = layer(args["Q"], args["p"], **{name: part for name, part in args.items() if name not in ("Q", "p")})
    loss = (x * torch.tensor(weight[: x.shape[1]]))[layer.last.ok].sum()
    return layer, x.detach(), dict(zip(wrt, torch.autograd.grad(loss, [args[name] for name in wrt]), strict=True))


def test_the_rows_are_dependent_and_the_families_of_the_promised_size():
    assert {name: sum(one == name for one, _ in BATCHES) * EACH for name in FAMILIES} == {
        "transport": 200,
        "assignment": 200,
        "flow": 200,
        "sudoku": 50,
    }
    for name, shape in BATCHES:
        A = batch(name, shape)[0][0].A
        assert np.linalg.matrix_rank(A) < len(A), (name, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), BATCHES)
def test_every_instance_is_right(name, shape):
    linprog = pytest.importorskip("scipy.optimize").linprog
    programs, weight = batch(name, shape)
    weight = weight[: programs[0].n]
    expected = [truth(program) for program in programs]
    layer, x, gradients = asked(stacked(programs), weight)
    assert layer.last.status == ("solved",) * EACH
    assert layer.last.verdict == ("differentiable",) * EACH
    close(x, [one.x for one in expected], 1e-9)
    verdicts, slopes = zip(*(one.verdict(weight) for one in expected), strict=True)
    assert set(verdicts) == {"differentiable"}
    close(gradients["p"], slopes, 1e-8)
    for program, one in zip(programs, x.numpy(), strict=True):
        assert np.abs(program.A @ one - program.b).max() < 1e-12
        assert (one > -1e-12).all()
        if not program.Q.any():
            bounds = np.stack(
                [program.lower, np.full(program.n, np.inf) if program.upper is None else program.upper], 1
            )
            value = linprog(program.p, A_eq=program.A, b_eq=program.b, bounds=bounds).fun
            assert program.p @ one == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_against_differences_of_independent_solves(name):
    """Compare with differences along one direction per instance, 1e-6 to both sides."""
    programs, weight = batch(name, 1)
    weight = weight[: programs[0].n]
    _, _, gradients = asked(stacked(programs), weight)
    draws = np.random.default_rng(2)
    for program, gradient in list(zip(programs, gradients["p"].numpy(), strict=True))[:9]:
        d = draws.normal(size=program.n)
        ends = [truth(program.moved(p=s * 1e-6 * d)).x @ weight for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert gradient @ d == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_hand_sides_of_dependent_rows_have_no_unique_gradient(name):
    programs, weight = batch(name, 0)
    with pytest.raises(errors.DependentRowsError) as caught:
        asked(stacked(programs), weight, wrt=("b",))
    assert caught.value.indices == tuple(range(EACH))


def test_right_hand_sides_of_transport_move_x_where_the_totals_stay_equal():
    """The gradient of b is the derivative along all directions that keep the totals equal."""
    programs, weight = batch("transport", 2)
    weight = weight[: programs[0].n]
    layer, _, gradients = asked(stacked(programs), weight, wrt=("p", "b"), degenerate="one_sided")
    assert layer.last.verdict == ("dependent rows",) * EACH
    draws = np.random.default_rng(3)
    for program, gradient, slope in zip(programs, gradients["b"].numpy(), gradients["p"].numpy(), strict=True):
        d = program.A @ draws.normal(size=program.n)
        ends = [truth(program.moved(b=s * 1e-6 * d)).x @ weight for s in (1, -1)]
        assert gradient @ d == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)
        assert np.abs(slope - truth(program).gradient(weight)).max() < 1e-7 * max(1, np.abs(slope).max())


def uneven_totals(programs, bad):
    for i in bad:
        programs[i].b = programs[i].b + np.eye(len(programs[i].b))[0]


def lone_node(programs, bad):
    """A node with demand and without arcs."""
    for i in bad:
        programs[i].A = programs[i].A * (np.arange(len(programs[i].A)) != 0)[:, None]


def forbidden_row(programs, bad):
    """The first row of the table has capacity 0."""
    for i in bad:
        upper = np.ones(programs[i].n)
        upper[: int(programs[i].n ** 0.5)] = 0
        programs[i].upper = upper


def same_hint_twice(programs, bad):
    """A cell that must hold two numbers."""
    for i in bad:
        A = programs[i].A.copy()
        A[64:66] = 0
        A[64, 0] = A[65, 1] = 1
        programs[i].A = A


def small_capacities(programs, bad):
    for i in bad:
        programs[i].upper = np.full(programs[i].n, 0.4)


def negative_cycle(programs, bad):
    """A cycle of two arcs with negative total cost, without a capacity or a ridge."""
    for i in bad:
        programs[i].Q = 0 * programs[i].Q
        half = programs[i].n // 2
        p = programs[i].p.copy()
        p[0], p[half] = -1, 0.5
        programs[i].p = p


FAULTS = [
    ("transport", 1, uneven_totals, errors.InfeasibleError),
    ("transport", 6, uneven_totals, errors.InfeasibleError),
    ("assignment", 3, uneven_totals, errors.InfeasibleError),
    ("assignment", 3, forbidden_row, errors.InfeasibleError),
    ("flow", 0, uneven_totals, errors.InfeasibleError),
    ("flow", 0, lone_node, errors.InfeasibleError),
    ("flow", 3, lone_node, errors.InfeasibleError),
    ("flow", 4, small_capacities, errors.InfeasibleError),
    ("sudoku", 0, same_hint_twice, errors.InfeasibleError),
    ("flow", 2, negative_cycle, errors.UnboundedError),
    ("flow", 3, negative_cycle, errors.UnboundedError),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "spoil", "cause"), FAULTS)
def test_infeasible_and_unbounded_instances_are_named_and_leave_the_others_alone(name, shape, spoil, cause):
    bad = (0, 7, 8, 24)
    status = {errors.InfeasibleError: "infeasible", errors.UnboundedError: "unbounded"}[cause]
    programs, weight = batch(name, shape)
    good = stacked(programs)
    spoil(programs, bad)
    assert truth(programs[7]).status == status
    args = stacked(programs)
    with pytest.raises(cause) as caught:
        asked(args, weight)
    assert caught.value.indices == bad
    keep = [i for i in range(EACH) if i not in bad]
    layer, x, gradients = asked(args, weight, on_failure="nan")
    assert layer.last.status == tuple(status if i in bad else "solved" for i in range(EACH))
    assert x[list(bad)].isnan().all()
    _, y, expected = asked({part: value[keep] for part, value in good.items()}, weight)
    close(x[keep], y, 1e-13)
    close(gradients["p"][keep], expected["p"], 1e-11)
