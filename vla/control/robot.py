"""What the controller needs of a robot.

Owns: the protocol that every driver fulfils, and the reading that it returns. It does not know policies or rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from vla.spec import Observation, RobotSpec


@dataclasses.dataclass(frozen=True)
class Reading:
    """The latest observation.

    Attributes:
        time: when it was taken, in seconds of `time.monotonic`.
        over: the task has ended (simulations know), with `success`.
        info: whatever else the driver knows, as plain values; nothing depends on it.
    """

    observation: Observation
    time: float
    over: bool = False
    success: bool = False
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Robot(Protocol):
    """A driver. None of its methods may block for longer than a small part of a control period."""

    spec: RobotSpec

    def observe(self) -> Reading | None:
        """The latest reading; None before the first. Asked for up to a thousand times a second: the same object as
        long as nothing new has come."""

    def command(self, action: np.ndarray) -> None:
        """Execute `action`, float32 [D] in the robot's units, in the period that begins now."""

    def close(self) -> None:
        """Leave the robot holding, and let it go."""
