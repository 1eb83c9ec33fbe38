"""Gradients of the sparse QP layer for every argument and layout, against differences of an independent solver."""

from functools import cache

import numpy as np
import pytest
import torch

import foldopt
from foldopt.qp.matrix import Pattern, SparseMatrix
from tests.foldopt.qp.programs import ARGUMENTS, F32, F64, Program, clarabel, exact, stacked, truth
from tests.foldopt.qp.sparse import LAYOUTS, MATRICES, arguments, asked, call, densely, leaf, sparse

WEIGHT = np.array([1.0, -2.0, 3.0, 0.5])
STEP = 1e-3
SEEDS = (0, 1, 2)


def drawn(seed):
    """Return integer data in 4 variables: tridiagonal Q, two entries in the rows of G, three in that of A, bounds."""
    draws = np.random.default_rng(seed)
    off = draws.integers(-2, 3, 3)
    Q = np.diag(draws.integers(5, 9, 4)) + np.diag(off, 1) + np.diag(off, -1)
    G, A = np.zeros((3, 4)), np.array([[1.0, 2.0, 0.0, -1.0]])
    for row in G:
        row[draws.choice(4, 2, replace=False)] = draws.choice([-2, -1, 1, 2, 3], 2)
    p, h, b = draws.integers(-9, 10, 4), draws.integers(-1, 3, 3), draws.integers(-2, 3, 1)
    return Program(Q, p, G, h, A, b, draws.integers(-2, 0, 4), draws.integers(1, 3, 4))


def x_of(program):
    status, x, y = clarabel(program)
    assert status == "solved"
    return exact(program, x, y)[0]


def is_regular(program, active=(2, 4)):
    """Return whether the active rows are independent, have multipliers, and stay active for the differences."""
    found = truth(program) if clarabel(program)[0] == "solved" else None
    if found is None or len(found.weak) or not active[0] <= len(found.strong) < active[1]:
        return False
    C, low, high = program.rows()
    slack = np.sort(np.minimum(high - C @ found.x, C @ found.x - low))
    S = found.strong
    multipliers = np.linalg.lstsq(S.T, -(program.Q @ found.x + program.p), rcond=None)[0]
    carried = np.abs(multipliers).min() > 0.3
    return carried and np.linalg.matrix_rank(S) == len(S) and slack[len(S)] > 0.1


@cache
def regular(which):
    """Return the regular program number `which` with integer data."""
    return [one for one in map(drawn, range(200)) if is_regular(one)][which]


def slope(program, name, place, weight=WEIGHT):
    """Return the derivative of weight'x with respect to one entry, by extrapolated central differences."""
    step = np.zeros_like(getattr(program, name))
    step[place] = STEP
    step = (step + step.T) / 2 if name == "Q" else step
    f = [weight @ x_of(program.moved(**{name: k * step})) for k in (-2, -1, 1, 2)]
    return (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * STEP)


@cache
def slopes(which, name):
    """Return the derivatives with respect to all entries of an argument, in its shape."""
    program = regular(which)
    found = np.zeros_like(getattr(program, name))
    for place in np.ndindex(found.shape):
        found[place] = slope(program, name, place)
    return torch.tensor(found)


def patterns(program, symmetric=True):
    """Return the patterns of the matrices, with one explicit zero each; the upper triangle of an unsymmetric Q."""
    at = {name: torch.tensor(getattr(program, name) != 0) for name in MATRICES}
    at["Q"][0, 3] = at["Q"][3, 0] = at["A"][0, 2] = True
    at["G"][0] = True
    return at if symmetric else at | {"Q": at["Q"].triu()}


def given(which, layout, symmetric=True, dtype=F64):
    """Return the arguments of a program with sparse matrices, and where these have entries."""
    program, at = regular(which), patterns(regular(which), symmetric)
    args = arguments(program, dtype)
    if not symmetric:
        args["Q"] = args["Q"].triu() + args["Q"].triu(1)
    return args | {name: sparse(args[name], layout, at[name]) for name in MATRICES}, at


def near(found, expected, tol=1e-7):
    torch.testing.assert_close(found, expected, rtol=0, atol=tol * (1 + float(expected.abs().max())))


def right(gradients, args, which, at, tol=1e-7):
    """Compare gradients with the slopes, those of matrices on their patterns only."""
    for name, gradient in gradients.items():
        full = densely(gradient, args[name])
        expected = slopes(which, name).to(full.dtype)
        near(full, torch.where(at[name], expected, 0) if name in MATRICES else expected, tol)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "upper triangle"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", SEEDS)
def test_every_argument_against_differences(which, layout, symmetric):
    args, at = given(which, layout, symmetric)
    layer, x, gradients = asked(args, WEIGHT, ARGUMENTS)
    near(x[0], torch.tensor(x_of(regular(which))), 1e-10)
    assert layer.last.verdict == ("differentiable",)
    assert set(gradients) == set(ARGUMENTS)
    right(gradients, args, which, at)
    for name in MATRICES:
        M, gradient = args[name], gradients[name]
        if layout == "SparseMatrix":
            assert gradient.shape == M.values.shape
            continue
        assert gradient.layout == M.layout
        assert gradient.shape == M.shape
        parts = {"coo": ["indices"], "csr": ["crow_indices", "col_indices"], "csc": ["ccol_indices", "row_indices"]}
        for part in parts[layout]:
            assert torch.equal(getattr(gradient, part)(), getattr(M, part)()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_in_and_out(layout):
    args, at = given(0, layout, dtype=F32)
    _, x, gradients = asked(args, WEIGHT, ARGUMENTS)
    assert x.dtype == F32
    assert {gradient.dtype for gradient in gradients.values()} == {F32}
    near(x[0], torch.tensor(x_of(regular(0)), dtype=F32), 1e-6)
    right(gradients, args, 0, at, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_converted(layout):
    args, _ = given(0, layout, dtype=torch.int64)
    x = call(foldopt.QPLayer(), args | {"p": args["p"].to(F64)})
    near(x[0], torch.tensor(x_of(regular(0))), 1e-10)


@pytest.mark.parametrize("shared", [(), ("Q",), ("G", "h"), ("A", "b", "lower"), ARGUMENTS], ids=str)
def test_what_the_batch_shares_gets_the_sum_and_the_rest_its_own_gradient(shared):
    args = stacked([regular(0).moved(p=[0.1 * i, 0, 0, -0.05 * i]) for i in range(3)])
    for name in set(args) - {"p", "lower"}:
        args[name] *= 1 + 0.01 * torch.arange(3.0).view(3, *[1] * (args[name].dim() - 1))
    args |= {name: args[name][0] for name in shared if name != "p"}
    own = {name: part.dim() > 1 + (name in MATRICES) for name, part in args.items()}
    at = patterns(regular(0))
    weights = torch.tensor(WEIGHT) * torch.tensor([[1.0], [2.0], [-1.0]])
    expected, solutions = {name: torch.zeros_like(args[name]) for name in args}, []
    for i in range(3):
        program = Program(**{name: (part[i] if own[name] else part).numpy() for name, part in args.items()})
        solutions.append(x_of(program))
        for name, target in expected.items():
            target = target[i] if own[name] else target
            for place in at[name].nonzero().tolist() if name in at else np.ndindex(target.shape):
                target[tuple(place)] += slope(program, name, tuple(place), weights[i].numpy())
    for layout in LAYOUTS:
        made = args | {name: sparse(args[name], layout, at[name]) for name in MATRICES}
        _, x, gradients = asked(made, weights, ARGUMENTS)
        near(x, torch.tensor(np.stack(solutions)), 1e-9)
        for name, gradient in gradients.items():
            M = made[name]
            assert gradient.shape == (M.values if isinstance(M, SparseMatrix) else M).shape
            near(densely(gradient, M), expected[name])


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_patterns_that_differ_between_the_samples(layout):
    """G has its entries in different columns in each sample, and the gradient has them there too."""
    programs = [regular(which) for which in SEEDS]
    assert len({(one.G != 0).tobytes() for one in programs}) == 3
    args = stacked(programs)
    args["A"] = args["A"][0]
    G = args["G"].to_sparse() if layout == "coo" else args["G"].to_sparse_csr()
    assert G.values().numel() == 18
    made = args | {"Q": sparse(args["Q"], layout), "A": sparse(args["A"], layout), "G": G}
    _, x, gradients = asked(made, WEIGHT, ("G", "p"))
    near(x, torch.tensor(np.stack([x_of(one) for one in programs])), 1e-10)
    assert gradients["G"].layout == G.layout
    assert gradients["G"].values().shape == G.values().shape
    for i, which in enumerate(SEEDS):
        near(gradients["p"][i], slopes(which, "p"))
        full = gradients["G"].to_dense()[i]
        near(full, torch.where(args["G"][i] != 0, slopes(which, "G"), 0))


def test_entries_in_any_order_and_in_parts():
    """An uncoalesced COO tensor with every entry split in halves, in random order, and a SparseMatrix in that order."""
    args, at = given(1, "coo")
    order = torch.randperm(len(args["Q"].values()), generator=torch.Generator().manual_seed(0))
    made = dict(args)
    for name in MATRICES:
        M, mixed = args[name], order[order < len(args[name].values())]
        indices, values = M.indices()[:, mixed], M.values()[mixed] / 2
        twice = torch.sparse_coo_tensor(indices.repeat(1, 2), values.repeat(2), M.shape, check_invariants=True)
        assert not twice.is_coalesced()
        made[name] = twice
    _, _, gradients = asked(made, WEIGHT, MATRICES)
    right(gradients, made, 1, at)
    for name in MATRICES:
        mixed = order[order < len(args[name].values())]
        pattern = Pattern(*args[name].indices()[:, mixed], tuple(args[name].shape))
        made[name] = SparseMatrix(pattern, args[name].values()[mixed])
    _, _, gradients = asked(made, WEIGHT, MATRICES)
    right(gradients, made, 1, at)


def test_scipy_matrices_of_every_format_with_duplicates_are_constants_left_as_they_are():
    sp = pytest.importorskip("scipy.sparse")
    args = arguments(regular(2))
    expected = {name: slopes(2, name) for name in ("p", "h", "b", "lower", "upper")}
    for make in (sp.coo_matrix, sp.csr_matrix, sp.csc_matrix, sp.lil_matrix, sp.dok_matrix, sp.csr_array, sp.bsr_array):
        made = args | {name: make(args[name].numpy()) for name in MATRICES}
        layer, x, gradients = asked(made, WEIGHT, tuple(expected))
        near(x[0], torch.tensor(x_of(regular(2))), 1e-10)
        for name in expected:
            near(gradients[name], expected[name])
    rows, columns = args["G"].nonzero().numpy().T
    half = args["G"].numpy()[rows, columns] / 2
    parts = np.r_[half[::-1], half], (np.r_[rows[::-1], rows], np.r_[columns[::-1], columns])
    pointers = np.r_[0, np.cumsum(np.bincount(rows, minlength=3) * 2)]
    twice = (
        np.repeat(half.reshape(3, 2)[:, ::-1], 2, 1).ravel(),
        np.repeat(columns.reshape(3, 2)[:, ::-1], 2, 1).ravel(),
    )
    unsorted = sp.csr_matrix((*twice, pointers), shape=(3, 4))
    for G in (sp.coo_matrix(parts, shape=(3, 4)), unsorted):
        _, x, gradients = asked(made | {"G": G}, WEIGHT, ("p", "h"), layer=layer)
        near(x[0], torch.tensor(x_of(regular(2))), 1e-10)
        near(gradients["h"], expected["h"])
        assert G.nnz == 12, "the caller's matrix is as it was"


@pytest.mark.parametrize("kept", MATRICES)
def test_dense_and_sparse_matrices_mixed(kept):
    """A dense matrix gets its whole gradient, including that of its zeros."""
    args, at = given(0, "csr")
    made = args | {kept: arguments(regular(0))[kept]}
    _, _, gradients = asked(made, WEIGHT, ARGUMENTS)
    assert gradients[kept].layout == torch.strided
    right(gradients, made, 0, at | {kept: torch.ones_like(at[kept])})
    other = next(name for name in MATRICES if name != kept)
    layouts = dict(zip(MATRICES, ("csc", "coo", "csr"), strict=True))
    made = {**args, **{name: sparse(arguments(regular(0))[name], layouts[name], at[name]) for name in MATRICES}}
    _, _, gradients = asked(made, WEIGHT, (kept, other))
    right(gradients, made, 0, at)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_backward_adds_to_what_is_there(layout):
    args, at = given(0, layout)
    leaves = {name: leaf(args[name])[0] for name in MATRICES}
    layer = foldopt.QPLayer()
    for _ in range(2):
        (call(layer, args | leaves) * torch.tensor(WEIGHT)).sum().backward()
    for name, part in leaves.items():
        assert part.grad.layout == part.layout
        near(part.grad.to_dense(), torch.where(at[name], 2 * slopes(0, name), 0))


def test_values_that_a_network_made_and_a_matrix_in_two_places():
    """G = exp(w) on a pattern, and the gradient reaches w. The same matrix is A in another layer."""
    args, at = given(0, "coo")
    pattern = at["G"].nonzero().mT
    values = arguments(regular(0))["G"][tuple(pattern)]
    w = values.clone().requires_grad_()
    G = torch.sparse_coo_tensor(pattern, w.sin() + (values - values.sin()), (3, 4), check_invariants=True)
    first = call(foldopt.QPLayer(), args | {"G": G})
    (gradient,) = torch.autograd.grad(first @ torch.tensor(WEIGHT), w, retain_graph=True)
    near(gradient, slopes(0, "G")[tuple(pattern)] * values.cos())
    second = foldopt.QPLayer()(torch.eye(4, dtype=F64), torch.zeros(4, dtype=F64), A=G, b=torch.ones(3, dtype=F64))
    (alone,) = torch.autograd.grad(second.sum(), w, retain_graph=True)
    (both,) = torch.autograd.grad(first @ torch.tensor(WEIGHT) + second.sum(), w)
    near(both, gradient + alone, 1e-12)
