"""Flow networks, soft rows with large penalties, and bounds and rows that never bind."""

import numpy as np
import pytest
import torch

from tests.foldopt.qp.hard_cases import SOFT, Z3, mean_free
from tests.foldopt.qp.programs import F32, F64, Program, close, stacked, tensor, truth
from tests.foldopt.qp.sparse import arguments, asked


@pytest.mark.parametrize("penalty", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_the_right_hand_side_of_soft_rows(penalty):
    """x = (h_2 + s_2) / 0.8, s = -(h_3, h_4)."""
    program = Program(np.diag([1, 0, 0]), [-1.2, penalty, penalty], **SOFT)
    _, _, gradients = asked(arguments(program), [1, 1, 1], wrt=("p", "h"))
    close(gradients["h"], [0, 1.25, -1, -2.25])
    close(gradients["p"], Z3, atol=1e-9)


@pytest.mark.parametrize("penalty", [1e2, 1e4, 1e6, 1e8, 1e9])
@pytest.mark.parametrize(("n", "m"), [(3, 4), (6, 10)])
def test_projections_on_soft_rows_are_those_on_hard_rows(n, m, penalty):
    """The penalty is far above every multiplier, so the slacks are 0 and x and its derivative are those of Gx <= h."""
    draws = np.random.default_rng(n)
    hard, soft = [], []
    for _ in range(16):
        y, G, h = 2 * draws.normal(size=n), draws.normal(size=(m, n)), draws.random(m) + 0.1
        hard.append(Program(np.eye(n), -y, G, h))
        Q = np.diag(np.r_[np.ones(n), np.zeros(m)])
        G = np.block([[G, -np.eye(m)], [np.zeros((m, n)), -np.eye(m)]])
        soft.append(Program(Q, np.r_[-y, np.full(m, penalty)], G, np.r_[h, np.zeros(m)]))
    weight = draws.normal(size=n)
    found = [truth(program) for program in hard]
    _, x, gradients = asked(stacked(soft), np.r_[weight, np.zeros(m)])
    close(x, [np.r_[one.x, np.zeros(m)] for one in found])
    close(gradients["p"], [np.r_[one.gradient(weight), np.zeros(m)] for one in found])


@pytest.mark.parametrize("big", [None, 1e10, 1e12, 1e15, 1e18, 1e20])
@pytest.mark.parametrize("as_rows", [True, False])
def test_bounds_that_never_bind_change_nothing(big, as_rows):
    draws = np.random.default_rng(0)
    c, A, weight = draws.random(5) + 0.1, draws.random((1, 5)), draws.normal(size=5)
    eye, zero = np.eye(5), np.zeros(5)
    plain = Program(eye, c, A=A, b=[1], lower=zero)
    if big is None:
        program = Program(eye, c, -eye, zero, A, [1]) if as_rows else plain
    elif as_rows:
        program = Program(eye, c, np.concatenate([-eye, eye]), np.r_[zero, np.full(5, big)], A, [1])
    else:
        program = Program(eye, c, A=A, b=[1], lower=zero, upper=np.full(5, big))
    expected = truth(plain)
    _, x, gradients = asked(arguments(program), weight, wrt=("p", "b"))
    close(x, expected.x)
    close(gradients["p"], expected.gradient(weight))
    slopes = [truth(plain.moved(b=s * 1e-4)).x @ weight for s in (1, -1)]
    close(gradients["b"], [(slopes[0] - slopes[1]) / 2e-4], rtol=1e-8)  # x is linear in b here


def test_the_flow_conservation_of_a_network_is_differentiated_whatever_the_piece():
    """Ax = b holds on every piece, so y'Ax has the gradient y in b; 25 of the 60 flows are 0."""
    m, draws = 6, np.random.default_rng(1)
    arcs = [(i * m + j, i * m + j + 1) for i in range(m) for j in range(m - 1)]
    arcs += [(i * m + j, i * m + j + m) for i in range(m - 1) for j in range(m)]
    A, n = np.zeros((m * m, len(arcs))), len(arcs)
    for k, (tail, head) in enumerate(arcs):
        A[tail, k], A[head, k] = 1, -1
    b = np.zeros(m * m)
    b[0], b[-1] = 1, -1
    A, b = A[:-1], b[:-1]
    program = Program(np.eye(n), draws.random(n) + 0.5, A=A, b=b, lower=np.zeros(n))
    y = draws.normal(size=len(b))
    _, x, gradients = asked(arguments(program), y @ A, wrt=("p", "b"), degenerate="one_sided")
    expected = truth(program)
    assert (expected.x < 1e-9).sum() > 10
    close(x, expected.x)
    close(gradients["p"], np.zeros(n), atol=1e-9)
    close(gradients["b"], y)
    weight = draws.normal(size=n)
    _, _, gradients = asked(arguments(program), weight)
    close(gradients["p"], expected.gradient(weight))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_shortest_paths_on_a_grid_are_all_solved(ridge, dtype):
    """50 samples with costs of both signs, with all node rows or all but one; without a ridge x is constant."""
    m = 4
    arcs = [(i * m + j, i * m + j + 1) for i in range(m) for j in range(m - 1)]
    arcs += [(i * m + j, i * m + j + m) for i in range(m - 1) for j in range(m)]
    A, n = np.zeros((m * m, len(arcs))), len(arcs)
    for k, (tail, head) in enumerate(arcs):
        A[tail, k], A[head, k] = 1, -1
    b = np.zeros(m * m)
    b[0], b[-1] = 1, -1
    draws = np.random.default_rng(0)
    costs = draws.normal(size=(50, n)).astype(np.float32)
    weight = draws.random(n).astype(np.float32) + 1
    programs = [Program(ridge * np.eye(n), c, -np.eye(n), np.zeros(n), A, b) for c in costs]
    expected = [truth(program) for program in programs]
    eps = {F32: 1e-6, F64: 1e-9}[dtype]
    for rows in (slice(None, -1), slice(None)):
        args = arguments(programs[0], dtype)
        args["p"] = torch.tensor(costs, dtype=dtype)
        args["A"], args["b"] = args["A"][rows], args["b"][rows]
        for policy in ("raise", "zero"):
            layer, x, gradients = asked(args, weight, on_failure=policy)
            assert x.dtype == dtype
            assert layer.last.verdict == ("differentiable",) * 50
            close(x, [one.x for one in expected], atol=eps)
            close(gradients["p"], [one.gradient(weight) for one in expected], atol=eps * (1 + 10 * ridge))


@pytest.mark.parametrize(("m", "B"), [(250, 8), (1000, 2)])
def test_five_variables_and_many_rows(m, B):
    """Projections on m half-spaces; with no constraint but |x| <= 1 the first row alone would be active."""
    draws = np.random.default_rng(0)
    G = draws.normal(size=(m, 5))
    G /= np.linalg.norm(G, axis=1, keepdims=True)
    programs = [Program(np.eye(5), -3 * draws.normal(size=5), G, np.ones(m)) for _ in range(B)]
    args, weight = stacked(programs), draws.normal(size=5)
    args["G"], args["h"] = args["G"][0], args["h"][0]
    expected = [truth(program) for program in programs]
    assert max(len(one.strong) for one in expected) > 1
    _, x, gradients = asked(args, weight)
    close(x, [one.x for one in expected])
    close(gradients["p"], [one.gradient(weight) for one in expected])


def test_five_variables_400_rows_one_of_them_active():
    gen = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.ones(1, 5, dtype=F64), torch.randn(399, 5, generator=gen, dtype=F64)])
    args = {"Q": torch.eye(5, dtype=F64), "p": torch.full((1, 5), -3.0, dtype=F64)}
    args["G"] = torch.nn.functional.normalize(rows)
    args["h"] = torch.cat([tensor([1.0]), torch.full((399,), 9.0, dtype=F64)])
    weight = [1, 2, 3, 4, 5]
    _, x, gradients = asked(args, weight, wrt=("p", "h"))
    close(x, np.full((1, 5), 5**-0.5))
    close(gradients["p"], -mean_free(weight))
    close(gradients["h"], np.r_[15 * 5**-0.5, np.zeros(399)])
