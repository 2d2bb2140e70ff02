"""A one-dimensional environment for the tests of `vla rollout`: move a dot to the bright column. Registers
"toy/Slide-v0".

It is a separate module because environment processes import it. The arguments define which seeds fail, and how.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

SIZE = 16
ROBOT = {
    "cameras": ["front"],
    "state_names": ["x"],
    "action_names": ["dx"],
    "action_space": "ee_delta",
    "control_hz": 10.0,
}


class Slide(gym.Env):
    """Success: within 0.05 of the column. Success ends the episode if `stop` is set; otherwise only the time limit
    does."""

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own convention)

    def __init__(
        self,
        raise_on=-1,
        kill_on=-1,
        kill_once=None,
        hang_on=-1,
        delay=0.0,
        stop=True,
        words="slide to the column",
        **_,
    ):
        self.raise_on, self.kill_on, self.hang_on, self.stop, self.words = raise_on, kill_on, hang_on, stop, words
        self.kill_once, self.delay = (
            kill_once,
            delay,
        )  # `kill_once`: a file that marks the kill; None: kill every time. `delay`: seconds per step
        self.observation_space = gym.spaces.Dict(
            pixels=gym.spaces.Dict(front=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)),
            agent_pos=gym.spaces.Box(-2, 2, (1,), np.float32),
        )
        self.action_space = gym.spaces.Box(-0.2, 0.2, (1,), np.float32)
        self.robot = ROBOT

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.x = seed, 0.0
        self.column = int(self.np_random.integers(SIZE))
        return self._see(), self._say()

    def step(self, action):
        if self.seed == self.raise_on:
            raise ZeroDivisionError("the motor failed")
        if self.seed == self.kill_on and not (self.kill_once and Path(self.kill_once).exists()):
            if self.kill_once:
                Path(self.kill_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == self.hang_on:
            time.sleep(60)
        time.sleep(self.delay)
        self.x = float(np.clip(self.x + action[0], -2, 2))
        info = self._say()
        return self._see(), float(info["is_success"]), self.stop and info["is_success"], False, info

    def _see(self):
        image = np.full((SIZE, SIZE, 3), 40, np.uint8)
        image[:, self.column] = 255
        return {"pixels": {"front": image}, "agent_pos": np.array([self.x], np.float32)}

    def _say(self):
        reached = 0 if self.x > 0.05 else 1 if self.x < -0.05 else -1
        return {
            "is_success": abs(self.x - place(self.column)) < 0.05,
            "instruction": self.words,
            "reached": reached,
            "target": int(place(self.column) < 0),
        }


def place(column: int) -> float:
    """Position of an image column on the line, from -1 to 1."""
    return 2 * (column + 0.5) / SIZE - 1


for name in ("Slide", "Glide"):
    if f"toy/{name}-v0" not in gym.registry:
        gym.register(f"toy/{name}-v0", entry_point=Slide, max_episode_steps=12)
