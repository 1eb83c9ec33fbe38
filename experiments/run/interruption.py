"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning before a time limit) as a request to stop at a resumable point."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_CODES = tuple(128 + number for number in SIGNALS)
BUSY = 75  # exit code of a run that another process executes


class StopRequest:
    """Counts SIGNALS while active (a context manager, main thread): `signal` is the first that came.

    insist: a second SIGINT raises KeyboardInterrupt at once.
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
