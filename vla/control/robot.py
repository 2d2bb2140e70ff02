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
        over, success: whether the task has ended, and whether it succeeded. Only simulations report this.
        info: other plain values, for display only.
    """

    observation: Observation
    time: float
    over: bool = False
    success: bool = False
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Robot(Protocol):
    """A driver: a `spec` and three methods, which must return within a small part of a control period.

    A driver may be a subclass, or any object with these attributes.
    """

    spec: RobotSpec

    @abc.abstractmethod
    def observe(self) -> Reading | None:
        """The latest reading; None before the first. Until there is a new observation, it must return the same object.
        It is called up to a thousand times per second."""

    @abc.abstractmethod
    def command(self, action: np.ndarray) -> None:
        """Execute `action`, float32 [D] in the units of `spec`, within the control period that begins now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnect. The controller sends the hold command first."""

    def hold_reference(self) -> np.ndarray | None:
        """The action that a hold repeats before the first command, float32 [D]: the robot's current position in the
        units of its commands. None (the default): use the state entries with the same names
        (`RobotSpec.hold_action`)."""
        return None


class EpisodicRobot(Robot, Protocol):
    """A robot that can begin an episode: a simulation, a recording, or a setup with a reset routine.

    Attributes:
        instruction: instruction of the current episode.
        episodes: valid arguments of `reset`, in order; None: any seed.
    """

    instruction: str
    episodes: Sequence[int] | None = None

    @abc.abstractmethod
    def reset(self, episode: int, /) -> object:
        """Begin the episode with this number or seed. Equal arguments give equal episodes."""


def is_episodic(robot: object) -> TypeGuard[EpisodicRobot]:
    """Whether `robot` has `reset`."""
    return hasattr(robot, "reset")
