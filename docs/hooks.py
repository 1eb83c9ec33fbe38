"""What mkdocs does beside the pages in docs/: it shows results/ and examples/ as they are when the site is built.

The committed results appear under results/ in the site, with their own links between them; each script of examples/
becomes a page of its text cells, its code and, where docs/assets/examples/ has one of its name, its figure.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("*.md", "bench/*.md", "figures/*.png", "figures/*.csv", "tables/*.md")
HOURS = "<!-- hours of each study -->"
TEST = re.compile(r"<code>test_\w+</code>")
GALLERY = "<!-- one line for each script of examples/ -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the committed results and a page for each example."""
    for pattern in RESULTS:
        for path in sorted((ROOT / "results").glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md":
                files.append(File.generated(config, name, content=titled(path)))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in scripts():
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the list of examples and the hours of the studies where a page has the comment for them."""
    lines = [f"- [{title(path)}]({path.stem}.md)" for path in scripts()]
    return markdown.replace(GALLERY, "\n".join(lines)).replace(HOURS, "\n".join(hours()))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the long names of tests break at their underscores, so that they leave room for the other columns."""
    return TEST.sub(lambda match: match[0].replace("_", "_<wbr>"), html)


def hours() -> Iterator[str]:
    """Yield a table of what the runs of each study took, from the provenance of the committed results."""
    yield "| Study | Command for its figures and tables | Runs | Core hours |"
    yield "|---|---|---|---|"
    for path in sorted((ROOT / "results" / "provenance").glob("*.json")):
        study = yaml.safe_load((ROOT / "conf" / "study" / f"{path.stem}.yaml").read_text())
        made = json.loads(path.read_text())
        yield f"| {study['title']} | `make {path.stem.replace('_', '-')}` | {made['runs']} | {made['hours']:g} |"


def titled(path: Path) -> str:
    """Return a file of results with a heading, which a table by itself lacks."""
    text = path.read_text()
    return text if text.startswith("# ") else f"# {path.stem.replace('_', ' ').capitalize()}\n\n{text}"


def scripts() -> list[Path]:
    """Return the examples, in the order of their names."""
    return [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "__init__"]


def title(path: Path) -> str:
    """Return what the first line of an example says before its colon."""
    return described(path).splitlines()[0].split(":")[0].rstrip(".")


def described(path: Path) -> str:
    """Return the docstring of an example."""
    return ast.get_docstring(ast.parse(path.read_text())) or path.stem.replace("_", " ").capitalize()


def example(path: Path) -> str:
    """Return the page of an example: its docstring, figure and cells."""
    parts = [f"# {title(path)}", described(path)]
    figure = ROOT / "docs" / "assets" / "examples" / f"{path.stem}.png"
    if figure.is_file():
        parts.append(f"![{title(path)}](../assets/examples/{path.stem}.png)")
    parts.append(f"Run it with `python -m examples.{path.stem}`.")
    return "\n\n".join([*parts, *cells(code_of(path))]) + "\n"


def code_of(path: Path) -> str:
    """Return the source of an example below its docstring."""
    source = path.read_text()
    first = ast.parse(source).body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return "\n".join(source.splitlines()[first.end_lineno if documented else 0 :])


def cells(code: str) -> list[str]:
    """Return the percent cells of a script as Markdown: text cells as text, the others as blocks of code."""
    found = []
    for cell in f"\n{code}".split("\n# %%"):
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            found.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
        elif body.strip():
            found.append(f"```python\n{body.strip()}\n```")
    return found
