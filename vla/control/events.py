"""The event of a control step.

Owns: the record that the control loop passes to its listeners (black box, operator console, ROS 2 diagnostics), and the
definition of a fault.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vla.control.robot import Reading

#: Reasons to hold that are not faults.
_EXPECTED = frozenset({"no chunk yet", "on hold"})
#: Reasons to limit a command; they are not faults, either.
_LIMITS = frozenset({"range", "jump", "velocity", "acceleration", "workspace"})


@dataclasses.dataclass(frozen=True)
class StepEvent:
    """One control step.

    Attributes:
        tick: number of the step in the run.
        lateness_s: time from the deadline to the command, in seconds.
        reading: the robot's latest observation.
        command: the command sent to the robot, float32 [D].
        reasons: why `command` differs from the policy's action (empty if it does not).
        decoding: the chunk that was completed in this step, {asked, ms, ids, entropy} or {asked, ms, error}; None if
            none was completed. `asked` is the step of its request.
    """

    tick: int
    lateness_s: float
    reading: Reading
    command: np.ndarray
    reasons: tuple[str, ...]
    decoding: dict[str, Any] | None

    @property
    def fault(self) -> str | None:
        """The name of the first fault of this step; None without a fault."""
        if self.decoding is not None and "error" in self.decoding:
            return "policy error"
        return next((reason for reason in self.reasons if reason not in _EXPECTED | _LIMITS), None)
