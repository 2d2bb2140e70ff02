"""The scripted expert. It executes a task's plan, optionally with noise, so that demonstrations contain recoveries.

Owns the noise. Does not know tasks or motions; the plan is an argument.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Expert:
    """Converts a task's plan to actions, with optional bursts of noise.

    `label` is the action without noise for the state at the last call of `act`.
    """

    def __init__(self, plan: Callable[[], np.ndarray], noise: float = 0.0, seed: int | None = None) -> None:
        if not 0.0 <= noise <= 1.0:
            raise ValueError(f"noise={noise!r} is out of range: pass a value from 0 (clean) to 1 (strong bursts).")
        self._plan = plan
        self._noise = noise
        self._rng = np.random.default_rng(seed)
        self._burst = 0  # remaining steps of the current burst
        self._push = np.zeros(3)
        self._slip = 0  # remaining steps with an inverted gripper command
        self.label = np.zeros(7, dtype=np.float32)

    def act(self) -> np.ndarray:
        """The action [7] float32 to execute now."""
        self.label = self._plan().astype(np.float32)
        return self._disturb(self.label.copy()) if self._noise else self.label.copy()

    def _disturb(self, action: np.ndarray) -> np.ndarray:
        rng, noise = self._rng, self._noise
        if self._burst == 0 and rng.random() < 0.05:
            self._burst = int(rng.integers(2, 7))
            strength = rng.uniform(0.4, 1.8) * noise  # the strongest bursts override the expert's action
            direction = rng.normal(size=3) * (1.0, 1.0, 0.6)
            self._push = strength * direction / np.linalg.norm(direction)
        if self._burst > 0:
            self._burst -= 1
            action[:3] += self._push + rng.normal(0.0, 0.15 * noise, size=3)
        if self._slip == 0 and rng.random() < 0.008 * noise:
            self._slip = int(rng.integers(2, 5))
        if self._slip > 0:
            self._slip -= 1
            action[6] = -action[6]
        return np.clip(action, -1.0, 1.0)
