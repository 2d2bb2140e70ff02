"""What happened in one control step.

Owns: the record that the control loop hands to its listeners (black box, operator console, ROS 2 diagnostics), and
which of its reasons are faults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vla.control.robot import Reading

#: Reasons to hold that are not faults.
_EXPECTED = frozenset({"no chunk yet", "on hold"})
#: Reasons for which a command is changed instead of replaced: they are counted, but are not faults either.
_LIMITS = frozenset({"range", "jump", "velocity", "acceleration", "workspace"})


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """One control step.

    Attributes:
        tick: number of the step in the run.
        lateness_s: from the deadline to the command.
        reading: the robot's latest observation.
        command: what was sent to the robot, float32 [D].
        reasons: why `command` differs from the policy's action; empty: it does not.
        decoding: the chunk that was completed in this step: {asked, ms, ids, entropy} or {asked, ms, error}; else
            None. Its first actions may have been executed since the step `asked`.
    """

    tick: int
    lateness_s: float
    reading: Reading
    command: np.ndarray
    reasons: tuple[str, ...]
    decoding: dict[str, Any] | None

    @property
    def fault(self) -> str | None:
        """The first fault of this step by name; None without one."""
        if self.decoding is not None and "error" in self.decoding:
            return "policy error"
        return next((reason for reason in self.reasons if reason not in _EXPECTED | _LIMITS), None)
