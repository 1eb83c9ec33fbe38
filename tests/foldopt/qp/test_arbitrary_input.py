"""Arbitrary input makes QPLayer return an answer or raise an error of foldopt, never another exception."""

import warnings

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foldopt
from foldopt import errors
from tests.drawn import properties, seeds
from tests.foldopt.qp.programs import F32, F64
from tests.foldopt.qp.sparse import call

inf, nan = torch.inf, torch.nan
NUMBERS = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-12, 1e-300, 5e-324, 1e8, -1e8, 1e19, 1e30, -1e30, 1e300, inf, -inf, nan]
ORDINARY = [0.0, 1.0, -1.0, 2.0, 0.5]


def noise(draws, shape, wild):
    values = NUMBERS if draws.random() < wild else ORDINARY
    return torch.tensor(draws.choice(values, size=shape), dtype=F32 if draws.random() < 0.2 else F64)


def anything(seed):
    draws = np.random.default_rng(seed)
    n, m, k, B = draws.integers(1, 6), draws.integers(0, 5), draws.integers(0, 4), draws.integers(1, 4)
    wild = draws.choice([0.0, 0.3])
    shapes = {"p": (n,), "G": (m, n), "h": (m,), "A": (k, n), "b": (k,), "lower": (n,), "upper": (n,)}
    args = {}
    for name, shape in shapes.items():
        batched = draws.random() < 0.5
        args[name] = noise(draws, (B, *shape) if batched else shape, wild)
    R = noise(draws, (n, n), wild)
    args["Q"] = R.T @ R if draws.random() < 0.8 else R
    for pair in (("G", "h"), ("A", "b"), ("lower",), ("upper",)):
        if draws.random() < 0.3:
            for name in pair:
                del args[name]
    if draws.random() < 0.05:
        name = draws.choice(sorted(set(args) - {"Q", "p"}) or ["p"])
        args[name] = args[name][..., :-1]
    return args


@settings(properties, max_examples=80)
@given(
    seed=seeds,
    on_failure=st.sampled_from(["raise", "nan", "zero"]),
    degenerate=st.sampled_from(["raise", "one_sided", "least_norm", "nan", "zero"]),
)
def test_no_error_but_foldopts_own_leaves_the_layer(seed, on_failure, degenerate):
    args = anything(seed)
    leaves = {name: part.requires_grad_() for name, part in args.items()}
    layer = foldopt.QPLayer(on_failure=on_failure, degenerate=degenerate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = call(layer, leaves)
            assert len(layer.last.status) == len(x)
            gradients = torch.autograd.grad(x.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        except errors.FoldoptError:
            return
    ok = layer.last.solved
    assert x[ok].isfinite().all()
    assert x[~ok].isnan().all()
    assert set(layer.last.status) <= {"solved", "infeasible", "unbounded", "nonconvex", "limit reached"}
    if on_failure == "zero" and degenerate != "nan":
        assert all(gradient.isfinite().all() for gradient in gradients)
    tol = 1e-6 * (1 + x[ok].detach().abs().amax(1, keepdim=True))
    for name, side in (("lower", 1), ("upper", -1)):
        if name in args and args[name].numel() and ok.any():
            bound = args[name].detach().expand(x.shape)[ok]
            assert (side * (x[ok] - bound) >= -tol).all() or not bound.abs().max() < 1e8
