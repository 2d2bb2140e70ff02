"""The control rate.

Owns: absolute deadlines on a monotonic clock, and the record of how well they were kept. A late tick does not move the
ticks after it, and ticks that were slept through are skipped and counted, never made up for in a burst.
"""

from __future__ import annotations

import array
import math
import time
from collections.abc import Callable


class Rate:
    """`hz` ticks per second from `start` on; tick k is due at start + k / hz.

    Attributes:
        tick: index of the tick that `wait` last returned; -1 before the first.
        skipped: ticks that nobody was awake for.
        lateness: seconds from each tick's deadline to its command: the jitter of the command stream.
    """

    def __init__(
        self,
        hz: float,
        start: float | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.period = 1.0 / hz
        self._start = now() if start is None else start
        self._now, self._sleep = now, sleep
        self.tick, self.skipped = -1, 0
        self.lateness = array.array("d")

    def deadline(self, tick: int) -> float:
        return self._start + tick * self.period

    def left(self) -> float:
        """Seconds until the next tick is due."""
        return self.deadline(self.tick + 1) - self._now()

    def wait(self) -> int:
        """Sleep until the next tick and return its index."""
        due = self.tick + 1
        # A tick is gone when the next one is due.
        missed = math.floor((self._now() - self.deadline(due)) / self.period)
        if missed > 0:
            self.skipped += missed
            due += missed
        while (left := self.deadline(due) - self._now()) > 0:
            self._sleep(left)
        self.tick = due
        return due

    def sent(self) -> None:
        """The command of this tick has left."""
        self.lateness.append(self._now() - self.deadline(self.tick))

    @property
    def missed(self) -> int:
        """Deadlines that were missed: ticks skipped, and commands sent after the next tick was due."""
        return self.skipped + sum(late > self.period for late in self.lateness)
