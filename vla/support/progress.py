"""Progress of long jobs.

Owns: the progress bar in a terminal, and the periodic lines in a log.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LOG_EVERY_S = 20.0


class Progress:
    """A context manager that displays the progress up to `total` items, the rate, a note and the remaining time.

    Args:
        total: number of items.
        unit: name of the items, in the plural.
        done: number of items finished by an earlier run, which do not count for the rate.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self._total, self._unit, self._done, self._before = total, unit, done, done
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task(unit, total=total, completed=done)

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, note: str) -> None:
        """Count one finished item, and show `note`."""
        self._done += 1
        now = time.monotonic()
        per_second = (self._done - self._before) / max(now - self._start, 1e-9)
        rate = f"{per_second:.1f}/s" if per_second >= 1 else f"{60 * per_second:.1f}/min"
        state = f"{note}, {rate}"
        if self._bar:
            self._bar.update(self._task, advance=1, description=state)
        elif now - self._last > LOG_EVERY_S:
            remaining = duration((self._total - self._done) / per_second)
            line = f"{self._done} of {self._total} {self._unit}: {state}, {remaining} remaining"
            print(line, file=sys.stderr, flush=True)
            self._last = now


def duration(seconds: float) -> str:
    """A duration in readable units.

    >>> [duration(seconds) for seconds in (0.4, 59.4, 100, 5000)]
    ['0 s', '59 s', '2 min', '1.4 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
