"""The batched interior point for cone programs: optimality conditions, certificates, and Clarabel's answers."""

import importlib

import pytest
import torch

from foldopt.cones import ProductCone
from foldopt.cones._interior_point import (
    INFEASIBLE,
    LIMIT,
    NOT_FINITE,
    SOLVED,
    UNBOUNDED,
    solve_cone_program,
)
from foldopt.errors import InputError
from tests.drawn import F64, normal

SHAPES = [
    (5, {"zero": 2, "nonneg": 8}),
    (10, {"nonneg": 10, "soc": [4, 4, 3]}),
    (12, {"zero": 4, "nonneg": 5, "soc": [5, 1, 5, 2]}),
    (6, {"soc": [7]}),
    (4, {"zero": 2}),
    (4, {}),
]


def times(M, x):
    return (M @ x[..., None])[..., 0]


def solvable(B, n, dims, seed, rank):
    """Programs constructed from a known solution (x, z, s)."""
    cone = ProductCone(dims)
    A, x, v = normal(seed, B, cone.size, n), normal(seed + 1, B, n), normal(seed + 2, B, cone.size)
    s, p = cone.split(v)
    root = normal(seed + 3, B, n, rank)
    P = root @ root.mT
    return (P, -times(P, x) + times(A.mT, p), A, times(A, x) + s), (x, -p, s)


def worst(t):
    return t.abs().max() if t.numel() else t.new_zeros(())


def violations(program, dims, found):
    """The largest violation of the optimality conditions, relative to the largest entry."""
    P, q, A, b = program
    x, y, s = found.x, found.y, found.s
    parts = (
        times(P, x) + q + times(A.mT, y),
        times(A, x) + s - b,
        ProductCone(dims).project(s) - s,
        ProductCone(dims).dual().project(y) - y,
        (s * y).sum(1),
    )
    return max(map(worst, parts)) / (1 + max(map(worst, (q, b, x, y, s))))


@pytest.mark.parametrize("rank", [0, 2, 20])
@pytest.mark.parametrize(("n", "dims"), SHAPES)
def test_solutions_satisfy_the_optimality_conditions(n, dims, rank):
    program, (x, _, _) = solvable(30, n, dims, 10, rank)
    found = solve_cone_program(*program, dims, tol=1e-10)
    assert (found.status == SOLVED).all()
    assert found.iterations.max() <= 25
    assert violations(program, dims, found) < 1e-8
    P, q, _, _ = program
    mine, truth = (0.5 * (z * times(P, z)).sum(1) + (q * z).sum(1) for z in (found.x, x))
    torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-8)


def integer(B, n, dims, seed):
    """Programs with small integers: redundant and dependent rows, ties, empty interiors, no solutions."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator).to(F64)

    m = ProductCone(dims).size
    A = whole(-2, 2, B, m, n) * (torch.rand(B, m, n, generator=generator) < 0.6)
    root = whole(-1, 1, B, n, n) * (torch.rand(B, 1, 1, generator=generator) < 0.6)
    return root @ root.mT, whole(-3, 3, B, n), A, whole(-1, 4, B, m)


def clarabels(program, dims):
    """Clarabel's status and objective of one program."""
    clarabel, sparse = importlib.import_module("clarabel"), importlib.import_module("scipy.sparse")
    cones = [clarabel.ZeroConeT(dims["zero"])] if "zero" in dims else []
    cones += [clarabel.NonnegativeConeT(dims["nonneg"])] if "nonneg" in dims else []
    cones += [clarabel.SecondOrderConeT(d) for d in dims.get("soc", ())]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-9
    P, q, A, b = (part.numpy() for part in program)
    P, A = sparse.triu(P, format="csc"), sparse.csc_matrix(A)
    found = clarabel.DefaultSolver(P, q, A, b, cones, settings).solve()
    return str(found.status), found.obj_val


INTEGER = [
    (3, {"nonneg": 6}),
    (4, {"zero": 2, "nonneg": 6}),
    (4, {"zero": 1, "nonneg": 4, "soc": [3]}),
    (3, {"soc": [3, 3, 4]}),
    (4, {"zero": 3, "nonneg": 5, "soc": [3, 1]}),
]


@pytest.mark.parametrize(("n", "dims"), INTEGER)
def test_integer_programs_end_as_clarabels_do(n, dims):
    pytest.importorskip("clarabel")
    P, q, A, b = integer(60, n, dims, n)
    found = solve_cone_program(P, q, A, b, dims)
    assert (found.status == LIMIT).sum() <= 2
    cone, dual = ProductCone(dims), ProductCone(dims).dual()
    for i in range(60):
        status, objective = clarabels((P[i], q[i], A[i], b[i]), dims)
        x, y, s = found.x[i], found.y[i], found.s[i]
        if found.status[i] == SOLVED:
            assert status in ("Solved", "AlmostSolved"), i
            mine = (0.5 * x @ P[i] @ x + q[i] @ x).item()
            assert mine == pytest.approx(objective, rel=1e-7 if status == "Solved" else 1e-4, abs=1e-7), i
        elif found.status[i] == INFEASIBLE:
            assert "Infeasible" in status, i
            assert (A[i].T @ y).abs().max() < 1e-7
            assert (b[i] @ y).item() == pytest.approx(-1)
            assert (dual.project(y) - y).abs().max() < 1e-12 * (1 + y.abs().max())
            assert x.isnan().all()
        elif found.status[i] == UNBOUNDED:
            assert "Infeasible" in status, i  # a program may have a ray and be infeasible
            assert torch.maximum((P[i] @ x).abs().max(), (A[i] @ x + s).abs().max()) < 1e-7
            assert (q[i] @ x).item() == pytest.approx(-1)
            assert (cone.project(s) - s).abs().max() < 1e-12 * (1 + s.abs().max())
            assert y.isnan().all()


def test_each_sample_has_its_own_outcome():
    dims = {"nonneg": 2}
    A = torch.tensor([[1.0], [-1.0]], dtype=F64)
    b = torch.tensor([[1.0, 1], [1, -2], [torch.inf, 1], [3, 0], [torch.nan, 0]], dtype=F64)
    q = torch.tensor([[1.0], [1], [1], [-2], [1]], dtype=F64)
    found = solve_cone_program(None, q, A, b, dims)
    assert found.status.tolist() == [SOLVED, INFEASIBLE, NOT_FINITE, SOLVED, NOT_FINITE]
    torch.testing.assert_close(found.x[[0, 3], 0], torch.tensor([-1.0, 3], dtype=F64), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.y[1], torch.ones(2, dtype=F64), rtol=1e-7, atol=0)
    assert found.x[[1, 2, 4]].isnan().all()
    unbounded = solve_cone_program(None, q[:1], A[:1], b[:1, :1], {"nonneg": 1})
    assert unbounded.status.tolist() == [UNBOUNDED]
    torch.testing.assert_close(unbounded.x[0], -torch.ones(1, dtype=F64), rtol=1e-7, atol=0)
    alone = solve_cone_program(None, q[3:4], A, b[3:4], dims)
    torch.testing.assert_close(alone.x[0], found.x[3], rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("cost", [1e-6, 1e6])
def test_units_do_not_matter(size, cost):
    dims = {"zero": 2, "nonneg": 4, "soc": [3, 3]}
    program, _ = solvable(20, 8, dims, 30, 12)
    P, q, A, b = program
    rows = torch.tensor([1e4, 1, 1e-4, 1, 1e3, 1, 1e-3, 1e-3, 1e-3, 1e3, 1e3, 1e3], dtype=F64)
    plain = solve_cone_program(P, q, A, b, dims, tol=1e-11)
    found = solve_cone_program(cost * P, cost * size * q, rows[:, None] * A, size * rows * b, dims, tol=1e-11)
    assert (found.status == SOLVED).all()
    back = found._replace(x=found.x / size, s=found.s / size / rows, y=found.y / cost / size * rows)
    assert violations(program, dims, back) < 1e-8
    torch.testing.assert_close(back.x, plain.x, rtol=1e-5, atol=1e-5)


def test_dependent_and_repeated_rows():
    dims = {"zero": 4, "nonneg": 6}
    A = torch.cat([torch.ones(1, 3), torch.ones(1, 3), 2 * torch.ones(1, 3), torch.zeros(1, 3), -torch.eye(3)]).to(F64)
    A = torch.cat([A, -torch.eye(3, dtype=F64)])
    b = torch.tensor([1.0, 1, 2, 0, 0, 0, 0, 0, 0, 0], dtype=F64)
    v = normal(5, 40, 3)
    found = solve_cone_program(torch.eye(3, dtype=F64), -v, A, b, dims, tol=1e-11)
    assert (found.status == SOLVED).all()
    top = v.sort(1, descending=True)[0]
    level = (top.cumsum(1) - 1) / torch.arange(1, 4)
    theta = level.gather(1, ((top > level).sum(1, keepdim=True) - 1))
    torch.testing.assert_close(found.x, (v - theta).clamp(min=0), rtol=0, atol=1e-6)


def test_shared_arguments_and_precision():
    dims = {"nonneg": 4, "soc": [3]}
    (P, q, A, b), _ = solvable(3, 5, dims, 50, 4)
    shared = solve_cone_program(P[0].float(), q.float(), A[0].float(), b[0].float(), dims)
    full = solve_cone_program(
        P[:1].float().expand(3, 5, 5), q.float(), A[:1].float().expand(3, 7, 5), b[:1].float().expand(3, 7), dims
    )
    assert shared.x.dtype == F64
    torch.testing.assert_close(shared, full, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": {"exp": 1}}, r"dims has \['exp'\]: this solver knows"),
        ({"q": normal(0, 3)}, r"q has shape \(3,\), expected \(B, n\)"),
        ({"A": normal(0, 4, 3)}, r"A has shape \(4, 3\), expected \(3, 3\) or \(2, 3, 3\)"),
        ({"b": normal(0, 5, 3)}, r"b has shape \(5, 3\)"),
        ({"P": normal(0, 3)}, r"P has shape \(3,\)"),
        ({"tol": 0.0}, "tol=0.0: expected a number above 0"),
        ({"max_iter": 0}, "max_iter=0: expected a whole number"),
    ],
)
def test_bad_arguments(change, message):
    given = {"P": None, "q": normal(0, 2, 3), "A": normal(1, 3, 3), "b": normal(2, 3), "dims": {"soc": [3]}}
    with pytest.raises(InputError, match=message):
        solve_cone_program(**{**given, **change})


def test_no_sample_left():
    A, b = normal(0, 3, 2), normal(1, 3)
    for q in (torch.full((2, 2), torch.nan, dtype=F64), torch.zeros(0, 2, dtype=F64)):
        found = solve_cone_program(None, q, A, b, {"soc": [3]})
        assert found.status.tolist() == [NOT_FINITE] * len(q)
        assert found.x.shape == q.shape


def test_a_capped_run_says_so():
    program, _ = solvable(4, 10, {"nonneg": 10, "soc": [4, 4]}, 60, 4)
    found = solve_cone_program(*program, {"nonneg": 10, "soc": [4, 4]}, max_iter=2)
    assert (found.status == LIMIT).all()
    assert (found.residual > 1e-9).all()
    assert found.iterations.tolist() == [2] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda():
    dims = {"zero": 2, "nonneg": 5, "soc": [4, 3]}
    program, _ = solvable(20, 8, dims, 70, 12)
    here = solve_cone_program(*program, dims, tol=1e-10)
    there = solve_cone_program(*(part.cuda() for part in program), dims, tol=1e-10)
    assert (there.status == SOLVED).all()
    torch.testing.assert_close(there.x.cpu(), here.x, rtol=1e-4, atol=1e-4)
