"""Batches of sparse programs, some without a solution; copies, threads, repeated calls and memory."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import foldopt
from foldopt import errors
from tests.foldopt.qp.programs import F64, Program, clarabel, exact, stacked, truth
from tests.foldopt.qp.sparse import LAYOUTS, MATRICES, all_sparse, asked, call, densely, sparse

pytestmark = pytest.mark.slow

B, N = 32, 6
BAD = {"infeasible": 3, "unbounded": 11, "nonconvex": 20}
CAUSES = {
    "infeasible": errors.InfeasibleError,
    "unbounded": errors.UnboundedError,
    "nonconvex": errors.NonconvexError,
}
GOOD = [i for i in range(B) if i not in BAD.values()]
WEIGHT = np.arange(1.0, N + 1)


def program(seed):
    """Return a chain of 6 variables: tridiagonal Q, rows x_i + x_(i+1) <= h, the sum of all is 1, x >= -1."""
    draws = np.random.default_rng(seed)
    Q = np.diag(draws.uniform(3, 5, N)) + np.diag(np.ones(N - 1), 1) + np.diag(np.ones(N - 1), -1)
    G = np.eye(N)[:-1] + np.eye(N, k=1)[:-1]
    p, h = 3 * draws.normal(size=N), draws.uniform(0.3, 1, N - 1)
    return Program(Q, p, G, h, np.ones((1, N)), [1], np.full(N, -1), np.full(N, np.inf))


def batch(*causes):
    programs = [program(i) for i in range(B)]
    for cause in causes:
        one = programs[BAD[cause]]
        if cause == "infeasible":
            one.lower = np.full(N, 0.5)
        elif cause == "unbounded":
            one.Q, one.lower = np.zeros((N, N)), np.full(N, -np.inf)
        else:
            one.Q[2, 2] = -4
    return stacked(programs)


def same(found, expected, tol=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=tol * (1 + float(expected.abs().max())))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", ["nan", "zero", "warn"])
def test_failures_are_what_their_policy_says_and_the_others_are_right(policy, layout):
    args, bad = batch(*BAD), list(BAD.values())
    made = all_sparse(args, layout)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        layer, x, gradients = asked(made, WEIGHT, ("Q", "p", "h"), on_failure=policy)
    said = [str(one.message) for one in warned if "found no solution" in str(one.message)]
    assert len(said) == (policy == "warn")
    assert all(f"{cause} at 1 of 32 samples, first [{place}]" in one for cause, place in BAD.items() for one in said)
    assert [layer.last.status[place] for place in bad] == list(BAD)
    assert layer.last.ok.tolist() == [i in GOOD for i in range(B)]
    assert x[bad].isnan().all()
    for i in GOOD:
        same(x[i], torch.tensor(exact(program(i), *clarabel(program(i))[1:])[0]), 1e-9)
    for i in GOOD[::7]:
        same(gradients["p"][i], torch.tensor(truth(program(i)).gradient(WEIGHT)), 1e-8)
    _, _, alone = asked(all_sparse({name: part[GOOD] for name, part in args.items()}), WEIGHT, ("Q", "p", "h"))
    for name, gradient in gradients.items():
        full = densely(gradient, made[name])
        same(full[GOOD], densely(alone[name], sparse(args[name][GOOD], "coo") if name == "Q" else None))
        if policy == "zero":
            assert (full[bad] == 0).all(), name
        if policy == "nan":
            assert full[bad].flatten(1).isnan().any(1).all(), name


@pytest.mark.parametrize("cause", BAD)
def test_the_error_of_a_cause_names_its_sample(cause):
    with pytest.raises(CAUSES[cause]) as caught:
        call(foldopt.QPLayer(), all_sparse(batch(cause)))
    assert caught.value.indices == (BAD[cause],)


def test_errors_name_all_samples_that_failed():
    with pytest.raises(errors.SolverError) as caught:
        call(foldopt.QPLayer(), all_sparse(batch(*BAD)))
    assert caught.value.indices == tuple(BAD.values())
    for cause, place in BAD.items():
        assert f"{cause} at 1 of 32 samples, first [{place}]" in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Q", "p", "G", "A", "lower"])
def test_nan_in_one_sample_is_named_before_anything_is_solved(name, layout):
    args = batch()
    args[name][5].view(-1)[:] = torch.nan
    with pytest.raises(errors.InputError, match=f"^{name} of shape .* holds NaN") as caught:
        call(foldopt.QPLayer(on_failure="nan"), args | {one: sparse(args[one], layout) for one in MATRICES})
    if layout != "coo" or name not in MATRICES:  # whose values are in one row
        assert "first at [[5, 0]" in str(caught.value)


def test_a_linear_program_without_rows_beside_a_quadratic_one():
    Q = torch.stack([torch.eye(2), torch.zeros(2, 2)]).to(F64).to_sparse()
    layer = foldopt.QPLayer(on_failure="nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = layer(Q, torch.ones(2, 2, dtype=F64))
    same(x[0], -torch.ones(2, dtype=F64))
    assert layer.last.status == ("solved", "unbounded")


@pytest.mark.parametrize("form", [torch.clone, torch.Tensor.to_sparse], ids=["dense", "sparse"])
def test_a_singular_program_whose_x_would_be_huge_is_unbounded_beside_others(form):
    """Qd = 0 and p'd < 0 for d = (1, -1, -1); beside x = 1e14 d rounding makes the gradient zero."""
    Q = torch.tensor([[40, 8, 32], [8, 43, -35], [32, -35, 67]], dtype=F64)
    layer = foldopt.QPLayer(on_failure="nan")
    x = layer(form(torch.stack([Q, torch.eye(3, dtype=F64)])), torch.tensor([0, 1.0, 0], dtype=F64))
    assert layer.last.status == ("unbounded", "solved")
    assert x[0].isnan().all()
    same(x[1], torch.tensor([0, -1.0, 0], dtype=F64))


def answers(layer, args):
    _, x, gradients = asked(args, WEIGHT, ("Q", "p", "G", "h"), layer=layer)
    return [x, *(densely(gradient, args[name]) for name, gradient in gradients.items())]


def test_copied_and_pickled_layers_answer_as_the_layer_does():
    args = all_sparse({name: part[:4] for name, part in batch("infeasible").items()}, "csr")
    layer = foldopt.QPLayer(on_failure="zero", degenerate="one_sided")
    expected = answers(layer, args)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for found, one in zip(answers(clone, args), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=1e-13, equal_nan=True)
        assert clone.last.status == layer.last.status


def test_eight_threads_call_one_layer():
    """Every thread has its own pattern or values; the layer keeps four patterns, and the threads use five."""
    layer, jobs = foldopt.QPLayer(on_failure="zero"), []
    for i in range(8):
        args = {name: part[i : i + 4].clone() for name, part in batch("infeasible").items()}
        args["G"][:, i % 5] = 0
        jobs.append(all_sparse(args, LAYOUTS[i % 4]))
    expected = [answers(foldopt.QPLayer(on_failure="zero"), args) for args in jobs]
    found, raised = [[] for _ in jobs], []

    def work(place):
        try:
            for _ in range(3):
                found[place].append(answers(layer, jobs[place]))
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    for place in range(8):
        assert len(found[place]) == 3
        for answer in found[place]:
            for a, b in zip(answer, expected[place], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12, equal_nan=True)


def test_memory_does_not_grow_with_the_calls():
    """200 forward and backward passes with ten programs of five patterns in turn; the layer keeps four patterns."""
    layer, jobs = foldopt.QPLayer(), []
    for i in range(10):
        args = {name: part[i] for name, part in batch().items()}
        args["G"][i % 5] = 0
        jobs.append(all_sparse(args, "csr"))

    def traced(calls):
        for k in range(calls):
            asked(jobs[k % 10], WEIGHT, ("Q", "p"), layer=layer)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = traced(100)
        last = traced(200)
    finally:
        tracemalloc.stop()
    assert last - first < 100_000, "500 bytes a call would be 100 kB"
    assert len(layer._sparse) <= 4


PEAK = """
import sys, torch, foldopt, scipy.sparse as sp
n = int(sys.argv[1])
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB; ru_maxrss is the parent's
def solve(n):
    p = torch.sin(torch.arange(n, dtype=torch.float64) ** 2).requires_grad_()
    one, I = sp.csr_matrix(torch.ones(1, n).numpy()), sp.identity(n, format="csr")
    x = foldopt.QPLayer()(I, p, A=one, b=torch.ones(1), lower=0.0)
    x.square().sum().backward()
    assert abs(float(x.sum()) - 1) < 1e-9
solve(100)
start = peak()
solve(n)
print(peak() - start)
"""


def test_memory_is_linear_in_the_entries():
    """Projections on the simplex with 1e4 and 1e5 variables; a dense Q of the larger would need 80 GB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells the peak of a process")
    peaks = []
    for n in (10_000, 100_000):
        run = subprocess.run([sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout) * 1024)
    assert peaks[1] < 15 * max(peaks[0], 10_000 * 500)
    assert peaks[1] < 100_000 * 5_000, "bytes a variable"
