"""PickUp: lift the named object and hold it.

Owns when it counts as lifted. Does not know how objects are gripped.
"""

from __future__ import annotations

import numpy as np

from envs.moves import CLOSED, go, pick
from envs.scene import HALF
from envs.tasks.common import ObjectTask

_LIFT = 0.05  # metres


class PickUp(ObjectTask):
    """Success: the named object is in the hand, 5 cm or more above where objects rest."""

    task = "pick_up"

    def success(self) -> bool:
        return bool(self.object()[2] > HALF + _LIFT) and self.in_hand(self.target)

    def plan(self) -> np.ndarray:
        at = self.object()
        if self.in_hand(self.target):
            return go(self.world, np.array([*self.world.hand[:2], HALF + 0.10]), CLOSED)
        return pick(self.world, at)
