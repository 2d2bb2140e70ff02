"""An environment with one moving point, drawn with numpy, that can fail on demand.

The image shows the point at its position, so the state can be read from the image.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

ENV_ID = "test/Point-v0"
HEIGHT, WIDTH = 48, 64


def draw(state: np.ndarray) -> np.ndarray:
    """uint8 [48, 64, 3]: grey, with a bright block whose column encodes state[0] in [0, 1]."""
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    left = round(float(state[0]) * (WIDTH - 8))
    image[16:32, left : left + 8] = 220
    return image


def read(image: np.ndarray) -> float:
    """state[0], read from an image."""
    columns = image[24, :, 1].astype(float) > 140
    return float(np.flatnonzero(columns)[0]) / (WIDTH - 8)


class PointWorld(gym.Env):
    """Move the point to the goal.

    Args:
        raise_on, die_on: seeds whose episodes raise an exception, or kill the process, at the third step.
        unsolvable: seeds in which the goal moves away.
        delay: seconds per step.
        offset: added to each start position, to simulate a changed environment.
        gain: factor on all actions.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_fps": 10, "render_modes": ["rgb_array"]}

    def __init__(
        self,
        raise_on: tuple[int, ...] = (),
        die_on: tuple[int, ...] = (),
        unsolvable: tuple[int, ...] = (),
        delay: float = 0.0,
        offset: float = 0.0,
        gain: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        self.raise_on, self.die_on, self.unsolvable = raise_on, die_on, unsolvable
        self.delay, self.offset, self.gain, self.render_mode = delay, offset, gain, render_mode
        self.action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({"front": gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)}),
                "agent_pos": gym.spaces.Box(0, 1, (2,), np.float32),
            }
        )
        self.robot = {
            "cameras": ["front"],
            "state_names": ["x", "y"],
            "action_names": ["dx", "dy", "gripper"],
            "action_space": "ee_delta",
            "gripper_index": 2,
            "control_hz": 10.0,
            "hold": [0, 0, None],
        }
        self._canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.state = self.np_random.uniform(0.1, 0.9, 2) + self.offset
        self.goal = self.np_random.uniform(0.1, 0.9, 2)
        self.colour = ["red", "green"][int(self.np_random.integers(2))]
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.steps += 1
        if self.steps == 3 and self.seed in self.raise_on:
            raise RuntimeError("the simulation is unstable")
        if self.steps == 3 and self.seed in self.die_on:
            os._exit(9)
        if self.delay:
            time.sleep(self.delay)
        self.state = np.clip(self.state + 0.1 * self.gain * np.asarray(action[:2], np.float64), 0, 1)
        if self.seed in self.unsolvable:
            self.goal = (self.state + 0.5) % 1.0
        info = self._info()
        return self._observe(), 0.0, info["is_success"], False, info

    def make_expert(self, noise: float = 0.0, seed: int | None = None) -> _Expert:
        return _Expert(self, noise, seed)

    def _info(self) -> dict[str, Any]:
        near = bool(np.abs(self.goal - self.state).max() < 0.04)
        return {"instruction": f"go to the {self.colour} goal", "is_success": near}

    def _observe(self) -> dict[str, Any]:
        # The same array every time, as some renderers do: observations that are kept without copying change later.
        self._canvas[:] = draw(self.state)
        return {"pixels": {"front": self._canvas}, "agent_pos": self.state.astype(np.float32)}


class _Expert:
    def __init__(self, world: PointWorld, noise: float, seed: int | None) -> None:
        self._world, self._noise, self._rng = world, noise, np.random.default_rng(seed)
        self.label = np.zeros(3)

    def act(self) -> np.ndarray:
        way = np.clip(5 * (self._world.goal - self._world.state), -1, 1)
        self.label = np.array([*way, 1.0 if np.abs(way).max() > 0.5 else -1.0])
        return self.label + np.append(self._rng.normal(0, self._noise, 2), 0.0) if self._noise else self.label


gym.register(ENV_ID, PointWorld, max_episode_steps=60)
