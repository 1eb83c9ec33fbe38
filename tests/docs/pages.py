"""The pages of the documentation as the tests read them: blocks of code, links and anchors, found by their fences."""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOT_RUN = re.compile(r"<!-- not run: (.*?)\s*-->")
NOT_COMPARED = re.compile(r"<!-- output shown: (.*?)\s*-->")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the comment that stands directly before it."""

    language: str
    text: str
    comment: str


def pages():
    """Return the pages of the site that are written by hand, and those at the top of the repository."""
    return [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def blocks(text):
    """Return the fenced blocks of a page in their order."""
    found, comment = [], ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            found.append(Block(token.info.strip(), token.content, comment))
        comment = token.content.strip() if token.type == "html_block" else ""
    return found


def examples(text):
    """Return the Python blocks of a page that run, each with the output that a text block after it shows, or None."""
    found = []
    fenced = [*blocks(text), Block("", "", "")]
    for block, after in itertools.pairwise(fenced):
        if block.language == "python" and not NOT_RUN.fullmatch(block.comment):
            shown = after.language == "text" and not NOT_COMPARED.fullmatch(after.comment)
            found.append((block.text, after.text if shown else None))
    return found


def links(text):
    """Return the targets of all links and pictures of a page."""
    return [
        child.attrs.get("href") or child.attrs.get("src")
        for token in MarkdownIt("commonmark").enable("table").parse(text)
        for child in token.children or []
        if child.type in ("link_open", "image")
    ]


def anchors(text):
    """Return the anchors of the headings of a page."""
    found = []
    tokens = MarkdownIt("commonmark").parse(text)
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            words = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower().strip()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found
