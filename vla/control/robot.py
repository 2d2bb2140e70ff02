"""The interface between the controller and a robot.

Owns: the protocols that drivers implement, and the reading that they return. It does not know policies or rates.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np

from vla.spec import Observation, RobotSpec


@dataclasses.dataclass(frozen=True)
class Reading:
    """An observation and its time.

    Attributes:
        time: when the observation was taken, in seconds of `time.monotonic`.
        over: whether the task has ended (reported by simulations), with `success`.
        info: other plain values, for display only.
    """

    observation: Observation
    time: float
    over: bool = False
    success: bool = False
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Robot(Protocol):
    """A driver: three methods and a `spec`. None of them may block for longer than a small part of a control period.

    A driver may be a subclass, or any object that has the three methods.
    """

    spec: RobotSpec

    @abc.abstractmethod
    def observe(self) -> Reading | None:
        """The latest reading; None before the first. It is called up to a thousand times per second, and must return
        the same object until there is a new observation."""

    @abc.abstractmethod
    def command(self, action: np.ndarray) -> None:
        """Execute `action`, float32 [D] in the units of `spec`, in the control period that begins now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnect. The controller has sent the hold command before."""

    def hold_reference(self) -> np.ndarray | None:
        """The action that a hold repeats before the first command, float32 [D]: the robot's current position in the
        units of its commands. None (the default) takes it from the state, by name (`RobotSpec.hold_action`)."""
        return None


class EpisodicRobot(Robot, Protocol):
    """A robot that can begin an episode by itself: a simulation, a recording, or a setup with a reset routine.

    Attributes:
        instruction: instruction of the current episode.
        episodes: the episodes that `reset` accepts, in order; None: it accepts any seed.
    """

    instruction: str
    episodes: Sequence[int] | None = None

    @abc.abstractmethod
    def reset(self, episode: int, /) -> object:
        """Begin an episode. It depends on its number (or seed) only."""


def is_episodic(robot: object) -> TypeGuard[EpisodicRobot]:
    """Whether `robot` has `reset`."""
    return hasattr(robot, "reset")
