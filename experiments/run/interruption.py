"""Signals that ask a run to stop where it can resume: SIGINT, SIGTERM, and SIGUSR1, by which Slurm warns."""

from __future__ import annotations

import signal
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_CODES = tuple(128 + number for number in SIGNALS)
BUSY = 75  # exit code of a run that another process executes


class StopRequest:
    """Notes SIGNALS instead of ending the process; a context manager, for the main thread.

    signal: the first that came, None so far. count: how many came. insist: a second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self, insist: bool = False) -> None:
        self.signal: int | None = None
        self.count = 0
        self._insist = insist

    @property
    def exit_code(self) -> int:
        """128 + signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1; 0 if none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number
        self.count += 1
        if self._insist and self.count > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt


class Interrupted(BaseException):
    """A run stops because of a signal; like KeyboardInterrupt it is no Exception, so nothing takes it for a failure.

    exit_code: that of the process, see `StopRequest`. begun: what was done of the current epoch, in plain numbers.
    """

    def __init__(self, exit_code: int, begun: dict[str, Any] | None = None) -> None:
        super().__init__(exit_code)
        self.exit_code, self.begun = exit_code, begun
