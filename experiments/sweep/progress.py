"""The display of a study's execution: a live panel on a terminal, one line per run elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from experiments.run import folders
from experiments.sweep.studies import StudyRun


class TimeEstimate:
    """Estimates the seconds left from the mean duration of each series' finished runs, or of all if it has none yet."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def learn(self, series: str, seconds: float) -> None:
        """Note that a run of `series` took `seconds`."""
        self._seconds[series].append(seconds)

    def learn_from(self, run: StudyRun) -> None:
        """Note the wall time that a finished run's summary records."""
        self.learn(run.series, float(folders.load_summary(run.folder)["seconds_wall"]))

    def expected(self, series: str) -> float | None:
        """Return the expected duration of one run of `series`, None before any run has finished."""
        known = self._seconds.get(series) or [value for values in self._seconds.values() for value in values]
        return sum(known) / len(known) if known else None

    def remaining(self, pending: Sequence[str], running: Sequence[tuple[str, float]]) -> float | None:
        """Return the seconds left for `pending` series and `running` (series, seconds elapsed) pairs."""
        left = []
        for series, elapsed in [*running, *((series, 0.0) for series in pending)]:
            expected = self.expected(series)
            if expected is None:
                return None
            left.append(max(expected - elapsed, 0.0))
        return max(sum(left) / self.workers, *left[: len(running)], 0.0)


def duration(seconds: float | None) -> str:
    """Return seconds as a short text, e.g. '42 s' or '3 min 05 s'."""
    if seconds is None:
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """Shows how far a study is. On a terminal a live panel, elsewhere one line when a run ends."""

    def __init__(self, console: Console, total: int, done: int, estimate: TimeEstimate) -> None:
        self._console = console
        self._estimate = estimate
        self._total, self._done = total, done
        self._left: float | None = None
        self._rows: dict[str, TaskID] = {}
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._live,
        )
        self._overall = self._progress.add_task("runs", total=total, completed=done, note="")

    def __enter__(self) -> Display:
        self._console.print(f"{self._total - self._done} runs to do, {self._done} of {self._total} are finished.")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, run: StudyRun) -> None:
        """Show `run` as running."""
        self._rows[run.label] = self._progress.add_task(escape(run.label), total=1, note="")

    def ended(self, run: StudyRun, outcome: str, seconds: float, reason: str = "") -> None:
        """Show that `run` ended as `outcome` (finished, interrupted or failed)."""
        self._progress.remove_task(self._rows.pop(run.label))
        if outcome == "finished":
            self._estimate.learn(run.series, seconds)
        if outcome != "interrupted":
            self._done += 1
            self._progress.update(self._overall, completed=self._done)
        line = f"[{self._done}/{self._total}] {run.label}: {outcome} in {duration(seconds)}"
        if self._left is not None and not self._live:
            line += f", about {duration(self._left)} left"
        if outcome != "finished" or not self._live:
            self._console.print(
                line + (f"\n    {reason}" if reason else ""), markup=False, highlight=False, soft_wrap=True
            )

    def note(self, text: str) -> None:
        """Print one line above the display."""
        self._console.print(text, markup=False)

    def refresh(self, pending: Sequence[StudyRun], running: Sequence[tuple[StudyRun, float]]) -> None:
        """Update the time estimate from what waits and what runs since when (time.monotonic())."""
        now = time.monotonic()
        self._left = self._estimate.remaining(
            [run.series for run in pending], [(run.series, now - since) for run, since in running]
        )
        if self._left is not None:
            self._progress.update(self._overall, note=f"about {duration(self._left)} left")
