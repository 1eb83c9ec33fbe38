"""The built site: it needs no network to be read, every link in it leads somewhere, and results are not copies."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest

from foldopt import errors
from tests.docs.pages import DOCS, ROOT, anchors, pages

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Content(HTMLParser):
    """What an HTML page loads, what it links to, and the anchors that it has."""

    def __init__(self):
        super().__init__()
        self.loaded, self.links, self.anchors = [], [], {""}

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in sorted(folder.rglob("*.html")):
        found[path] = Content()
        found[path].feed(path.read_text())
    assert len(found) > 50
    return folder, found


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site):
    folder, found = site
    for page, content in found.items():
        for address in content.loaded:
            assert not re.match(r"(\w+:)?//", address), f"{page} loads {address}"
    for style in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    folder, found = site
    for page, content in found.items():
        for link in (*content.links, *content.loaded):
            if re.match(r"[a-z]+:", link) or page.name == "404.html":
                continue
            path, anchor = urldefrag(unquote(link))
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(folder)} links to {link}"
            if target in found:
                assert anchor in found[target].anchors, f"{page.relative_to(folder)} links to {link}"


@pytest.mark.slow
def test_results_and_examples_are_shown_as_they_are(site):
    folder, _ = site
    for picture in (ROOT / "results" / "figures").glob("*.png"):
        assert (folder / "results" / "figures" / picture.name).read_bytes() == picture.read_bytes()
    for script in (ROOT / "examples").glob("*.py"):
        assert (folder / "examples" / f"{script.stem}.html").is_file() or script.stem == "__init__"


def test_no_page_copies_a_table_of_the_results():
    for page in pages():
        text = page.read_text()
        for table in (ROOT / "results").glob("[bt]*/*.md"):
            rows = [line for line in table.read_text().splitlines() if line.startswith("| ") and len(line) > 40]
            assert not any(row in text for row in rows), f"{page} copies a row of {table}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= listed


def test_every_error_has_a_section_and_every_section_an_error():
    classes = {name.lower() for name, value in vars(errors).items() if isinstance(value, type)}
    classes = {name for name in classes if name.endswith("error")}
    assert classes == {anchor for anchor in anchors((DOCS / "errors.md").read_text()) if anchor.endswith("error")}


@pytest.mark.parametrize("name", ["robustness.md", "guide/comparison.md"])
def test_every_claim_names_its_test(name):
    """Rows of tables: below the heading of a table each line names a test, but for what is tried by hand."""
    lines = (DOCS / name).read_text().splitlines()
    claims = [row for row in lines if row.startswith("| ") and "| Test |" not in row and not row.startswith("| | ")]
    assert len(claims) >= 12
    for row in claims:
        assert "`test_" in row, row


def test_every_test_that_a_page_names_exists():
    named = {name for page in pages() for name in re.findall(r"`(test_\w+)`", page.read_text())}
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in tests for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert len(named) > 50
    assert named <= defined, named - defined


def test_every_path_that_a_page_names_exists():
    """In code within the text; what runs make, or users put there, is not in the repository."""
    folders = "foldopt|experiments|tests|conf|docs|examples|scripts|data"
    named = {path for page in pages() for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text())}
    assert len(named) > 40
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing <= {"conf/tuned/", "data/cache", "docs/assets/examples/"}
