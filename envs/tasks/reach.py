"""Reach: move the fingertips to the target object.

Owns the success condition. The hand's motion is in `moves`.
"""

from __future__ import annotations

import numpy as np

from envs.moves import OPEN, go
from envs.tasks.common import ObjectTask

_ABOVE = np.array([0.0, 0.0, 0.035])  # metres from the object's centre; the fingertips are then just above its top
_NEAR = 0.025  # metres


class Reach(ObjectTask):
    """Success: the hand is within 2.5 cm of the point just above the target object, and slower than 0.3 m/s."""

    task = "reach"

    def success(self) -> bool:
        return self._distance(self.target) < _NEAR and self.world.hand_speed < 0.3

    def reached(self) -> int:
        """The object nearest to the hand if it is within 5 cm, else -1."""
        distances = [self._distance(i) for i in range(self.n_objects)]
        nearest = int(np.argmin(distances))
        return nearest if distances[nearest] < 0.05 else -1

    def plan(self) -> np.ndarray:
        return go(self.world, self.object() + _ABOVE, OPEN)

    def _distance(self, i: int) -> float:
        return float(np.linalg.norm(self.world.object_pos(i) + _ABOVE - self.world.hand))
