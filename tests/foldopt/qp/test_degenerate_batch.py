"""A batch with dependent rows, where x is differentiable in Q and p, through every transform of torch."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

import foldopt
from tests.foldopt.qp.batches import regular, with_degenerate
from tests.foldopt.qp.programs import F64, Program, null_space, stacked, symmetric, tensor, truth
from tests.foldopt.qp.sparse import call


def transport(B=3, k=2, m=3, seed=0):
    """A transport problem with all rows of both marginals, which depend on each other."""
    draws = np.random.default_rng(seed)
    A = np.concatenate([np.kron(np.eye(k), np.ones(m)), np.kron(np.ones(k), np.eye(m))])
    programs = []
    for _ in range(B):
        supply, demand = draws.random(k) + 0.3, draws.random(m) + 0.3
        R = draws.normal(size=(k * m, k * m))
        Q, b = R @ R.T / (k * m) + 0.3 * np.eye(k * m), np.r_[supply / supply.sum(), demand / demand.sum()]
        programs.append(Program(Q, 0.5 * draws.normal(size=k * m), A=A, b=b, lower=np.zeros(k * m)))
    return programs


PROGRAMS = transport()
STACKED = stacked(PROGRAMS)
TRUTHS = []


def closed_form(Q, p):
    """x(Q, p) near the data of `PROGRAMS`, by an orthonormal basis of the null space of their active rows."""
    if not TRUTHS:
        TRUTHS.extend(truth(program) for program in PROGRAMS)
    found = []
    for one, Q_, p_ in zip(TRUTHS, Q, p, strict=True):
        x, N = tensor(one.x), tensor(null_space(one.strong, len(one.x)))
        found.append(x - N @ torch.linalg.solve(N.T @ Q_ @ N, N.T @ (Q_ @ x + p_)))
    return torch.stack(found)


def layer_form(layer=None):
    layer = foldopt.QPLayer() if layer is None else layer
    rest = {name: part for name, part in STACKED.items() if name not in ("Q", "p")}
    return lambda Q, p: layer((Q + Q.mT) / 2, p, **rest)


def loss(form):
    return lambda Q, p: form(symmetric(Q), p).pow(3).sum()


def near(found, expected, tol=1e-9):
    assert isinstance(found, torch.Tensor) == isinstance(expected, torch.Tensor)
    for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, expected)), strict=True):
        if isinstance(a, tuple):
            near(a, b, tol)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=tol * (1 + float(b.abs().max())))


def test_the_batch_is_degenerate_but_differentiable():
    closed_form(STACKED["Q"], STACKED["p"])
    assert all(np.linalg.matrix_rank(one.strong) < len(one.strong) for one in TRUTHS)
    assert any(len(one.strong) > len(PROGRAMS[0].b) for one in TRUTHS), "some bound is active"
    assert all(one.verdict(np.ones(6))[0] == "differentiable" for one in TRUTHS)
    near(layer_form()(STACKED["Q"], STACKED["p"]), closed_form(STACKED["Q"], STACKED["p"]), 1e-12)


def test_gradients_and_second_derivatives_of_a_degenerate_batch():
    at = STACKED["Q"], STACKED["p"]
    found, expected = (torch.func.grad(loss(form), (0, 1))(*at) for form in (layer_form(), closed_form))
    near(found, expected)
    Q, p = (t.clone().requires_grad_() for t in at)
    second = []
    for form in (layer_form(), closed_form):
        first = torch.autograd.grad(loss(form)(Q, p), (Q, p), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), (Q, p)))
    near(*second)
    near(*(hessian(loss(form), 1)(*at) for form in (layer_form(), closed_form)))


def test_forward_mode_jacobians_and_vmap_of_a_degenerate_batch():
    at = STACKED["Q"], STACKED["p"]
    gen = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(t.shape, generator=gen, dtype=F64) for t in at)
    tangents = symmetric(tangents[0]), tangents[1]
    layer = layer_form()
    near(jvp(layer, at, tangents), jvp(closed_form, at, tangents))
    cotangent = torch.randn(3, 6, generator=gen, dtype=F64)
    near(vjp(layer, *at)[1](cotangent)[1], vjp(closed_form, *at)[1](cotangent)[1])
    for jacobian in (jacrev, jacfwd):
        near(jacobian(layer, 1)(*at), jacobian(closed_form, 1)(*at))
    many = STACKED["p"] + 1e-3 * torch.randn(4, 3, 6, generator=gen, dtype=F64)
    near(vmap(layer, (None, 0))(at[0], many), torch.stack([closed_form(at[0], p) for p in many]))
    per = vmap(torch.func.grad(loss(layer), 1), (None, 0))(at[0], many)
    near(per, torch.stack([torch.func.grad(loss(closed_form), 1)(at[0], p) for p in many]))


def test_gradcheck_in_every_argument():
    """Central differences along random directions, also in forward mode and batched."""
    args = stacked([regular(0), regular(3)])
    leaves = [part.clone().requires_grad_() for part in args.values()]
    layer = foldopt.QPLayer()

    def x(*parts):
        parts = dict(zip(args, parts, strict=True))
        return call(layer, {**parts, "Q": symmetric(parts["Q"])})

    checks = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(x, leaves, **checks)
    assert torch.autograd.gradgradcheck(x, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_compiled_pickled_and_copied_layers_answer_as_the_layer_does():
    at = STACKED["Q"], STACKED["p"]
    layer = foldopt.QPLayer(on_failure="nan", degenerate="one_sided")
    expected = torch.func.grad(loss(layer_form(layer)), (0, 1))(*at)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), foldopt.QPLayer(**{})):
        near(torch.func.grad(loss(layer_form(clone)), (0, 1))(*at), expected, 1e-14)
    rest = {name: part for name, part in STACKED.items() if name not in ("Q", "p")}
    compiled = torch.compile(lambda Q, p: layer(Q, torch.sin(p), **rest).pow(3).sum(), backend="eager")
    p = torch.asin(at[1].clamp(-0.99, 0.99)).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(compiled(at[0], p), p)
        (direct,) = torch.autograd.grad(layer(at[0], torch.sin(p), **rest).pow(3).sum(), p)
        near(found, direct, 1e-14)


@pytest.mark.parametrize("shared", [True, False], ids=["one layer", "a layer each"])
def test_threads(shared):
    """Two threads at once, with one layer or a layer each, and batches of different sizes and failures."""
    one = foldopt.QPLayer(on_failure="zero", degenerate="one_sided")
    jobs = [stacked(transport(B=4, seed=1)), with_degenerate(F64)]
    jobs[1]["b"] = jobs[1]["b"].clone()
    jobs[1]["b"][4] = -1

    def work(args, layer):
        leaves = {name: part.clone().requires_grad_() for name, part in args.items()}
        x = call(layer, leaves)
        return x.detach(), *torch.autograd.grad(x.nan_to_num().pow(3).sum(), list(leaves.values()))

    expected = [work(args, foldopt.QPLayer(on_failure="zero", degenerate="one_sided")) for args in jobs]
    found, raised = [[], []], []

    def run(place):
        try:
            layer = one if shared else foldopt.QPLayer(on_failure="zero", degenerate="one_sided")
            for _ in range(4):
                found[place].append(work(jobs[place], layer))
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    for place in range(2):
        assert len(found[place]) == 4
        for answer in found[place]:
            for a, b in zip(answer, expected[place], strict=True):
                atol = 1e-13 * (1 + float(b.abs().nan_to_num().max()))
                torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)
