"""The report: the paper's claims with verdicts, the figures and the errata, as REPORT.md and as one HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from experiments.report.artifacts import Artifacts, output_root
from experiments.report.claims import VERDICTS, Claim, Finding, Results, claims
from experiments.sweep import studies
from foldopt.errors import InputError

ERRATA = Path(__file__).with_name("errata.md")  # a page of docs/ includes the same table
CLASSES = dict(zip(VERDICTS, ("confirmed", "conditional", "refuted", "untested"), strict=True))
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
img { max-width: 100%; } code { background: #f3f3f3; padding: .1em .3em; border-radius: .2em; }
table { border-collapse: collapse; font-size: .87rem; } th { text-align: left; border-bottom: 2px solid #999; }
td, th { padding: .45rem .6rem; vertical-align: top; } td { border-bottom: 1px solid #ddd; }
.verdict { font-weight: 600; } .confirmed { color: #00724f; } .conditional { color: #0072b2; }
.refuted { color: #b34700; } .untested { color: #666; }
"""


def make(profile: str, names: Sequence[str] | None = None) -> Artifacts:
    """Write REPORT.md and report.html of a profile's results folder, from the tables and figures that are there.

    names: of the studies that are reported; None for all of conf/study.
    """
    artifacts = Artifacts(output_root(profile))
    text = write(Results(artifacts.root), names)
    artifacts.write("REPORT.md", text.encode())
    artifacts.write("report.html", render(text, artifacts.root).encode())
    return artifacts


def write(results: Results, names: Sequence[str] | None = None) -> str:
    """Return the report of the named studies, or of all of conf/study, as markdown."""
    names = studies.names() if names is None else names
    judged = {claim: claim.finding(results) for claim in claims(names)}
    counts = Counter(finding.verdict for finding in judged.values())
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    parts = [
        "# Backpropagation of Unrolled Solvers with Folded Optimization: what was reproduced",
        f"{len(judged)} claims of the paper: {summary}. Each verdict is derived from the numbers beside it by a rule "
        "in the claims.py of its study. The commands in the last column make these numbers.",
        "## Claims",
        "\n".join(_claims(judged)),
        "## Figures",
        *_figures(results.root, names),
        "## Beyond the paper",
        *_tables(results.root, names),
        "## Errata of the paper",
        ERRATA.read_text().strip(),
        "## Made with",
        "\n".join(_provenance(results.root)),
    ]
    return "\n\n".join(parts) + "\n"


def _claims(judged: Mapping[Claim, Finding]) -> Iterator[str]:
    yield "| Place | Claim | Measured | Verdict | Why | Made by |"
    yield "|---|---|---|---|---|---|"
    for claim, finding in judged.items():
        made = ", ".join(f"`{command}`" for command in claim.commands)
        measured, why = (text.replace("|", "\\|") for text in (finding.measured, finding.why))
        yield f"| {claim.place} | {claim.statement} | {measured} | **{finding.verdict}** | {why} | {made} |"


def _figures(root: Path, names: Sequence[str]) -> Iterator[str]:
    for name, title in _titles("figures", names):
        if (root / "figures" / f"{name}.png").is_file():
            yield f"### {title}\n\n![{title}](figures/{name}.png)"


def _tables(root: Path, names: Sequence[str]) -> Iterator[str]:
    for name, title in _titles("tables", names):
        path = root / "tables" / f"{name}.md"
        if path.is_file():
            yield f"### {title}\n\n{path.read_text().strip()}"


def _titles(kind: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield file name and title of what the studies show in the report; kind: "figures" or "tables"."""
    for name in names:
        yield from getattr(studies.load(name), kind).items()


def _provenance(root: Path) -> Iterator[str]:
    """Yield a line per study with the number of runs, devices and torch versions, and the file with all details."""
    for path in sorted((root / "provenance").glob("*.json")):
        content = json.loads(path.read_text())
        torch = " and ".join(content["versions"]["torch"])
        devices = " and ".join(content["devices"])
        yield (
            f"- `{path.stem}`: {content['runs']} runs, {content['seeds']} seeds, {content['hours']:g} h in all on "
            f"{devices}, torch {torch}; `provenance/{path.name}` has commits, versions and configurations."
        )


def render(text: str, root: Path) -> str:
    """Return markdown as an HTML page with the pictures, whose files are under `root`, embedded."""
    body = MarkdownIt("commonmark").enable("table").render(text)

    def inlined(match: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((root / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', inlined, body)
    for verdict, name in CLASSES.items():
        body = body.replace(f"<strong>{verdict}</strong>", f'<span class="verdict {name}">{verdict}</span>')
    heading = re.search(r"<h1>(.*?)</h1>", body)
    if heading is None:
        raise InputError("text has no heading of the first level (# ...) for the title of the page; add one.")
    head = f'<meta charset="utf-8"><title>{heading[1]}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'
