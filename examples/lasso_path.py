"""The path of the lasso, one exact derivative per segment, and a penalty chosen by the gradient of a validation error.

min 1/2 |Xw - y|^2 + s |w|_1 is a sparse quadratic program in (w+, w-, r), w = w+ - w-, r = Xw - y. Its solution is
piecewise linear in the penalty s (Osborne, Presnell and Turlach, A new approach to variable selection in least squares
problems, 2000): between two knots, where a coefficient joins or leaves, w moves along dw/ds. So the derivative inside
a segment tells where the segment ends, and the path is walked from knot to knot. At a knot two derivatives meet, and
the layer says "kink". Truth: dw/ds = -(X_a'X_a)^-1 sign(w_a) on the coefficients a that are not zero.
"""

import argparse
from itertools import pairwise

import numpy as np
import scipy.sparse
import torch
from torch.autograd import forward_ad

from foldopt import QPLayer


class Lasso:
    """The lasso of X (m, p), sparse, and y (m,) as a function of the penalty."""

    def __init__(self, X, y, degenerate="raise"):
        (m, p), self.y = X.shape, y
        self.X, self.p, self.layer = X, p, QPLayer(degenerate=degenerate)
        self.Q = scipy.sparse.block_diag([scipy.sparse.csr_matrix((2 * p, 2 * p)), scipy.sparse.identity(m)])
        self.A = scipy.sparse.hstack([X, -X, -scipy.sparse.identity(m)]).tocsr()
        self.penalized = torch.cat([torch.ones(2 * p), torch.zeros(m)]).double()
        self.lower = torch.cat([torch.zeros(2 * p), torch.full((m,), -torch.inf)]).double()

    def __call__(self, s):
        """Return w (p,), differentiable in the penalty s, a scalar tensor."""
        z = self.layer(self.Q, s * self.penalized, None, None, self.A, self.y, lower=self.lower)[0]
        return z[: self.p] - z[self.p : 2 * self.p]

    def slope(self, s):
        """Return w and dw/ds (p,) as arrays, in forward mode."""
        one = torch.ones((), dtype=torch.float64)
        with forward_ad.dual_level():
            return tuple(part.numpy() for part in forward_ad.unpack_dual(self(forward_ad.make_dual(s * one, one))))

    def true_slope(self, w):
        """Return dw/ds (p,) at a solution w inside a segment, in closed form."""
        out, active = np.zeros(self.p), np.abs(w) > 1e-9
        X = self.X[:, active].toarray()
        out[active] = -np.linalg.solve(X.T @ X, np.sign(w[active]))
        return out


def next_knot(lasso, s, w, dw):
    """Return the largest penalty below s at which a coefficient joins or leaves, if w (p,) moves along dw."""
    active, c, dc = np.abs(w) > 1e-9, lasso.X.T @ (lasso.y.numpy() - lasso.X @ w), -lasso.X.T @ (lasso.X @ dw)
    joins = ((c - s * dc)[~active] / (side - dc[~active]) for side in (1, -1))
    ends = np.concatenate([s - w[active] / dw[active], *joins])
    return float(ends[(ends < s) & (ends > 0)].max(initial=0.0))


def walk(lasso, last):
    """Return the knots [(s, w)] down to one below `last`, and the largest gap between segments and error of dw/ds.

    Where the line of a segment misses the knot that it should begin at, it belongs to a later one: look nearer.
    """
    s = float(np.abs(lasso.X.T @ lasso.y.numpy()).max())
    knots, gap, error = [(s, np.zeros(lasso.p))], 0.0, 0.0
    while s > last:
        for near in (1e-3, 1e-5, 1e-7):
            w, dw = lasso.slope(s - near * s)
            miss = np.abs(w + near * s * dw - knots[-1][1]).max()
            if miss < 1e-9:
                break
        gap, error = max(gap, miss), max(error, np.abs(dw - lasso.true_slope(w)).max())
        inside, s = s - near * s, next_knot(lasso, s - near * s, w, dw)
        knots.append((s, w + (s - inside) * dw))
    return knots, gap, error


def best_on(knots, X, y):
    """Return (error, s) with the least mean squared error of X w(s) against y on the path, exact on every segment."""
    found = []
    for (s, w), (t, v) in pairwise(knots):
        left, step = X @ w - y, X @ (v - w)
        share = np.clip(-left @ step / max(step @ step, 1e-300), 0, 1)
        found.append((np.square(left + share * step).mean(), s + share * (t - s)))
    return min(found)


def main(features=600, steps=60):
    """Print what the example finds and return the numbers in a dict."""
    generator = np.random.default_rng(0)
    normal, shape = generator.standard_normal, (features // 3, features)
    X, X_new = (scipy.sparse.random(*shape, 0.1, "csr", random_state=generator, data_rvs=normal) for _ in range(2))
    w = np.where(np.arange(features) < max(features // 60, 3), normal(features), 0)
    y, y_new = (part @ w + 0.2 * normal(len(w) // 3) for part in (X, X_new))
    lasso, asked, verdicts = Lasso(X, torch.as_tensor(y)), Lasso(X, torch.as_tensor(y), degenerate="one_sided"), {}
    knots, gap, slope_error = walk(lasso, 0.02 * np.abs(X.T @ y).max())
    print(f"{len(knots) - 1} segments meet to {gap:.0e}; slopes agree with the closed form to {slope_error:.0e}")
    (s, _), (t, _) = knots[len(knots) // 2 :][:2]
    for place, at in (("knot", s), ("inside", (s + t) / 2)):
        asked(torch.tensor(at, dtype=torch.float64, requires_grad=True)).sum().backward()
        verdicts[place] = asked.layer.last.verdict[0]
    print(f"verdicts on the derivative: {verdicts}")

    log_s = torch.tensor(np.log(0.2 * knots[0][0]), requires_grad=True)
    optimizer = torch.optim.Adam([log_s], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        error = (torch.as_tensor(X_new.toarray()) @ lasso(log_s.exp()) - torch.as_tensor(y_new)).square().mean()
        error.backward()
        optimizer.step()
    found, (best, where) = error.item(), best_on(knots, X_new, y_new)
    print(f"validation error {found:.6f} at s = {log_s.exp():.4f} by gradient, {best:.6f} at {where:.4f} on the path")
    result = {"gap": gap, "slope_error": slope_error, "verdicts": verdicts, "found": found, "best": best}
    return result | {"knots": knots, "X": X, "y": y}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--features", type=int, default=600, help="coefficients; a third as many samples")
    main(parser.parse_args().features)
