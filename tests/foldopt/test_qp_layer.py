"""QPLayer in the uses of qpth: every argument, shared and batched, large, degenerate and infeasible programs."""

import pytest
import torch

import foldopt
from foldopt.errors import InfeasibleError, KinkError, UnboundedError
from tests.foldopt.programs import F64, quadratic_programs, solve_by_kkt

ARGUMENTS = ["Q", "p", "G", "h", "A", "b"]
ROWS = {"few rows": {"n": 12, "m": 8, "k": 2}, "many rows": {"n": 8, "m": 10, "k": 2}}  # with and without `Saddle`


def agree(mine, other):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("linear_solver", ["auto", "direct", "gmres"])
@pytest.mark.parametrize("rows", ROWS)
def test_the_qp_layer_against_the_kkt_system(linear_solver, rows):
    """Phi is 0, so that the linear solver has nothing to do."""
    data = quadratic_programs(**ROWS[rows])
    x = foldopt.QPLayer(linear_solver=linear_solver)(*data)
    expected = solve_by_kkt(*data)
    assert (expected.active.sum(1) > 0).any()
    torch.testing.assert_close(x, expected.x, atol=1e-9, rtol=0)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    mine, exact = (list(torch.autograd.grad(y, data, g)) for y in (x, expected.x))
    for gradients in (mine, exact):
        gradients[0] = gradients[0] + gradients[0].T
    agree(mine, exact)


@pytest.mark.parametrize("linear_solver", ["auto", "gmres", "least_squares"])
def test_redundant_constraints_change_no_gradient(linear_solver):
    """x <= 1 beside x >= 0 and sum x = 1, and a bound that is given twice: the dual is not unique, the gradient is."""
    n, gen = 5, torch.Generator().manual_seed(0)
    p = torch.randn(200, n, generator=gen, dtype=F64).requires_grad_()
    g = torch.randn(200, n, generator=gen, dtype=F64)
    eye, ones = torch.eye(n, dtype=F64), torch.ones(1, n, dtype=F64)
    least, more = (-eye, torch.zeros(n, dtype=F64)), (torch.cat([-eye, eye, -2 * eye[:1]]), torch.zeros(2 * n + 1))
    more[1][n : 2 * n] = 1
    gradients = []
    for G, h in (least, more):
        layer = foldopt.QPLayer(linear_solver=linear_solver)
        x = layer(eye, p, G, h.to(F64), ones, ones[:, 0])
        gradients.append(torch.autograd.grad(x, p, g)[0])
    assert int((x.detach() > 1e-9).sum(1).min()) == 1  # some samples are at vertices, where x = 1 is active
    assert layer.last.backward.ok.all()
    assert set(layer.last.verdict) == {"differentiable"}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_the_qp_layer_against_qpth_given_expanded_arguments():
    """qpth averages the gradient of a shared argument, so it gets a copy of each argument per sample."""
    qpth = pytest.importorskip("qpth.qp")
    data = quadratic_programs(B=32)
    g = torch.randn(32, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = foldopt.QPLayer()(*data)
    expanded = [t if t.dim() == (2 if i in (1, 3, 5) else 3) else t.expand(32, *t.shape) for i, t in enumerate(data)]
    theirs = qpth.QPFunction(verbose=-1, eps=1e-14, maxIter=60)(*expanded)
    torch.testing.assert_close(x, theirs, atol=1e-6, rtol=0)
    mine, other = (torch.autograd.grad(y, data[1:], g) for y in (x, theirs))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_qp_layer_without_equalities_in_float32_and_per_sample():
    Q, p, G, h, _, _ = (t.detach() for t in quadratic_programs(B=5))
    low = [t.float().requires_grad_() for t in (Q, p, G, h)]
    x = foldopt.QPLayer()(*low)
    assert x.dtype == torch.float32
    gradients = torch.autograd.grad(x.square().sum(), low)
    layer = foldopt.QPLayer()
    total = torch.zeros_like(gradients[0])
    for i in range(5):
        single = low[0].detach().clone().requires_grad_()
        row = layer(single, low[1][i], low[2], low[3][i : i + 1])
        total += torch.autograd.grad(row.square().sum(), single)[0]
    torch.testing.assert_close(gradients[0], total, rtol=1e-4, atol=1e-5)


def test_an_infeasible_program_among_good_ones():
    Q, p, G, h, A, b = quadratic_programs(B=4)
    with torch.no_grad():
        G = torch.cat([G, -G[:1]])
        h = torch.cat([h, 5.0 - h[:, :1]], 1)
        h[2, -1] = -h[2, 0] - 1
    with pytest.raises(InfeasibleError, match=r"infeasible at 1 of 4 samples, first \[2\]") as caught:  # by its cause
        foldopt.QPLayer()(Q, p, G, h, A, b)
    assert caught.value.indices == (2,)
    x = foldopt.QPLayer(on_failure="zero")(Q, p, G, h, A, b)
    assert x[2].isnan().all()
    x[[0, 1, 3]].square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (Q, p, A, b)), "it does not touch what the batch shares"
    assert (p.grad[2] == 0).all()


def test_a_weakly_active_constraint_is_a_kink():
    """min 1/2 |x|^2 + p'x on the simplex at p = (-1, 0): x = (1, 0) and the bound on x_2 has multiplier 0. It used to
    count as active without a word; now that is refused, and asked for by name one of the two sides is returned."""
    p = torch.tensor([[-1.0, 0.0]], dtype=F64, requires_grad=True)
    eye, ones = torch.eye(2, dtype=F64), torch.ones(1, 2, dtype=F64)
    program = eye, p, -eye, torch.zeros(2, dtype=F64), ones, torch.ones(1, dtype=F64)
    layer = foldopt.QPLayer()
    x = layer(*program)
    assert x.tolist() == [[1.0, 0.0]]
    with pytest.raises(KinkError, match=r"at sample 0: G\[1\]"):
        torch.autograd.grad(x[0, 0], p)
    assert layer.last.verdict == ("kink",)
    (gradient,) = torch.autograd.grad(foldopt.QPLayer(degenerate="one_sided")(*program)[0, 0], p)
    sides = torch.tensor([[[0.0, 0.0]], [[-0.5, 0.5]]], dtype=F64)
    assert (gradient - sides).abs().amax((1, 2)).min() < 1e-12


def test_the_qp_layer_against_cvxpylayers():
    """cvxpylayers takes a square root of Q, so the gradient with respect to Q is not compared."""
    pytest.importorskip("cvxpylayers")
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n, m, k = 8, 10, 2
    data = quadratic_programs(B=8)
    x, p, G, h, A, b = (
        cp.Variable(n),
        cp.Parameter(n),
        cp.Parameter((m, n)),
        cp.Parameter(m),
        cp.Parameter((k, n)),
        cp.Parameter(k),
    )
    root = torch.linalg.cholesky(data[0].detach()).mT.numpy()
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(root @ x) + p @ x), [G @ x <= h, A @ x == b])
    peer = CvxpyLayer(problem, [p, G, h, A, b], [x])
    arguments = {"solve_method": "SCS", "eps": 1e-11, "max_iters": 100_000, "n_jobs_forward": 1, "n_jobs_backward": 1}
    (theirs,) = peer(*data[1:], solver_args=arguments)
    mine = foldopt.QPLayer()(*data)
    torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=0)
    g = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for a, c in zip(*(torch.autograd.grad(y, data[1:], g) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5 * float(c.abs().max()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "shared"])
@pytest.mark.parametrize("argument", range(6), ids=ARGUMENTS)
def test_the_gradient_of_each_argument_by_itself(argument, batched, rows):
    """As in qpth's tests, one argument requires grad and is compared with differences along 20 directions."""
    data = [t.detach() for t in quadratic_programs(B=10, **ROWS[rows])]
    value = data[argument]
    single = 2 if argument in (0, 2, 4) else 1
    if batched and value.dim() == single:
        value = value.expand(10, *value.shape).clone()
    elif not batched and value.dim() > single:
        value = value[0].clone()
    layer = foldopt.QPLayer()

    def x(value):
        return layer(*data[:argument], value, *data[argument + 1 :])

    leaf = value.clone().requires_grad_()
    weight = torch.randn(10, data[1].shape[-1], generator=torch.Generator().manual_seed(4), dtype=F64)
    (gradient,) = torch.autograd.grad((x(leaf) * weight).sum(), leaf)
    assert gradient.shape == value.shape
    gen = torch.Generator().manual_seed(5)
    for _ in range(20):
        d = torch.randn(value.shape, generator=gen, dtype=F64)
        d = d + d.mT if argument == 0 else d
        slope = ((x(value + 1e-6 * d) - x(value - 1e-6 * d)) * weight).sum() / 2e-6
        assert float((gradient * d).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-5)


def test_bounds_are_met_exactly_and_an_infinite_one_is_none():
    """Users often take the logarithm of x next."""
    eye = torch.eye(3, dtype=F64)
    p = torch.tensor([[0.0, 1.0, 1.0], [1e5, -1e-4, 1e-4]], dtype=F64, requires_grad=True)
    x = foldopt.QPLayer()(eye, p, None, None, torch.ones(1, 3), torch.ones(1), lower=torch.zeros(3))
    assert x[0].tolist() == [1.0, 0.0, 0.0]
    bounded = foldopt.QPLayer()(eye, p, lower=torch.tensor([-torch.inf, 0, 0]), upper=torch.full((3,), torch.inf))
    assert bounded.tolist() == [[0.0, 0.0, 0.0], [-1e5, 1e-4, 0.0]]


def test_an_unbounded_program_whose_bounds_are_all_zero():
    with pytest.raises(UnboundedError, match=r"along a ray in x\[0\]"):
        foldopt.QPLayer()(torch.zeros(2, 2), torch.tensor([[-1.0, 0.0]]), lower=torch.zeros(2))


def test_one_variable_and_one_bound():
    """min 1/2 x^2 + p x subject to x <= 1."""
    p = torch.tensor([[-0.5], [-3.0]], dtype=F64, requires_grad=True)
    h = torch.ones(1, dtype=F64, requires_grad=True)
    x = foldopt.QPLayer()(torch.ones(1, 1), p, torch.ones(1, 1), h)
    torch.testing.assert_close(x.detach(), torch.tensor([[0.5], [1.0]], dtype=F64).to(x))
    grad_p, grad_h = torch.autograd.grad(x.sum(), (p, h))
    torch.testing.assert_close(grad_p, torch.tensor([[-1.0], [0.0]], dtype=F64), rtol=0, atol=1e-15)
    torch.testing.assert_close(grad_h, torch.ones(1, dtype=F64), rtol=0, atol=1e-15)


def sudoku(side=4):
    """The constraints of a mini-sudoku on side^3 indicator variables: rows, columns, boxes, cells, each number once."""
    box = int(side**0.5)
    place = torch.arange(side**3).reshape(side, side, side)
    groups = [place[i, j, :] for i in range(side) for j in range(side)]
    groups += [place[i, :, k] for i in range(side) for k in range(side)]
    groups += [place[:, j, k] for j in range(side) for k in range(side)]
    groups += [
        place[i : i + box, j : j + box, k].flatten()
        for i in range(0, side, box)
        for j in range(0, side, box)
        for k in range(side)
    ]
    A = torch.zeros(len(groups), side**3, dtype=F64)
    for row, group in enumerate(groups):
        A[row, group] = 1
    chosen = []
    for row in range(len(A)):
        if torch.linalg.matrix_rank(A[[*chosen, row]]) > len(chosen):
            chosen.append(row)
    return A[chosen]


def test_a_sudoku_and_its_degenerate_dual():
    """OptNet's problem, min 0.05 |z|^2 - p'z: given a hint it has a solution in whole numbers, a vertex with more
    active constraints than variables, which moves with nothing; without one it lies inside and moves."""
    A = sudoku()
    k, n = A.shape
    assert n == 64
    gen = torch.Generator().manual_seed(0)
    solved = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]) - 1
    indicator = torch.nn.functional.one_hot(solved, 4).flatten().to(F64)
    p = -torch.stack([3 * indicator, torch.zeros(n, dtype=F64)]) + 1e-3 * torch.randn(2, n, generator=gen, dtype=F64)
    p.requires_grad_()
    Q, G, h, b = 0.1 * torch.eye(n, dtype=F64), -torch.eye(n, dtype=F64), torch.zeros(n, dtype=F64), torch.ones(k)
    layer = foldopt.QPLayer()
    z = layer(Q, p, G, h, A, b.to(F64))
    torch.testing.assert_close(z[0], indicator, atol=1e-9, rtol=0)
    g = torch.randn(n, generator=gen, dtype=F64)
    (gradient,) = torch.autograd.grad((z * g).sum(), p)
    assert layer.fold.last.backward.ok.all()
    assert float(gradient[0].abs().max()) < 1e-9
    null = torch.eye(n, dtype=F64) - torch.linalg.pinv(A) @ A
    torch.testing.assert_close(gradient[1], -10 * null @ g, rtol=1e-7, atol=1e-7)


def test_a_learned_operator_of_sudoku_size():
    """64 variables, 64 inequalities and 40 learned equalities, shared by the batch."""
    gen = torch.Generator().manual_seed(1)
    A = torch.rand(40, 64, generator=gen, dtype=F64).requires_grad_()
    p = torch.randn(6, 64, generator=gen, dtype=F64)
    Q, G, h = 0.1 * torch.eye(64, dtype=F64), -torch.eye(64, dtype=F64), torch.zeros(64, dtype=F64)
    inside = torch.rand(64, generator=gen, dtype=F64)
    layer = foldopt.QPLayer()
    weight = torch.randn(6, 64, generator=gen, dtype=F64)

    def loss(A):
        return (layer(Q, p, G, h, A, A @ inside) * weight).sum()

    (gradient,) = torch.autograd.grad(loss(A), A)
    with torch.no_grad():
        for _ in range(5):
            d = torch.randn(A.shape, generator=gen, dtype=F64)
            slope = (loss(A + 1e-7 * d) - loss(A - 1e-7 * d)) / 2e-7
            assert float((gradient * d).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-5)
