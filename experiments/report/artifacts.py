"""Output files: figures and tables whose bytes depend only on the runs, and a record of what has changed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.report.markdown import table
from experiments.run.configuration import ROOT
from experiments.run.folders import write_atomically

RESULTS = ROOT / "results"
METADATA: Mapping[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


@dataclass
class Artifacts:
    """The files of one command under `root`; `written` and `unchanged` are the files that a write changed or not."""

    root: Path
    written: list[Path] = field(default_factory=list)
    unchanged: list[Path] = field(default_factory=list)

    def write(self, name: str, content: bytes) -> Path:
        """Write `content` to root/name unless the file has this content already; return its path."""
        path = self.root / name
        if path.is_file() and path.read_bytes() == content:
            self.unchanged.append(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
            self.written.append(path)
        return path

    def figure(self, name: str, figure: Figure) -> None:
        """Write figures/<name>.png (200 dpi) and .pdf without time stamps, and close the figure."""
        for kind, metadata in METADATA.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
            self.write(f"figures/{name}.{kind}", buffer.getvalue())
        plt.close(figure)

    def csv(self, name: str, frame: pd.DataFrame) -> None:
        """Write `frame` as <name>.csv with 6 significant digits."""
        self.write(f"{name}.csv", frame.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())

    def markdown(self, name: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
        """Write a table as <name>.md, with `note` below it."""
        self.write(f"{name}.md", ("\n".join([*table(header, rows), "", note]) + "\n").encode())

    def lines(self) -> list[str]:
        """Return one line per file that was written, or one line that says that nothing has changed."""
        if not self.written:
            return [f"Nothing to do: {len(self.unchanged)} files under {self.root} are up to date."]
        return [f"wrote {path}" for path in self.written]


def output_root(profile: str) -> Path:
    """Return the folder of a profile's figures and tables: results/ for "default", else results/<profile>/."""
    return RESULTS if profile == "default" else RESULTS / profile
