"""PickUp: lift the target object and hold it.

Owns the success condition. The grasping motion is in `moves`.
"""

from __future__ import annotations

import numpy as np

from envs.moves import CLOSED, go, pick
from envs.scene import HALF
from envs.tasks.common import ObjectTask

_LIFT = 0.05  # metres


class PickUp(ObjectTask):
    """Success: the target object is grasped and more than 5 cm above its resting height."""

    task = "pick_up"

    def success(self) -> bool:
        return bool(self.object()[2] > HALF + _LIFT) and self.in_hand(self.target)

    def plan(self) -> np.ndarray:
        at = self.object()
        if self.in_hand(self.target):
            return go(self.world, np.array([*self.world.hand[:2], HALF + 0.10]), CLOSED)
        return pick(self.world, at)
