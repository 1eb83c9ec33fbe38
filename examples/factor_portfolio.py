"""A portfolio of 1,000 assets under a factor model, and a forecast that is trained for the decision.

max m'x - risk/2 x'(FF' + D)x over 1'x = 1, 0 <= x <= 0.05, with F (1,000 x 20) and D diagonal. The covariance has a
million entries and is never formed: with y = F'x, 20 variables more, the matrix of the program is diagonal and the
rows F'x - y = 0 are all that is added. Returns m are a function of three features of each asset; the forecast is linear
and so cannot be right. Least squares (two stages) is right on average over all assets; training through the layer is
right where the decision is made, in the sense of Elmachtoub and Grigas, Smart "predict, then optimize" (2022).

Truth: x, and the gradient by differences, from PIQP on the program with the covariance formed.
"""

import argparse

import numpy as np
import qpsolvers
import scipy.sparse
import torch

from foldopt import QPLayer

LARGEST = 0.05  # share of one asset
RISK = 5.0


def market(days, assets, factors, generator):
    """Return F (assets, factors), noise (assets,), features (days, assets, 4), the last of which is 1, and returns.

    Returns (days, assets) rise steeply with a good first feature; noise is the diagonal of D.
    """
    F = generator.standard_normal((assets, factors)) / factors**0.5
    noise = generator.uniform(0.5, 1.5, assets)
    features = generator.standard_normal((days, assets, 3))
    score = features @ np.array([1.0, -0.5, 0.3])
    returns = 0.2 * np.expm1(score) + 0.1 * generator.standard_normal((days, assets))
    features = np.concatenate([features, np.ones((days, assets, 1))], 2)
    return tuple(torch.as_tensor(part) for part in (F, noise, features, returns))


class Portfolio:
    """The decision for forecast returns m (days, assets)."""

    def __init__(self, F, noise):
        (n, k), self.F, self.noise = F.shape, F, noise
        self.n, self.layer = n, QPLayer()
        self.Q = scipy.sparse.diags(torch.cat([RISK * noise, torch.full((k,), RISK)]).numpy())
        total = np.concatenate([np.ones(n), np.zeros(k)])[None]
        self.A = scipy.sparse.vstack([scipy.sparse.hstack([F.T.numpy(), -scipy.sparse.identity(k)]), total]).tocsr()
        self.b = torch.cat([torch.zeros(k), torch.ones(1)]).double()
        free = torch.full((k,), torch.inf)
        self.lower, self.upper = torch.cat([torch.zeros(n), -free]), torch.cat([torch.full((n,), LARGEST), free])

    def __call__(self, m):
        """Return the portfolios x (days, assets), differentiable in m (days, assets)."""
        p = torch.cat([-m, m.new_zeros(len(m), len(self.b) - 1)], 1)
        return self.layer(self.Q, p, None, None, self.A, self.b, lower=self.lower, upper=self.upper)[:, : self.n]

    def by_piqp(self, m):
        """Return the same portfolios by PIQP alone, with the covariance formed, to 1e-12."""
        Q = RISK * (self.F @ self.F.T + self.noise.diag()).numpy()
        one, exact = np.ones(self.n), {"eps_abs": 1e-12, "eps_rel": 1e-12}
        rest = {"A": one[None], "b": np.ones(1), "lb": 0 * one, "ub": LARGEST * one, "solver": "piqp"}
        return torch.stack([torch.tensor(qpsolvers.solve_qp(Q, -day, **rest, **exact)) for day in m.numpy()])

    def value(self, x, m):
        """Return the mean over days of m'x - risk/2 x'(FF' + D)x."""
        risk = (x @ self.F).square().sum(1) + (self.noise * x.square()).sum(1)
        return ((m * x).sum(1) - RISK / 2 * risk).mean()


def main(assets=1000, days=8, steps=25):
    """Print what the example finds and return the numbers in a dict."""
    F, noise, features, returns = market(2 * days, assets, min(20, assets // 5), np.random.default_rng(0))
    portfolio = Portfolio(F, noise)
    (known, later), (outcome, later_outcome) = features.split(days), returns.split(days)

    def regret(weights, decide=portfolio, features=known, returns=outcome):
        return portfolio.value(decide(returns), returns) - portfolio.value(decide(features @ weights), returns)

    two_stage = torch.linalg.lstsq(known.flatten(0, 1), outcome.flatten()[:, None]).solution[:, 0]
    error = float((portfolio(known @ two_stage) - portfolio.by_piqp(known @ two_stage)).abs().max())
    print(f"{assets} assets, {days} days: portfolios agree with PIQP on the dense covariance to {error:.0e}")

    weights = two_stage.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(regret(weights), weights)
    h = 1e-6
    ends = [[regret(two_stage + side * h * e, portfolio.by_piqp) for side in (1, -1)] for e in torch.eye(4).double()]
    truth = torch.stack([(up - down) / (2 * h) for up, down in ends])
    gradient_error = float((gradient - truth).abs().max() / truth.abs().max())
    print(f"gradient of the regret {gradient.tolist()}, relative error to differences {gradient_error:.0e}")

    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        regret(weights).backward()
        optimizer.step()
    trained = weights.detach()
    result = {"error": error, "gradient_error": gradient_error}
    best = float(portfolio.value(portfolio(later_outcome), later_outcome))
    for name, w in (("two stages", two_stage), ("trained", trained)):
        seen, unseen = float(regret(w)), float(regret(w, features=later, returns=later_outcome))
        mse = float((known @ w - outcome).square().mean())
        result[name] = {"seen": seen, "unseen": unseen, "mse": mse}
        print(
            f"{name}: squared error {mse:.3f}, regret {seen:.4f} seen, {unseen:.4f} unseen of a best value {best:.3f}"
        )
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", type=int, default=1000, help="at least 20, so that 1'x = 1 is possible")
    main(parser.parse_args().assets)
