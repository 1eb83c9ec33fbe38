"""What mkdocs does beside the pages in docs/: it shows results/ and examples/ as they are when the site is built.

The committed results appear under results/ in the site, with their own links between them; each script of examples/
becomes a page of its text cells and its code, and a card of the gallery of examples.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("*.md", "bench/*.md", "figures/*.png", "figures/*.csv", "tables/*.md")
HOURS = "<!-- hours of each study -->"
TEST = re.compile(r"<code>test_\w+</code>")
GALLERY = re.compile("<!-- gallery: (.*?) -->")


def on_config(config: MkDocsConfig) -> None:
    """List the pages of the examples below their index in the navigation."""
    pages = [{described(path)[0]: f"examples/{name}.md"} for name, path in scripts().items()]
    parts = [part for tab in config.nav or [] for part in tab.values() if isinstance(part, list)]
    entries = [item for part in parts for item in part if isinstance(item, dict) and "Examples" in item]
    if not entries:
        raise PluginError("mkdocs.yml has no entry 'Examples' below a tab of its nav, where the pages of examples go.")
    entries[0]["Examples"] = [entries[0]["Examples"], *pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the committed results and a page for each example."""
    for pattern in RESULTS:
        for path in sorted((ROOT / "results").glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md":
                files.append(File.generated(config, name, content=titled(path)))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in scripts().values():
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the gallery of examples and the hours of the studies where a page has the comment for them."""
    listed = " ".join(GALLERY.findall(markdown))
    markdown = GALLERY.sub(lambda match: gallery(match[1], listed), markdown)
    return markdown.replace(HOURS, "\n".join(hours()))


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


def scripts() -> dict[str, Path]:
    """Return the examples by name, in the order of their names."""
    return {path.stem: path for path in sorted((ROOT / "examples").glob("[!_]*.py"))}


def gallery(asked: str, listed: str) -> str:
    """Return the cards of examples: those named in `asked`, or with "the others" those that `listed` does not name."""
    others = [name for name in scripts() if name not in re.findall(r"\w+", listed)]
    names = others if asked == "the others" else asked.split()
    return "\n".join(["<div class='gallery' markdown>", *(card(scripts()[name]) for name in names), "</div>"])


def card(path: Path) -> str:
    """Return an example's place in the gallery: its figure, which leads to its page, its title and its sentence."""
    title, sentence = described(path)
    figure = ROOT / "docs" / "assets" / "examples" / f"{path.stem}.png"
    picture = f"[![](../assets/examples/{figure.name})]({path.stem}.md)\n\n" if figure.is_file() else ""
    return f"<div markdown>\n\n{picture}**[{title}]({path.stem}.md)**\n\n{sentence}\n\n</div>"


def described(path: Path) -> tuple[str, str]:
    """Return an example's title and the sentence of the gallery: the two paragraphs of its docstring."""
    title, _, sentence = (ast.get_docstring(ast.parse(path.read_text())) or path.stem).partition("\n\n")
    return title.rstrip("."), sentence


def example(path: Path) -> str:
    """Return the page of an example: its docstring, how it is run, and its cells."""
    title, sentence = described(path)
    command = (
        f"The script is `examples/{path.name}`. It opens as a notebook in VS Code and in Jupyter with jupytext. "
        f"`python examples/{path.name}` runs it; `python -m scripts.examples {path.stem}` also redraws the figure."
    )
    wide = "---\nhide: [toc]\n---"  # lines of code need the room of the table of contents
    return "\n\n".join([wide, f"# {title}", sentence, f"<small>{command}</small>", *cells(path)]) + "\n"


def cells(path: Path) -> list[str]:
    """Return the percent cells of a script as Markdown: text cells as text, the others as blocks of code.

    Links of text cells are relative to the script, as an editor needs them; here they become those of the site.
    """
    found = []
    for cell in path.read_text().split("\n# %%")[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            found.append(re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", text.replace("](../docs/", "](../")))
        elif body.strip():
            found.append(f"```python\n{body.strip()}\n```")
    return found
