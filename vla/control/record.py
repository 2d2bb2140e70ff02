"""The record of one run of the control loop.

Owns: the record that `Controller.run` returns: timing, errors of the policy, and the smoothness of the commands.
"""

from __future__ import annotations

import array
import collections
from typing import Any

import numpy as np

from vla.control.clock import Rate

_MAX_ERRORS = 1000


class RunRecord:
    """The record of a running control loop. Its memory grows only by 8 bytes per timing measurement.

    Attributes:
        success: whether the task ended in success.
    """

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self.success = False
        self._recent: collections.deque[np.ndarray] = collections.deque(maxlen=4)  # commands
        self._jerk, self._jerks = 0.0, 0
        self._decode_s, self._first_action_s = array.array("d"), array.array("d")
        self._errors: list[str] = []

    def sent(self, command: np.ndarray) -> None:
        self._recent.append(command)
        if len(self._recent) == 4:
            a, b, c, d = self._recent
            self._jerk += float(np.abs(d - 3 * c + 3 * b - a).mean())
            self._jerks += 1

    def decoded(self, seconds: float, first_s: float) -> None:
        """Record the decoding time of a chunk, and the time to its first action, in seconds."""
        self._decode_s.append(seconds)
        self._first_action_s.append(first_s)

    def failed(self, error: str) -> None:
        if len(self._errors) < _MAX_ERRORS:
            self._errors.append(error)

    def report(self, late_actions: int) -> dict[str, Any]:
        """The record as plain values, as documented by `Controller.run`."""
        return {
            "success": self.success,
            "commands": len(self._rate.lateness),
            "skipped": self._rate.skipped,
            "missed": self._rate.missed,
            "lateness_ms": [round(1e3 * late, 3) for late in self._rate.lateness],
            "first_action_ms": [round(1e3 * seconds, 3) for seconds in self._first_action_s],
            "decode_ms": [round(1e3 * seconds, 3) for seconds in self._decode_s],
            "late_actions": late_actions,
            "errors": self._errors,
            "jerk": self._jerk / max(self._jerks, 1),
        }
