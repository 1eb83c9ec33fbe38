"""Instances of the portfolio problem, and layers for them."""

import torch

import foldopt
from data.portfolio import generate
from experiments.portfolio.problem import PortfolioProblem

N = 20


def problem(seed=0, degree=3, tau=0.1, n=N):
    drawn = generate(seed, degree, 80, 1, 1, n_assets=n, tau=tau)
    return PortfolioProblem(drawn.V, drawn.gamma), drawn


def untrained_predictions(drawn, seed):
    torch.manual_seed(seed)
    n = len(drawn.V)
    layers = [torch.nn.Linear(5, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, n)]
    with torch.no_grad():
        return torch.nn.Sequential(*layers).double()(drawn.features["train"])


def instances(kind, seed, degree=3, tau=0.1, n=N):
    p, drawn = problem(seed, degree, tau, n)
    return p, drawn.returns["train"] if kind == "targets" else untrained_predictions(drawn, seed)


def layer(p, solve=None, **options):
    options = {"dtype": torch.float64, **options}
    return foldopt.fold(solve or (lambda *params: p.exact(*params).state), p.optimizers["sqp"](), **options)


def nondegenerate(p, c, margin=1e-3):
    """Samples with an active risk limit and strict complementarity, whose solution has a derivative."""
    s = p.exact(c)
    reduced = s.lam[:, 1:] / c.std(1, keepdim=True)
    strict = torch.where(s.x > 0, s.x, reduced).amin(1) > margin
    return strict & (s.lam[:, 0] > margin * c.std(1)) & ((s.x > 0).sum(1) > 2)
