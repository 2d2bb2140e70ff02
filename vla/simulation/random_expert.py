"""An expert with random actions, for testing the pipeline in an environment without an expert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from vla.errors import SimulatorError


class RandomExpert:
    """Uniformly random actions."""

    def __init__(self, space: gym.Space, seed: int) -> None:
        if not isinstance(space, spaces.Box):
            raise SimulatorError(f"random demonstrations need a Box action space, got {space}.")
        low, high = np.maximum(space.low, -1e3), np.minimum(space.high, 1e3)
        rng = np.random.default_rng(seed)
        self._draw: Callable[[], Any]
        if space.dtype.kind == "f":
            self._draw = functools.partial(rng.uniform, low, high)
        else:  # integers, limits included
            self._draw = functools.partial(rng.integers, low.astype(int), high.astype(int), endpoint=True)

    def act(self) -> np.ndarray:
        return self._draw().astype(np.float32)
