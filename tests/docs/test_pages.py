"""The code on the pages and in the README prints what they show; commands exist; links lead somewhere."""

import math
import os
import re
import subprocess
import sys

import pytest

from experiments.run import configuration
from scripts import sweep
from tests.docs.pages import DOCS, NOT_COMPARED, NOT_RUN, ROOT, anchors, blocks, examples, links, pages

NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
END = "\x1e"  # printed after each block, to tell the outputs apart
PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
RUNNING = [name for name, page in PAGES.items() if examples(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_the_code_of_a_page_prints_what_the_page_shows(name, tmp_path):
    found = examples(PAGES[name].read_text())
    code = "".join(f"{block}\nprint({END!r}, end='')\n" for block, _ in found)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (block, shown), printed in zip(found, done.stdout.split(END), strict=False):
        assert shown is not None or not printed.strip(), f"the page does not show what this prints:\n{block}"
        assert shown is None or agree(printed, shown), f"{block}\nprints\n{printed}\nand not\n{shown}"


def agree(printed, shown):
    """Whether two outputs have the same words, and the same numbers up to the digits that are shown."""
    words = [re.sub(r"[\s,]+", " ", NUMBER.sub("#", text)).replace("[ ", "[").strip() for text in (printed, shown)]
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    close = (math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in zip(*numbers, strict=False))
    return words[0] == words[1] and len(numbers[0]) == len(numbers[1]) and all(close)


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("tensor([[ 0.5000, -0.0000]])", "tensor([[0.5, 0.0]])", True),
        ("tensor([[ 0.5000, -0.0000]])", "tensor([[0.6, 0.0]])", False),
        ("('solved',)", "('infeasible',)", False),
        ("1 2", "1", False),
    ],
)
def test_outputs_agree_by_words_and_numbers(printed, shown, same):
    assert agree(printed, shown) == same


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_is_not_run_has_a_reason(name):
    for block in blocks(PAGES[name].read_text()):
        for mark in (NOT_RUN, NOT_COMPARED):
            excused = mark.match(block.comment)
            assert not excused or len(excused[1].split()) > 3, block.comment
        assert block.language, f"a block of {name} has no language:\n{block.text}"


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_lead_somewhere(name):
    page = PAGES[name]
    for target in links(page.read_text()):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        file = built_from(file)
        assert file.exists(), f"{name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{name} links to {target}"


def built_from(file):
    """Return the file of the repository that docs/hooks.py makes a page of the site from."""
    for folder in ("results", "examples"):
        if file.is_relative_to(DOCS / folder) and not file.exists():
            mirrored = ROOT / folder / file.relative_to(DOCS / folder)
            return mirrored if mirrored.exists() else mirrored.with_suffix(".py")
    return file


def test_commands_of_make_and_of_sweeps_exist():
    texts = [page.read_text() for page in PAGES.values()]
    commands = "\n".join(block.text for text in texts for block in blocks(text) if block.language == "sh")
    inline = "\n".join(command for text in texts for command in re.findall(r"`(make [^`]+)`", text))
    targets = set(re.findall(r"^make (?:[A-Z]+=\S+ )?([a-z][a-z0-9-]*)", f"{commands}\n{inline}", re.MULTILINE))
    assert targets >= {"reproduce", "test", "docs"}
    done = subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in re.findall(r"^python -m scripts\.sweep ([^#\n]+)", commands, re.MULTILINE):
        sweep.parser().parse_args(line.split())


def test_commands_of_runs_can_be_composed():
    commands = [
        line.split("#")[0].split()
        for page in PAGES.values()
        for block in blocks(page.read_text())
        if block.language == "sh"
        for line in re.findall(r"^python run\.py (?!-)(.+)$", block.text, re.MULTILINE)
    ]
    assert len(commands) > 6
    for command in commands:
        if not any(part.startswith("+tuned") for part in command):  # a file that a search writes
            configuration.compose(command)


def test_the_readme_fits_on_two_screens():
    assert len(PAGES["README.md"].read_text().splitlines()) <= 200
