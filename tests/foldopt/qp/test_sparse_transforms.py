"""Higher derivatives, forward mode and torch.func through sparse QPs, against closed forms on the active rows."""

import numpy as np
import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import foldopt
from foldopt.qp.matrix import Pattern, SparseMatrix
from tests.foldopt.qp.programs import F64, Program, tensor, truth
from tests.foldopt.qp.sparse import MATRICES, all_sparse, arguments

# Active: the first row of G, the equality and the lower bound of x_4; all carry.
PROGRAM = Program(
    np.diag([4, 3, 5, 2]) + np.diag([1, 0, 0], 1) + np.diag([1, 0, 0], -1),
    [-6, 1, -4, 3],
    [[1, 0, 1, 0], [0, 1, 0, 2]],
    [1, 4],
    [[0, 1, 1, 0]],
    [1],
    [-2, -2, -2, 0],
    [3, 3, 3, 3],
)
ARGS = arguments(PROGRAM)
NAMES = ("p", "h", "b", "lower", "upper")
VECTORS = tuple(ARGS[name] for name in NAMES)
PATTERNS = {name: Pattern(*ARGS[name].nonzero(as_tuple=True), tuple(ARGS[name].shape)) for name in MATRICES}
VALUES = tuple(ARGS[name][PATTERNS[name].rows, PATTERNS[name].columns] for name in MATRICES)
GENERATOR = torch.Generator().manual_seed(0)


def on_active_rows(Q, G, A, p, h, b, lower, upper):
    """Return x by the KKT matrix of the rows that are active."""
    Q = (Q + Q.mT) / 2
    S, right = torch.cat([A, G[:1], torch.eye(4, dtype=F64)[3:]]), torch.cat([b, h[:1], lower[3:]])
    K = torch.cat([torch.cat([Q, S.mT], 1), torch.cat([S, torch.zeros(3, 3, dtype=F64)], 1)])
    return torch.linalg.solve(K, torch.cat([-p, right]))[:4]


def closed(*vectors):
    return on_active_rows(*(ARGS[name] for name in MATRICES), *vectors)


def full(name, values):
    pattern = PATTERNS[name]
    zero = torch.zeros(pattern.shape, dtype=F64)
    return torch.index_put(zero, (pattern.rows, pattern.columns), values)


def closed_in_values(*values):
    return on_active_rows(*(full(*pair) for pair in zip(MATRICES, values, strict=True)), *VECTORS)


def layer_of(layout):
    constant, layer = all_sparse(ARGS, layout), foldopt.QPLayer()

    def x(*vectors):
        p, h, b, lower, upper = vectors
        matrices = (constant[name] for name in MATRICES)
        Q, G, A = matrices
        return layer(Q, p, G, h, A, b, lower=lower, upper=upper)[0]

    return x


def in_values(*values):
    Q, G, A = (SparseMatrix(PATTERNS[name], one) for name, one in zip(MATRICES, values, strict=True))
    p, h, b, lower, upper = VECTORS
    return foldopt.QPLayer()(Q, p, G, h, A, b, lower=lower, upper=upper)[0]


FORMS = {
    **{layout: (layer_of(layout), closed, VECTORS) for layout in ("coo", "csr", "csc", "SparseMatrix")},
    "values": (in_values, closed_in_values, VALUES),
}
forms = pytest.mark.parametrize("form", FORMS)


def near(found, expected, tol=1e-9):
    if isinstance(found, tuple):
        for a, b in zip(found, expected, strict=True):
            near(a, b, tol)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=tol * (1 + float(expected.abs().max())))


def drawn(like, *batch):
    return tuple(torch.randn(*batch, *t.shape, generator=GENERATOR, dtype=F64) for t in like)


def test_the_active_rows_are_those_of_the_closed_form():
    found = truth(PROGRAM)
    assert len(found.strong) == 3
    assert not len(found.weak)
    near(closed(*VECTORS), tensor(found.x), 1e-10)


@forms
def test_jacobians(form):
    layer, exact, at = FORMS[form]
    every = tuple(range(len(at)))
    near(layer(*at), exact(*at), 1e-12)
    expected = jacrev(exact, every)(*at)
    near(jacrev(layer, every)(*at), expected)
    near(jacfwd(layer, every)(*at), expected)


@forms
def test_forward_and_reverse_products(form):
    layer, exact, at = FORMS[form]
    tangents, (cotangent,) = drawn(at), drawn([VECTORS[0]])
    near(jvp(layer, at, tangents), jvp(exact, at, tangents))
    near(vjp(layer, *at)[1](cotangent), vjp(exact, *at)[1](cotangent))


@forms
def test_vmap_and_gradients_per_sample(form):
    layer, exact, at = FORMS[form]
    many = tuple(t + 1e-3 * d for t, d in zip(at, drawn(at, 3), strict=True))
    expected = torch.stack([exact(*(t[i] for t in many)) for i in range(3)])
    near(vmap(layer)(*many), expected)
    every = tuple(range(len(at)))
    near(
        vmap(grad(lambda *a: layer(*a).pow(3).sum(), every))(*many),
        vmap(grad(lambda *a: exact(*a).pow(3).sum(), every))(*many),
    )


@forms
def test_second_derivatives(form):
    layer, exact, at = FORMS[form]
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev)):
        expected = outer(inner(lambda v: exact(v, *at[1:]).pow(3).sum()))(at[0])
        near(outer(inner(lambda v: layer(v, *at[1:]).pow(3).sum()))(at[0]), expected, 1e-8)


@forms
def test_gradcheck_and_gradgradcheck(form):
    layer, _, at = FORMS[form]
    leaves = [t.clone().requires_grad_() for t in at]
    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_second_derivatives_in_the_entries_of_torchs_sparse_tensors(layout):
    Q = ARGS["Q"].to_sparse() if layout == "coo" else ARGS["Q"].to_sparse_csr()
    Q = Q.detach().requires_grad_()
    p = VECTORS[0].clone().requires_grad_()
    x = foldopt.QPLayer()(Q, p, ARGS["G"], VECTORS[1], ARGS["A"], VECTORS[2], lower=VECTORS[3], upper=VECTORS[4])
    first, by_p = torch.autograd.grad(x.pow(3).sum(), (Q, p), create_graph=True)
    near(by_p, grad(lambda p: closed(p, *VECTORS[1:]).pow(3).sum())(VECTORS[0]).detach())
    (second,) = torch.autograd.grad(by_p.square().sum(), Q)

    def slope(values):
        rest = (full("G", VALUES[1]), full("A", VALUES[2]))
        inner = grad(lambda p: on_active_rows(full("Q", values), *rest, p, *VECTORS[1:]).pow(3).sum())
        return inner(VECTORS[0]).square().sum()

    near(second.to_dense(), full("Q", grad(slope)(VALUES[0])), 1e-8)
    assert first.layout == second.layout == Q.layout


def test_a_fold_whose_update_is_a_sparse_layer():
    """The fixed point of x = clamp(x / 2 + c), with a sparse QP in every step; its derivative is known."""
    I = torch.eye(3, dtype=F64).to_sparse_csr()  # noqa: E741
    layer = foldopt.QPLayer()

    def update(x, c):
        return layer(I, -(0.5 * x + c), lower=-torch.ones(3, dtype=F64), upper=torch.ones(3, dtype=F64))

    def solve(c):
        x = torch.zeros_like(c)
        for _ in range(60):
            x = update(x, c)
        return x

    c = torch.tensor([[0.1, -0.2, 3.0]], dtype=F64, requires_grad=True)
    x = foldopt.fold(solve, update)(c)
    near(x.detach(), torch.tensor([[0.2, -0.4, 1.0]], dtype=F64))
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    (gradient,) = torch.autograd.grad((x * weight).sum(), c, create_graph=True)
    near(gradient.detach(), torch.tensor([[2.0, 4.0, 0.0]], dtype=F64))
