"""The closest feasible program: h is shifted by s >= 0 and b by t, with (s, t) of least norm."""

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.qp.programs import Program, stacked, truth
from tests.foldopt.qp.sparse import asked, call


def closest(program, norm):
    """Return x by two independent solves. Rows that had to be shifted hold with equality."""
    n, m, k = program.n, len(program.h), len(program.b)
    eye, zero = np.eye(m + k), np.zeros
    if norm == "l2":
        Q, p = np.diag(np.r_[zero(n), np.ones(m + k)]), zero(n + m + k)
        G, h = np.concatenate([program.G, -eye[:m]], 1), program.h
        lower = np.r_[program.lower, zero(m), np.full(k, -np.inf)]
        A, upper = np.concatenate([program.A, -eye[m:]], 1), np.r_[program.upper, np.full(m + k, np.inf)]
    else:  # b + t - r with t, r >= 0
        eye = np.concatenate([eye, -eye[m:]])
        Q, p = zero((n + m + 2 * k,) * 2), np.r_[zero(n), np.ones(m + 2 * k)]
        G, h = np.concatenate([program.G, -eye[:, :m].T], 1), program.h
        A = np.concatenate([program.A, -eye[:, m:].T], 1)
        lower, upper = np.r_[program.lower, zero(m + 2 * k)], np.r_[program.upper, np.full(m + 2 * k, np.inf)]
    found = truth(Program(Q, p, G, h, A, program.b, lower, upper))
    s, t = found.x[n : n + m], found.x[n + m :]
    t = t if norm == "l2" else t[:k] - t[k:]
    shifted = s > 1e-9
    return truth(
        Program(
            program.Q,
            program.p,
            program.G[~shifted],
            program.h[~shifted],
            np.concatenate([program.A, program.G[shifted]]),
            np.r_[program.b + t, (program.h + s)[shifted]],
            program.lower,
            program.upper,
        )
    ).x


def empty(seed):
    """5 rows and an equality that no point of a box in 4 variables satisfies; the least shift is unique."""
    draws = np.random.default_rng(seed)
    G, A = draws.normal(size=(5, 4)), draws.normal(size=(1, 4))
    h = 0.3 * draws.normal(size=5) - 1.5
    return Program(np.eye(4), draws.normal(size=4), G, h, A, draws.normal(size=1), np.full(4, -1), np.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_closest_feasible_program_against_independent_solves(norm):
    programs = [one for one in map(empty, range(30)) if truth(one).status == "infeasible"][:8]
    assert len(programs) == 8
    inside = Program(np.eye(4), np.ones(4), np.eye(5, 4), np.ones(5), np.ones((1, 4)), [1], np.full(4, -1), np.ones(4))
    expected = np.stack([closest(one, norm) for one in programs] + [truth(inside).x])
    args = stacked([*programs, inside])
    layer = foldopt.QPLayer(closest_feasible=norm)
    x = call(layer, args)
    torch.testing.assert_close(x, torch.tensor(expected), rtol=0, atol=1e-7)
    assert layer.last.status == ("solved",) * 9
    assert (x[-1] - call(foldopt.QPLayer(), stacked([inside]))[0]).abs().max() < 1e-12, "a feasible one is left alone"
    with pytest.raises(errors.InfeasibleError):
        call(foldopt.QPLayer(), args)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", ["p", "h", "b", "G", "A"])
def test_the_closest_feasible_program_is_differentiated(norm, name):
    programs = [one for one in map(empty, range(30)) if truth(one).status == "infeasible"][:6]
    args, weight = stacked(programs), np.array([1.0, 2.0, -1.0, 0.5])
    _, _, gradients = asked(args, weight, wrt=(name,), closest_feasible=norm, degenerate="one_sided")
    draws = np.random.default_rng(0)
    for program, gradient in zip(programs, gradients[name].numpy(), strict=True):
        d = draws.normal(size=gradient.shape)
        ends = [closest(program.moved(**{name: s * 1e-6 * d}), norm) @ weight for s in (1, -1, 0)]
        slope = (ends[0] - ends[1]) / 2e-6
        if abs(ends[0] + ends[1] - 2 * ends[2]) > 1e-9:  # a kink is near
            continue
        assert (gradient * d).sum() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_a_program_that_only_bounds_contradict_stays_infeasible():
    args = stacked([Program(np.eye(2), [1, 1], np.ones((1, 2)), [1], lower=[1, 1], upper=[0, 2])])
    layer = foldopt.QPLayer(closest_feasible="l2", on_failure="nan")
    assert call(layer, args).isnan().all()
    assert layer.last.status == ("infeasible",)
