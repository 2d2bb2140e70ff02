"""A recorded demonstration, replayed in real time.

Owns: the timing of the frames, and the comparison of commands with demonstrated actions. This tests a policy and a
controller on the data of a real robot, without the robot. The replay is open loop: commands have no effect on the
frames. It does not know policies, or how a dataset is stored (`vla.data`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from vla.control.robot import EpisodicRobot, Reading
from vla.data.reader import Demonstrations
from vla.errors import ConfigError, DataError, unknown


@dataclasses.dataclass(frozen=True)
class Sent:
    """A command.

    Attributes:
        time: when the command was sent, in seconds of `time.monotonic`.
        tick: index of the frame at that time.
        action: float32 [D].
    """

    time: float
    tick: int
    action: np.ndarray


class ReplayRobot(EpisodicRobot):
    """The episodes of a dataset.

    `reset` loads an episode, and keeps its decoded images in memory (0.9 MB per frame and camera of 640 x 480). The
    episode starts with the first observation or command; frame k is shown from start + k / hz on, for one period.

    Args:
        data: a dataset folder, or an open dataset.
        hz: frames per second; None: as recorded.
    Attributes:
        spec: the recorded robot.
        episodes: indices of the episodes.
        instruction: instruction of the current episode.
        demonstrated: recorded actions of the current episode, float32 [T, D].
        sent: the commands of the current episode, in order.
    Raises:
        DataError: the dataset does not exist or cannot be read.
    """

    def __init__(self, data: Demonstrations | str | Path, hz: float | None = None) -> None:
        if hz is not None and not hz > 0:
            raise ConfigError(f"hz must be positive, got {hz}.")
        self._data = data if isinstance(data, Demonstrations) else Demonstrations(data)
        self._hz = hz or self._data.fps
        robot = self._data.robot
        # An unspecified action space needs a hold command. It can be zeros, because commands have no effect here.
        hold = robot.hold or (0.0,) * robot.action_dim if robot.action_space == "unspecified" else robot.hold
        self.spec = dataclasses.replace(robot, control_hz=self._hz, hold=hold)
        self.episodes = [found.index for found in self._data.episodes]
        self.instruction, self.demonstrated = "", np.zeros((0, self.spec.action_dim), np.float32)
        self.sent: list[Sent] = []
        self._observations: list[dict[str, Any]] = []
        self._start: float | None = None  # of the episode; None before the first observation or command
        self._latest: Reading | None = None

    def reset(self, episode: int) -> None:
        """Load an episode. DataError if no episode has this index."""
        data, known = self._data, {found.index: found for found in self._data.episodes}
        if episode not in known:
            raise DataError(f"{data.root}: {unknown('episode', episode, known)}")
        found = known[episode]
        self.instruction, self.demonstrated = found.instruction, data.actions[found.rows]
        images = {camera: list(data.frames(episode, camera)) for camera in data.cameras}
        states = None if data.states is None else data.states[found.rows]
        self._observations = [
            {"pixels": {camera: frames[k] for camera, frames in images.items()}}
            | ({} if states is None else {"agent_pos": states[k]})
            for k in range(found.length)
        ]
        self._start, self._latest, self.sent = None, None, []

    def observe(self) -> Reading:
        """The current frame. After the last frame's period, the episode is over, without success."""
        tick = self._tick(time.monotonic())
        assert self._start is not None
        due, over = self._start + tick / self._hz, tick >= len(self._observations)
        if self._latest is None or self._latest.time != due:
            # Equal frames must be the same object (`Robot.observe`).
            self._latest = Reading(self._observations[min(tick, len(self._observations) - 1)], due, over)
        return self._latest

    def command(self, action: np.ndarray) -> None:
        now = time.monotonic()
        self.sent.append(Sent(now, self._tick(now), np.array(action, np.float32)))

    def hold_reference(self) -> None:
        """The state entries with the same names as actions, and 0 for the others. Unlike for other robots, these names
        may be missing, because commands have no effect."""

    def close(self) -> None:
        """Nothing to disconnect."""

    def agreement(self) -> dict[str, float]:
        """Mean absolute difference between each command and the demonstrated action of the frame at its time, by action
        dimension and in its unit. Includes hold commands, but no commands after the end of the recording.

        Raises:
            DataError: there were no commands during the replay.
        """
        sent = [command for command in self.sent if command.tick < len(self.demonstrated)]
        if not sent:
            raise DataError("there were no commands during the replay, so there is nothing to compare.")
        commanded = np.stack([command.action for command in sent])
        difference = np.abs(commanded - self.demonstrated[[command.tick for command in sent]]).mean(0)
        return {name: float(value) for name, value in zip(self.spec.action_names, difference, strict=True)}

    def _tick(self, now: float) -> int:
        self._start = now if self._start is None else self._start
        return math.floor((now - self._start) * self._hz)
