"""A run reads as one story: the calls from `execute` to the summary move between few files, as CONTRIBUTING tells."""

import re
import sys
import traceback
from itertools import pairwise
from pathlib import Path

import pytest

from experiments.run.execution import execute

ROOT = Path(__file__).resolve().parents[3]
ROOM = str(ROOT / "experiments" / "run")
MOST_MOVES, MOST_CLIMBS = 30, 12


@pytest.fixture
def calls(tiny, console):
    """The calls of one run inside the project, in order: (file, name, depth of the stack)."""
    noted = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT / "experiments")) and code.co_name[0] != "<":
            noted.append((code.co_filename, code.co_qualname, sum(1 for _ in traceback.walk_stack(frame))))

    cfg = tiny("train.epochs=1", "train.batch_size=32")
    sys.setprofile(note)
    try:
        assert execute(cfg, console) == 0
    finally:
        sys.setprofile(None)
    return noted


def test_a_run_moves_between_few_files_and_seldom_climbs_back(calls):
    inside = [call for call in calls if call[0].startswith(ROOM) and "<locals>" not in call[1]]
    moves = [(a, b) for a, b in pairwise(inside) if a[0] != b[0]]
    climbs = [(a, b) for a, b in moves if b[2] < a[2]]
    assert inside[0][1] == "execute"
    assert len(moves) <= MOST_MOVES, moves
    assert len(climbs) <= MOST_CLIMBS, climbs


def test_a_run_goes_the_way_that_contributing_tells(calls):
    """Each step names a file of experiments/ and a function, or a class, that is called there, in this order."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("From `python run.py")[2]
    steps = re.findall(r"^\d+\. `(experiments/[^`]+\.py)`: `(\w+)`", text, re.MULTILINE)
    assert len(steps) == 9, "the first step is run.py"
    seen = iter(calls)
    for path, name in steps:
        assert any(file.endswith(path) and name in called.split(".") for file, called, _ in seen), (path, name)
