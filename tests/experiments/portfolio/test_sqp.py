"""The portfolio's SQP step in closed form agrees with the general step, which replaces it where it does not hold."""

import pytest
import torch

import foldopt
from experiments.portfolio.problem import PortfolioProblem
from experiments.portfolio.sqp import PortfolioSQP
from tests.experiments.portfolio.portfolios import instances, nondegenerate


def test_the_full_sqp_step_is_newton_at_the_solution():
    p, c = instances("targets", 0)
    c = c[nondegenerate(p, c)]
    s = p.exact(c)
    x = s.x.clone().requires_grad_()
    for step in (foldopt.SQP(p), p.optimizers["sqp"]()):
        stepped = step((x, s.nu, s.lam), *p.params(c))[0]
        (pulled,) = torch.autograd.grad(stepped, x, torch.randn_like(x))
        assert pulled.abs().max() < 1e-9, "Phi is zero"


@pytest.mark.parametrize("stepsize", [1.0, 0.5])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("error", [0.0, 1e-6, 1e-4])
def test_the_step_in_closed_form_is_the_general_one(error, batched, stepsize):
    p, c = instances("targets", 0)
    c = c[nondegenerate(p, c, 0.03)]
    params = list(p.params(c))
    if batched:
        scale = torch.linspace(0.5, 2, len(c), dtype=c.dtype)
        params[1:] = params[1] * scale[:, None, None], params[2] * scale
    generator = torch.Generator().manual_seed(0)

    def normal(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    state = [part * (1 + error * normal(part)) for part in p.exact(*params).state]
    leaves = [t.detach().clone().requires_grad_() for t in (*state, *params)]
    weights = [normal(part) for part in state]
    found = []
    for step in (foldopt.SQP(p, stepsize), PortfolioSQP(p, stepsize)):
        new = step(tuple(leaves[:3]), *leaves[3:])
        gradients = torch.autograd.grad(new, leaves, weights, allow_unused=True)
        gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]
        gradients[4] = (gradients[4] + gradients[4].mT) / 2  # V is symmetric
        found.append([part.detach() for part in (*new, *gradients)])
    assert step.last is None, "it was the closed form"
    largest = max(float(part.abs().max()) for part in found[0][3:])
    for general, closed in zip(*found, strict=True):
        assert (closed - general).abs().max() <= 1e-9 * max(float(general.abs().max()), 1e-6 * largest)


@pytest.mark.parametrize("parts", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_the_vjp_in_closed_form_is_that_of_the_recorded_operations(parts):
    """For cotangents of any part of the state; under create_graph the recorded operations are used."""
    p, c = instances("targets", 0)
    c = c[nondegenerate(p, c, 0.03)]
    leaves = [t.detach().clone().requires_grad_() for t in (*p.exact(*p.params(c)).state, *p.params(c))]
    new = [PortfolioSQP(p)(tuple(leaves[:3]), *leaves[3:])[part] for part in parts]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in new]
    wanted = [leaf for leaf in leaves if leaf is not leaves[1]]  # the step does not depend on nu
    closed = torch.autograd.grad(new, wanted, weights, retain_graph=True)
    recorded = torch.autograd.grad(new, wanted, weights, create_graph=True)
    largest = max(float(g.abs().max()) for g in recorded)
    for mine, other in zip(closed, recorded, strict=True):
        if mine.shape == p.V.shape:
            mine, other = mine + mine.mT, other + other.mT
        assert (mine - other).abs().max() <= 1e-10 * max(float(other.abs().max()), 1e-6 * largest)
    assert all(not g.requires_grad for g in closed)
    assert all(g.requires_grad for g in recorded)


def test_where_the_guess_does_not_fit_the_step_is_the_general_one():
    p, c = instances("targets", 0)
    params = p.params(c[:4])
    exact = p.exact(*params).state
    for state in (p.sqp_start(c[:4]), (exact[0], exact[1], exact[2] * 0), p.exact(c[4:8]).state):
        step = PortfolioSQP(p)
        for closed, general in zip(step(state, *params), foldopt.SQP(p)(state, *params), strict=True):
            assert torch.equal(closed, general)
        assert step.last is not None


@pytest.mark.parametrize("near", [0.0, 1e-12])
def test_where_v_is_singular_on_the_assets_held_the_step_is_the_general_one(near):
    """With two identical assets only their sum is determined, so that the closed form does not apply."""
    V = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64))
    V[0, 1] = V[1, 0] = 1 - near
    p = PortfolioProblem(V, 0.6)
    c = torch.tensor([[1.0, 1.0, 0.9, 0.5]], dtype=torch.float64)
    s = p.exact(c)
    step = PortfolioSQP(p)
    for closed, general in zip(step(s.state, *p.params(c)), foldopt.SQP(p)(s.state, *p.params(c)), strict=True):
        torch.testing.assert_close(closed, general, rtol=1e-12, atol=1e-12)
    assert (s.x[0, :2] > 0).all(), "both are held"
    assert step.last is not None
