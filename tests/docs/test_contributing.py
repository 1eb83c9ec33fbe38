"""The paths through the code in CONTRIBUTING: their files, functions and classes exist and are called in order."""

import re
import sys

import pytest
import torch

import foldopt
from tests.docs.pages import ROOT


def paths():
    """The numbered lists of CONTRIBUTING: of each the lines, (file, names of functions and classes)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lists = re.split(r"^(?=1\. `)", text, flags=re.MULTILINE)[1:]
    lines = [re.findall(r"^\d+\. `([^`]+\.py)`: (.+)$", part, re.MULTILINE) for part in lists]
    return [[(path, re.findall(r"`(\w+)`", said)) for path, said in part] for part in lines]


@pytest.mark.parametrize("number", [0, 1])
def test_the_paths_through_the_house_are_told_truly(number):
    steps = paths()[number]
    assert len(steps) == 10
    rooms = [ROOT / "run.py", *(path for room in ("foldopt", "experiments") for path in (ROOT / room).rglob("*.py"))]
    defined = {str(path.relative_to(ROOT)): set(re.findall(r"(?:def|class) (\w+)", path.read_text())) for path in rooms}
    for path, names in steps:
        assert names[0] in defined[path], path
        assert set(names) <= set.union(*defined.values()), names


def test_a_call_of_a_layer_goes_the_way_that_is_told():
    called = []

    def note(frame, event, _):
        if event == "call":
            called.append((frame.f_code.co_filename, frame.f_code.co_name))

    p = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    layer = foldopt.QPLayer()
    sys.setprofile(note)
    try:
        layer(torch.eye(3), p, A=torch.ones(1, 3), b=torch.ones(1), lower=0).sum().backward()
    finally:
        sys.setprofile(None)
    seen = iter(called)
    for path, names in paths()[0]:
        assert any(file.endswith(path) and name == names[0] for file, name in seen), (path, names[0])
