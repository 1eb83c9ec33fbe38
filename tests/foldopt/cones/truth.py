"""Cones and points for the tests, and projections computed without foldopt: by a generic solver and by mpmath."""

import importlib
import math

import torch

from foldopt.cones import Dual, Exponential, Nonnegative, Power, SecondOrder, Semidefinite
from tests.drawn import F64, normal

CONES = {
    "nonnegative": (Nonnegative(), 3),
    "half line": (SecondOrder(), 1),
    "wedge": (SecondOrder(), 2),
    "second order": (SecondOrder(), 5),
    "lower triangle": (Semidefinite(), 6),
    "upper triangle": (Semidefinite("upper"), 10),
    "exponential": (Exponential(), 3),
    "dual exponential": (Dual(Exponential()), 3),
    "power 1/2": (Power(0.5), 3),
    "power 0.7": (Power(0.7), 3),
    "dual power": (Dual(Power(0.4)), 3),
}


def kinds_of_points(d):
    """Random, integer, all-zero and one-sided points of R^d, (200, d)."""
    whole = normal(1, 60, d).mul(2).round()
    axes = torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64), torch.zeros(1, d, dtype=F64)])
    few = torch.where(normal(2, 60, d) > 0, normal(3, 60, d), 0.0)
    rest = 200 - len(whole) - len(axes) - len(few)
    return torch.cat([whole, axes, few, 3 * normal(4, rest, d)])


def by_clarabel(cone, v):
    """The projections of v (N, d) one by one: min |s - v|^2 / 2 over s in the cone; to 1e-4, NaN if unsolved."""
    clarabel, sparse = importlib.import_module("clarabel"), importlib.import_module("scipy.sparse")
    d = v.shape[1]
    if isinstance(cone, Dual):
        return v + by_clarabel(cone.cone, -v)
    order = list(range(d))
    if isinstance(cone, Nonnegative):
        block = clarabel.NonnegativeConeT(d)
    elif isinstance(cone, SecondOrder):
        block = clarabel.SecondOrderConeT(d)
    elif isinstance(cone, Semidefinite):
        n = math.isqrt(2 * d)
        block = clarabel.PSDTriangleConeT(n)
        if cone.triangle == "lower":  # Clarabel's rows are the upper triangle's
            at = {(j, i): k for k, (i, j) in enumerate((i, j) for i in range(n) for j in range(i, n))}
            order = [at[j, i] for j in range(n) for i in range(j + 1)]
    elif isinstance(cone, Exponential):
        block = clarabel.ExponentialConeT()
    else:
        block = clarabel.PowerConeT(cone.alpha)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-9
    eye = sparse.identity(d, format="csc")
    s = torch.empty_like(v)
    for i, row in enumerate(v):
        solver = clarabel.DefaultSolver(
            eye, (-row[order]).numpy(), -eye, torch.zeros(d).double().numpy(), [block], settings
        )
        found = solver.solve()
        s[i, order] = torch.tensor(found.x, dtype=F64) if str(found.status) == "Solved" else torch.nan
    return s


def exponential_by_mpmath(mp, v):
    """The projection of one point on the exponential cone, by bisection in the precision of mpmath."""
    x, y, z = (mp.mpf(t) for t in v)
    if (y > 0 and y * mp.exp(x / y) <= z) or (y == 0 and x <= 0 and z >= 0):
        return x, y, z
    if (x > 0 and x * mp.exp(y / x - 1) <= -z) or (x == 0 and y <= 0 and z <= 0):
        return (mp.mpf(0),) * 3
    if x <= 0 and y <= 0:
        return x, mp.mpf(0), max(z, mp.mpf(0))
    low = 1 - y / x if x > 0 else -mp.inf
    high = x / y if y > 0 else mp.inf
    if low > 2000:
        return mp.mpf(0), mp.mpf(0), max(z, mp.mpf(0))
    if high < -2000:
        return x, y, max(z, mp.mpf(0))
    low, high = max(low, mp.mpf(-5000)), min(high, mp.mpf(5000))
    for _ in range(int(4 * mp.dps)):
        r = (low + high) / 2
        q = r * r - r + 1
        above = ((r - 1) * x + y) / q * mp.exp(r) - (x - r * y) / q * mp.exp(-r) > z
        low, high = (low, r) if above else (r, high)
    sigma = ((r - 1) * x + y) / (r * r - r + 1)
    return sigma * r, sigma, sigma * mp.exp(r)


def differences(function, v, direction, h=2e-4):
    """The derivative of `function` at v along `direction`, by central differences extrapolated twice."""
    first, second, third = (
        (function(v + k * h * direction) - function(v - k * h * direction)) / (2 * k * h) for k in (1, 2, 4)
    )
    better, coarse = (4 * first - second) / 3, (4 * second - third) / 3
    return (16 * better - coarse) / 15
