"""A recorded demonstration, replayed in real time.

Owns: the frame that is due at a time, and the comparison of commands with demonstrated actions. This tests a policy and
a controller on the data of a real robot, without the robot. The replay is open loop: frames are shown as recorded, and
commands have no effect. It does not know policies, or how a dataset is stored (`vla.data`).
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
        tick: the frame that was due then.
        action: float32 [D].
    """

    time: float
    tick: int
    action: np.ndarray


class ReplayRobot(EpisodicRobot):
    """The episodes of a dataset, each loaded by `reset`. An episode starts with the first observation or command after
    the reset; frame k is due at start + k / hz, for one period. Use it as a context manager, like `SimRobot`.

    All images of an episode are decoded by `reset` and kept in memory (640 x 480 is 0.9 MB per frame and camera).

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
        # An unspecified action space needs a hold command. Zeros will do: commands have no effect here.
        hold = robot.hold or (0.0,) * robot.action_dim if robot.action_space == "unspecified" else robot.hold
        self.spec = dataclasses.replace(robot, control_hz=self._hz, hold=hold)
        self.episodes = [found.index for found in self._data.episodes]
        self.instruction, self.demonstrated = "", np.zeros((0, self.spec.action_dim), np.float32)
        self.sent: list[Sent] = []
        self._observations: list[dict[str, Any]] = []
        self._start: float | None = None  # of the episode; None before the first observation or command
        self._latest: Reading | None = None

    def __enter__(self) -> ReplayRobot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """The frame that is due. The episode is over after the last frame's period, without success."""
        tick = self._tick(time.monotonic())
        assert self._start is not None
        due, over = self._start + tick / self._hz, tick >= len(self._observations)
        if self._latest is None or self._latest.time != due:
            # Return the same reading for the same frame: the observation monitor checks each reading once.
            self._latest = Reading(self._observations[min(tick, len(self._observations) - 1)], due, over)
        return self._latest

    def command(self, action: np.ndarray) -> None:
        now = time.monotonic()
        self.sent.append(Sent(now, self._tick(now), np.array(action, np.float32)))

    def close(self) -> None:
        """Nothing to disconnect."""

    def agreement(self) -> dict[str, float]:
        """Mean absolute difference between the commands and the demonstrated actions of the frames that were due, for
        each action dimension in its unit. All commands before the end of the recording count, holds included.

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
