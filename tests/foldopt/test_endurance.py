"""Long training: no objects, file handles or threads pile up, and memory stays flat.

The first fifth of the steps may fill caches; from there on nothing grows. Objects are counted one by one, for which 20
steps are enough; memory outside of Python needs the steps of `LONG` to show. ``make endurance`` takes 10,000.
"""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import foldopt
from tests.foldopt.cases import CASES, normal
from tests.foldopt.steps import heron

SHORT, LONG = 20, int(os.environ.get("ENDURANCE_STEPS", "500"))
MEBIBYTE = 2**20
LAYERS = {
    **{name: case.layer for name, case in CASES.items()},
    "unfold": lambda: foldopt.unfold(torch.sqrt, heron, iterations=5),
    "unroll": lambda: foldopt.unroll(torch.ones_like, heron, iterations=20),
}


def parameters(name):
    if name in CASES:
        return CASES[name].params(torch.Generator().manual_seed(0), 2)
    return [1 + normal(torch.Generator().manual_seed(0), 2, 3).abs()]


def used():
    """Resident memory in bytes, objects that the collector knows, file handles and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    known = len(gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), known, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process uses")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [SHORT, LONG])
def test_long_training_uses_no_more_and_no_more(name, steps):
    layer = LAYERS[name]()
    params = [p.detach().requires_grad_() for p in parameters(name)]
    optimizer = torch.optim.SGD(params, lr=1e-9)
    for step in range(steps):
        if step == steps // 5:
            before = used()
        optimizer.zero_grad()
        layer(*params).square().sum().backward()
        optimizer.step()
    after = used()
    grown = [b - a for a, b in zip(before, after, strict=True)]
    print(f"{name}: {steps} steps, {grown[0] / MEBIBYTE:+.1f} MiB, {grown[1:]} objects, file handles, threads")
    assert grown[1] < SHORT // 2, "less than one in a step"
    assert grown[2:] == [0, 0]
    if steps > SHORT:
        assert grown[0] <= 8 * MEBIBYTE


PILING = """
import torch
from tests.foldopt.test_endurance import used
before = used()
kept = [torch.ones(2**20, dtype=torch.float64) for _ in range(16)] + [[i] for i in range(1000)]
with open("pyproject.toml"):
    after = used()
print(*(b - a for a, b in zip(before, after)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what a process uses")
def test_the_measure_sees_what_piles_up():
    """In a process of its own, which has no freed memory to put it in."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", PILING], cwd=root, capture_output=True, text=True, check=True)
    memory, objects, files, _ = map(int, done.stdout.split())
    assert memory > 100 * MEBIBYTE
    assert 900 < objects < 1200
    assert files == 1
