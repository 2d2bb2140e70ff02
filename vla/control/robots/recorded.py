"""A recorded demonstration, played in real time.

Owns: which frame is due at a moment, and what was commanded beside what was demonstrated: a policy and a controller are
tried on a real robot's data, without the robot. Open loop: nothing that is commanded moves anything, the next picture
comes as it was recorded. It does not know policies, nor how a dataset is stored (`vla.data` does).
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from vla.control.robot import Reading
from vla.data.reader import Demonstrations
from vla.errors import ConfigError, DataError, unknown


@dataclasses.dataclass(frozen=True)
class Sent:
    """A command, float32 [D], when it came (`time.monotonic`), and the frame that was due then."""

    time: float
    tick: int
    action: np.ndarray


class ReplayRobot:
    """A `Robot`: one episode after the other, each loaded by `reset`. An episode starts with the first observation or
    command after that; frame k is due at start + k / hz, for one period. Use it as a context manager, as a `SimRobot`.

    All pictures of an episode are decoded beforehand and kept in memory (640 x 480 is 0.9 MB per frame and camera).

    Args:
        data: a dataset folder, or a dataset that is open.
        hz: frames per second; None: as it was recorded.
    Attributes:
        spec: whom it was recorded with.
        episodes: the indices there are.
        instruction: what the episode was to do.
        demonstrated: float32 [T, D], its own actions.
        sent: the commands since it began, in order.
    Raises:
        DataError: no such dataset.
    """

    def __init__(self, data: Demonstrations | str | Path, hz: float | None = None) -> None:
        if hz is not None and not hz > 0:
            raise ConfigError(f"hz must be positive, got {hz}.")
        self._data = data if isinstance(data, Demonstrations) else Demonstrations(data)
        self._hz = hz or self._data.fps
        robot = self._data.robot
        # Where nothing moves any command holds; a recording need not say which does.
        hold = robot.hold or (0.0,) * robot.action_dim if robot.action_space == "unspecified" else robot.hold
        self.spec = dataclasses.replace(robot, control_hz=self._hz, hold=hold)
        self.episodes = [found.index for found in self._data.episodes]
        self.instruction, self.demonstrated = "", np.zeros((0, self.spec.action_dim), np.float32)
        self.sent: list[Sent] = []
        self._observations: list[dict[str, Any]] = []
        self._start: float | None = None  # of the episode; None until somebody looks
        self._latest: Reading | None = None

    def __enter__(self) -> ReplayRobot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, episode: int) -> None:
        """Load an episode. DataError where there is none of that index."""
        data, known = self._data, {found.index: found for found in self._data.episodes}
        if episode not in known:
            raise DataError(f"{data.root}: {unknown('episode', episode, known)}")
        found = known[episode]
        self.instruction, self.demonstrated = found.instruction, data.actions[found.rows]
        pictures = {camera: list(data.frames(episode, camera)) for camera in data.cameras}
        states = None if data.states is None else data.states[found.rows]
        self._observations = [
            {"pixels": {camera: images[k] for camera, images in pictures.items()}}
            | ({} if states is None else {"agent_pos": states[k]})
            for k in range(found.length)
        ]
        self._start, self._latest, self.sent = None, None, []

    def observe(self) -> Reading:
        """The frame that is due. After the last frame's period it is over (and no success: a replay cannot succeed)."""
        tick = self._tick(time.monotonic())
        assert self._start is not None
        due, over = self._start + tick / self._hz, tick >= len(self._observations)
        if self._latest is None or self._latest.time != due:
            # What is the same frame is the same reading: it is judged once.
            self._latest = Reading(self._observations[min(tick, len(self._observations) - 1)], due, over)
        return self._latest

    def command(self, action: np.ndarray) -> None:
        now = time.monotonic()
        self.sent.append(Sent(now, self._tick(now), np.array(action, np.float32)))

    def close(self) -> None:
        """Nothing to leave holding."""

    def agreement(self) -> dict[str, float]:
        """Mean absolute difference, by action entry and in its unit, between what was commanded and what was
        demonstrated for the frame that was due. Every command until the end counts, also those that hold.

        Raises:
            DataError: nothing was commanded while it played.
        """
        sent = [command for command in self.sent if command.tick < len(self.demonstrated)]
        if not sent:
            raise DataError("nothing was commanded while the demonstration played: there is nothing to compare.")
        commanded = np.stack([command.action for command in sent])
        difference = np.abs(commanded - self.demonstrated[[command.tick for command in sent]]).mean(0)
        return {name: float(value) for name, value in zip(self.spec.action_names, difference, strict=True)}

    def _tick(self, now: float) -> int:
        self._start = now if self._start is None else self._start
        return math.floor((now - self._start) * self._hz)
