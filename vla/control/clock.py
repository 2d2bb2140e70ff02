"""The control rate.

Owns: absolute deadlines on a monotonic clock, and the lateness of commands. A late tick does not delay later ticks:
missed ticks are skipped and counted.
"""

from __future__ import annotations

import array
import math
import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds, such as the module `time`."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Rate:
    """`hz` ticks per second from `start` on; tick k is due at start + k / hz.

    Attributes:
        tick: index of the tick that `wait` last returned; -1 before the first.
        skipped: number of skipped ticks.
        lateness: seconds from each tick's deadline to its command.
    """

    def __init__(self, hz: float, start: float | None = None, clock: Clock = time) -> None:
        self.hz, self.period = hz, 1.0 / hz
        self.clock = clock
        self._start = clock.monotonic() if start is None else start
        self.tick, self.skipped = -1, 0
        self.lateness = array.array("d")

    def deadline(self, tick: int) -> float:
        return self._start + tick * self.period

    def remaining(self) -> float:
        """Seconds until the next tick is due."""
        return self.deadline(self.tick + 1) - self.clock.monotonic()

    def wait(self) -> int:
        """Sleep until the next tick and return its index."""
        due = self.tick + 1
        # A tick is skipped once the next tick is due.
        missed = math.floor((self.clock.monotonic() - self.deadline(due)) / self.period)
        if missed > 0:
            self.skipped += missed
            due += missed
        while (remaining := self.deadline(due) - self.clock.monotonic()) > 0:
            self.clock.sleep(remaining)
        self.tick = due
        return due

    def sent(self) -> None:
        """Record that the command of this tick has been sent."""
        self.lateness.append(self.clock.monotonic() - self.deadline(self.tick))

    @property
    def missed(self) -> int:
        """Number of missed deadlines: skipped ticks, and commands sent after the next tick was due."""
        return self.skipped + sum(late > self.period for late in self.lateness)
