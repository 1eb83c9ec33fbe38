"""AC optimal power flow.

Dispatch the generators of a power grid at least cost under the full nonlinear flow equations: Ipopt solves, folding tells
how the dispatch follows the loads, and a forecast of the loads is trained on the cost of correcting the dispatch.
"""

# %% [markdown]
# ## The problem
#
# A grid has buses, at which power is consumed, generators, which cost money, and branches. Its operator chooses the voltage
# angles θ and magnitudes v of the buses and the active and reactive power p and q of the generators:
#
# > minimize Σᵢ (aᵢ pᵢ² + bᵢ pᵢ + cᵢ)
# >
# > subject to, at every bus k:  Σ flows out of k + shunt of k + load dₖ = Σ generation at k, in active and reactive power,
# >
# > |flow| ≤ limit on every branch, and bounds on v, p and q.
#
# The flow from bus f to bus t of a branch with admittances y is the complex number
#
# > S = V_f · conj(y_ff V_f + y_ft V_t), V = v · exp(iθ)
#
# so that the equalities are not convex. The loads d are the parameters. The cases are those of MATPOWER (Zimmerman,
# Murillo-Sánchez and Thomas, 2011) as the package `pypower` has them. It has a solver of its own, an interior point method
# with hand-written derivatives, which we shall use to judge our numbers.

# %%
import argparse
import itertools
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pypower.api
import torch
from pypower.idx_brch import F_BUS, RATE_A, T_BUS
from pypower.idx_bus import BS, BUS_TYPE, GS, LAM_P, PD, QD, REF, VA, VMAX, VMIN
from pypower.idx_cost import COST, MODEL, NCOST, POLYNOMIAL
from pypower.idx_gen import GEN_BUS, PMAX, PMIN, QMAX, QMIN

import foldopt

UNLIMITED = 9900  # MVA: where a case has no limit of a branch, it says so or 0


class Grid:
    """A case of MATPOWER as functions of x = (θ, v, p, q), (B, n), and of loads (B, 2 buses), active and then reactive.

    Powers are in units of `base` MVA, angles in radians, voltages relative to their nominal ones, costs in dollars per hour.
    """

    def __init__(self, name, limits=()):
        self.case = getattr(pypower.api, name)()
        for branch, megawatts in limits:
            self.case["branch"][branch, RATE_A] = megawatts
        case = pypower.api.ext2int(self.case)  # without what is out of service, buses numbered from 0
        bus, gen, branch, cost = case["bus"], case["gen"], case["branch"], case["gencost"][: len(case["gen"])]
        if (cost[:, MODEL] != POLYNOMIAL).any() or (cost[:, NCOST] != 3).any():
            raise ValueError(f"{name} has costs that are not quadratic; choose another case.")
        self.base, self.buses, self.generators = case["baseMVA"], len(bus), len(gen)
        self.at, self.start, self.end = (
            torch.tensor(part.astype(int)) for part in (gen[:, GEN_BUS], branch[:, F_BUS], branch[:, T_BUS])
        )
        _, from_bus, from_end = pypower.api.makeYbus(self.base, bus, branch)
        row = np.arange(len(branch))
        self.admittance = [
            tuple(number(part) for part in (y.real, y.imag))
            for matrix in (from_bus, from_end)
            for y in (np.asarray(matrix[row, branch[:, end].astype(int)]).ravel() for end in (F_BUS, T_BUS))
        ]
        self.shunt = number(bus[:, GS] / self.base), number(bus[:, BS] / self.base)
        self.load = number(np.append(bus[:, PD], bus[:, QD]) / self.base)[None]
        self.cost = [number(cost[:, COST + i]) for i in range(3)]
        self.reference = int(np.flatnonzero(bus[:, BUS_TYPE] == REF)[0])
        self.angle = float(np.deg2rad(bus[self.reference, VA]))
        ends = (VMIN, PMIN, QMIN), (VMAX, PMAX, QMAX)
        self.lower, self.upper = (
            number(np.concatenate([bus[:, v], gen[:, p] / self.base, gen[:, q] / self.base])) for v, p, q in ends
        )
        rate = branch[:, RATE_A]
        self.limited = torch.tensor(np.flatnonzero((rate > 0) & (rate < UNLIMITED)))
        self.limit = number(rate)[self.limited] / self.base
        flat = torch.full((self.buses,), self.angle, dtype=torch.float64)
        self.flat_start = torch.cat([flat, (self.lower + self.upper) / 2])

    def parts(self, x):
        """Return θ, v, p and q."""
        return x.split([self.buses, self.buses, self.generators, self.generators], 1)

    def flows(self, x):
        """Return the active and reactive flows into the branches at their first ends, and at their other ends."""
        angle, v = self.parts(x)[:2]
        v_f, v_t, difference = v[:, self.start], v[:, self.end], angle[:, self.start] - angle[:, self.end]
        along, across = v_f * v_t * difference.cos(), v_f * v_t * difference.sin()
        (g_ff, b_ff), (g_ft, b_ft), (g_tf, b_tf), (g_tt, b_tt) = self.admittance
        return (
            g_ff * v_f**2 + g_ft * along + b_ft * across,
            -b_ff * v_f**2 - b_ft * along + g_ft * across,
            g_tt * v_t**2 + g_tf * along - b_tf * across,
            -b_tt * v_t**2 - b_tf * along - g_tf * across,
        )

    def objective(self, x, load):
        """Return the cost of generation, (B,), in dollars per hour."""
        p, (a, b, c) = self.base * self.parts(x)[2], self.cost
        return (a * p**2 + b * p + c).sum(1)

    def equalities(self, x, load):
        """Return what flows out of each bus minus what comes in, active and reactive, and the reference angle's error."""
        angle, v, p, q = self.parts(x)
        p_f, q_f, p_t, q_t = self.flows(x)
        balance = [
            (shunt * v**2).index_add(1, self.start, f).index_add(1, self.end, t).index_add(1, self.at, -generated)
            for shunt, f, t, generated in ((self.shunt[0], p_f, p_t, p), (-self.shunt[1], q_f, q_t, q))
        ]
        return torch.cat([torch.cat(balance, 1) + load, angle[:, [self.reference]] - self.angle], 1)

    def inequalities(self, x, load):
        """Return the bounds of v, p and q, and the limits of the branches at both ends."""
        bounded = x[:, self.buses :]
        p_f, q_f, p_t, q_t = (flow[:, self.limited] for flow in self.flows(x))
        over = [p**2 + q**2 - self.limit**2 for p, q in ((p_f, q_f), (p_t, q_t))]
        return torch.cat([self.lower - bounded, bounded - self.upper, *over], 1)

    def layer(self, **options):
        """Return the optimal power flow as a layer: loads (B, 2 buses) to x (B, n)."""
        return foldopt.NLPLayer(self.objective, self.inequalities, self.equalities, **options)


def number(values):
    """Return an array as a tensor in double precision."""
    return torch.as_tensor(values, dtype=torch.float64)


# %% [markdown]
# ## Solve and compare
#
# `solver="ipopt"` hands the three functions to Ipopt with exact first and second derivatives, which PyTorch finds. With
# `sparsity=True` they are sparse matrices: for case 118 with its 344 variables the Hessian is read off 20 products. At the
# solution the layer folds one SQP step, which is one solve with the sparse KKT matrix.
#
# We ask for three things. The cost is that of `pypower`. The *price* of power at a bus, which is the derivative of the optimal
# cost in the load there, is the multiplier that `pypower` finds. And the derivative of the dispatch, for random changes of
# all loads and a random cotangent, is that of central differences.


# %%
def compared(name):
    """Return what the layer finds for a case, as a row of the table; errors are relative."""
    grid = Grid(name)
    layer = grid.layer(start=grid.flat_start, solver="ipopt", sparsity=True)
    tight = {f"PDIPM_{key}": 1e-9 for key in ("FEASTOL", "GRADTOL", "COMPTOL", "COSTTOL")}
    peer = pypower.api.runopf(grid.case, pypower.api.ppoption(VERBOSE=0, OUT_ALL=0, **tight))
    load, generator = grid.load.clone().requires_grad_(), torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        x = layer(load)
        solved = time.perf_counter()
        cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((x * cotangent).sum(), load)
        seconds.append((solved - begun, time.perf_counter() - solved))
    (price,) = torch.autograd.grad(grid.objective(layer(load), load).sum(), load)
    change = load.detach() * torch.randn(load.shape, generator=generator, dtype=torch.float64)
    ahead, behind = (layer(load.detach() + step * change) for step in (1e-4, -1e-4))
    slopes = {
        "dispatch": ((gradient * change).sum(), ((ahead - behind) * cotangent).sum() / 2e-4),
        "cost": ((price * change).sum(), (grid.objective(ahead, load) - grid.objective(behind, load)).sum() / 2e-4),
    }
    prices = price[0, : grid.buses].numpy() / grid.base, peer["bus"][:, LAM_P]
    return {
        "case": name,
        "variables": x.shape[1],
        "cost": grid.objective(x, load).item(),
        "pypower's cost": float(peer["f"]),
        "error of prices": float(np.abs(prices[0] - prices[1]).max() / np.abs(prices[1]).max()),
        **{f"error of {key}": abs(float(own / truth) - 1) for key, (own, truth) in slopes.items()},
        "forward (s)": statistics.median(first for first, _ in seconds),
        "backward (s)": statistics.median(second for _, second in seconds),
    }


def table(rows):
    """Return rows, dicts with the same keys, as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        forms = (".0e" if key.startswith("error") else ".2f" if isinstance(value, float) else "" for key, value in row.items())
        lines.append([format(value, form) for form, value in zip(forms, row.values(), strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
