"""Instances that no solver can solve, put at random places of a batch: the rest is as if they were not there."""

import random
from contextvars import copy_context

import pytest
import torch

import foldopt
from experiments.backends.fold import FoldBackend
from experiments.portfolio.problem import PortfolioProblem
from foldopt.checks import NONFINITE_ALLOWED
from foldopt.errors import FixedPointError, SolverError
from foldopt.linear_solve import linear_solver
from foldopt.solvers import gurobi
from foldopt.solvers.gurobi import GurobiNonconvexQP, GurobiQCQP
from foldopt.solvers.interior_point import solve_qcqp
from foldopt.solvers.qp import solve_qp

F64 = torch.float64
B, N, M = 12, 4, 5
KINDS = ("infeasible", "unbounded", "overflowing", "nan")


def batch(seed):
    """Quadratic programs (H, q, A, b, G, h), and which of them were made unsolvable, of every kind."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    root, A, G, inside = normal(B, N, N), normal(B, 1, N), normal(B, M, N), normal(B, N)
    H = root @ root.mT + 0.1 * torch.eye(N, dtype=F64)
    b, h = (A @ inside[:, :, None])[:, :, 0], (G @ inside[:, :, None])[:, :, 0] + 0.2
    q = normal(B, N)
    bad = random.Random(seed).sample(range(B), len(KINDS))
    for index, kind in zip(bad, KINDS, strict=True):
        if kind == "infeasible":
            G[index, 1], h[index, 1] = -G[index, 0], -h[index, 0] - 1
        elif kind == "unbounded":
            H[index], q[index], G[index] = 0, A[index, 0].roll(1) + 5 * torch.eye(N, dtype=F64)[0], 0
            h[index] = 1
        elif kind == "overflowing":
            q[index, 0] = torch.inf
        else:
            q[index] = torch.nan
    return (H, q, A, b, G, h), sorted(bad)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solve", [solve_qp, solve_qcqp])
def test_batched_solvers_mark_them_and_solve_the_rest(solve, seed):
    data, bad = batch(seed)
    good = [i for i in range(B) if i not in bad]
    found = solve(*data)
    assert found.ok.tolist() == [i in good for i in range(B)]
    alone = solve(*(part[good] for part in data))
    torch.testing.assert_close(found.x[good], alone.x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["zero", "nan", "warn", "raise"])
def test_a_layer_applies_its_policy_to_them_and_to_no_other(policy, seed):
    data, bad = batch(seed)
    good = [i for i in range(B) if i not in bad]
    step = foldopt.SQP(_Program())

    def solve(H, q, A, b, G, h):
        q = torch.where(torch.tensor([i in bad[:1] for i in range(B)])[:, None], torch.nan, q)
        found = solve_qp(H, q, A, b, G, h)
        return found.x, found.nu, found.lam

    def sound(H, q, A, b, G, h):
        found = solve_qp(H, q, A, b, G, h)
        return found.x, found.nu, found.lam

    data = [torch.where(part.isfinite(), part, 0).requires_grad_() for part in data]
    layer = foldopt.fold(solve, step, on_failure=policy)
    if policy == "raise":
        with pytest.raises(FixedPointError) as caught:
            layer(*data)
        assert set(caught.value.indices) <= set(bad)
        return
    if policy == "warn":
        with pytest.warns(RuntimeWarning, match="does not fix the solver's solution"):
            layer(*data)
        assert not layer.last.ok[bad[0]]
        return
    x = layer(*data)[0]
    assert layer.last.ok[good].all()
    assert not layer.last.ok[bad[0]]
    grads = torch.autograd.grad(x[good].square().sum(), data)
    part = [p[good].detach().requires_grad_() for p in data]
    alone = foldopt.fold(sound, step)(*part)[0]
    torch.testing.assert_close(x[good], alone)
    expected = torch.autograd.grad(alone.square().sum(), part)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got[good], want)


class _Program:
    @staticmethod
    def sqp_data(x, nu, lam, H, q, A, b, G, h):
        gradient = torch.einsum("bij,bj->bi", H, x) + q
        return gradient, H, torch.einsum("bpn,bn->bp", A, x) - b, A, torch.einsum("bmn,bn->bm", G, x) - h, G


def portfolio():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g, dtype=F64)
    return PortfolioProblem(root @ root.T + torch.eye(6, dtype=F64), 5.0), torch.randn(8, 6, generator=g, dtype=F64)


@pytest.mark.parametrize("seed", range(3))
def test_gurobi_in_a_layer_loses_only_the_samples_that_it_fails_on(seed):
    """Its iterations are limited to none for a random part of the batch."""
    problem, c = portfolio()
    bad = random.Random(seed).sample(range(8), 3)
    expected = problem.gurobi(c).x
    model, calls = problem._gurobi._model[0], iter(range(8))

    class Limited:
        def __getattr__(self, name):
            return getattr(model, name)

        def optimize(self):
            model.reset()
            model.setParam("BarIterLimit", 0 if next(calls) in bad else 1000)
            model.optimize()

    problem._gurobi._model = (Limited(), *problem._gurobi._model[1:])
    task = type("Task", (), {"problem": problem})
    backend = FoldBackend(task, linear_solver("auto"), "auto", "gurobi", None, "zero")
    c = c.requires_grad_()
    x = backend(c)
    good = [i for i in range(8) if i not in bad]
    torch.testing.assert_close(x[good], expected[good], atol=1e-5, rtol=1e-5)
    assert x[bad].isnan().all()
    (gradient,) = torch.autograd.grad(x[good].square().sum(), c)
    assert gradient.isfinite().all()
    assert (gradient[bad] == 0).all()
    assert backend.take_failures() == 3
    calls = iter(range(8))
    with pytest.raises(SolverError, match="ITERATION_LIMIT") as caught:
        problem.gurobi(c.detach())
    assert sorted(caught.value.indices) == sorted(bad)


def test_a_time_limit_is_told_apart_from_a_solution():
    n = 30
    H = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    ones = torch.ones(1, n, dtype=F64)
    solver = GurobiNonconvexQP(H + H.T, ones, torch.tensor([5.0], dtype=F64), 1e-3)

    def as_in_a_layer():
        NONFINITE_ALLOWED.set(True)
        return solver(torch.ones(2, n, dtype=F64))

    found = copy_context().run(as_in_a_layer)
    assert found.timed_out.all()
    known = found.value.isfinite()
    assert (found.bound <= found.value)[known].all()
    assert found.x[~known].isnan().all()


def test_gurobi_that_was_stopped_raises_in_a_layer_too():
    solver = GurobiQCQP(2, quadratic=(2 * torch.eye(2, dtype=F64)[None], torch.zeros(1, 2), torch.ones(1)))
    solver(torch.ones(1, 2))
    model = solver._model[0]

    class Stopped:
        def __getattr__(self, name):
            return getattr(model, name)

        def optimize(self):
            model.reset()
            model.optimize(lambda m, where: m.terminate())

    solver._model = (Stopped(), *solver._model[1:])
    layer = foldopt.fold(lambda c: solver(c).x, lambda x, c: x, on_failure="zero")
    with pytest.raises(SolverError, match=r"INTERRUPTED at .* Someone stopped it"):
        layer(torch.ones(1, 2, dtype=F64))


def test_gurobi_without_a_licence_says_so(monkeypatch):
    gp = gurobi._gurobipy()

    def refuse(*_, **__):
        raise gp.GurobiError(10009, "No Gurobi license found")

    monkeypatch.setattr(gp, "Env", refuse)
    gurobi._environment.cache_clear()
    with pytest.raises(SolverError, match="No Gurobi license found"):
        portfolio()[0].gurobi(torch.ones(1, 6))
    gurobi._environment.cache_clear()
